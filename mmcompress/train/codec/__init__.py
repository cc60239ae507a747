"""Training a neural codec by a recipe of kind 'xcodec': `mmcompress train configs/xcodec-tiny.yaml`.

    recipe.py       what a run depends on
    segments.py     what it hears
    step.py         one step: the codec against its judge
    measure.py      what held-out sound says: spectra, semantics, use of the books
    loop.py         all steps, checkpoints, the finished model
    plots.py        losses and use of the books
"""
