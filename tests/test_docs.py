"""README says what the registry and the measurements say; its code runs."""

import re
from pathlib import Path

import pytest
from conftest import CACHE_METHODS, LAYER_METHODS, METHODS, VIDEO_METHODS

import mmcompress
from mmcompress.docs import accuracy_table, budget_table, methods, methods_table
from mmcompress.train import Schedule, kinds
from mmcompress.train.recipe import Recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_holds_the_table_of_methods():
    assert methods_table() in README, "run `mmcompress list --markdown` and put the table into README.md"


def test_readme_holds_the_measured_table():
    assert accuracy_table(ROOT / "benchmarks" / "results" / "pico.csv") in README


def test_the_page_on_layers_holds_what_was_measured():
    page = (ROOT / "docs" / "layers.md").read_text()
    assert budget_table(ROOT / "benchmarks" / "results" / "layers.csv") in page
    for path in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (ROOT / "docs" / path).exists(), path


def test_the_page_on_clips_holds_what_was_measured():
    page, rows = (ROOT / "docs" / "video.md").read_text(), ROOT / "benchmarks" / "results" / "video.csv"
    assert budget_table(rows, ("all", "order", "count", "change")) in page
    assert accuracy_table(rows, ("all",)) in README
    for path in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (ROOT / "docs" / path).exists(), path


def test_the_table_covers_the_registry():
    assert sorted(m.name for m in methods() if m.slot == "image") == METHODS
    assert sorted(m.name for m in methods() if m.slot == "video") == VIDEO_METHODS
    assert sorted(m.name for m in methods() if m.slot == "layers") == LAYER_METHODS
    assert sorted(m.name for m in methods() if m.slot == "cache") == CACHE_METHODS
    for m in methods():
        assert m.about.endswith(".") and (m.slot != "image" or m.options["keep"] == 0.25)


def test_readme_quickstarts_name_what_exists():
    for name in re.findall(r"mmcompress\.([a-z_]+)\(", README):
        assert name in ("load",) or callable(getattr(mmcompress, name)), name
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_configuration_loads(path):
    """A wrap, a schedule or a training recipe, as its name says."""
    if path.name.startswith("llavolta"):
        assert Schedule.build(path).boundaries(100)[-1] == 100
        return
    if path.name.startswith("pico"):
        assert Recipe.load(path).steps > 0
        return
    if path.name.startswith("xcodec"):
        assert kinds.load(path)[0] == "xcodec"
        return
    config = mmcompress.WrapConfig.load(path)
    assert mmcompress.WrapConfig.from_dict(config.to_dict()) == config


def test_the_method_of_contributing_works_as_it_stands():
    """The one file of CONTRIBUTING.md, run as mmcompress/image/keep_norm.py would be."""
    import sys
    import types

    import torch
    from tiny import llava_next, make_inputs
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code = re.search(r"```python\n# mmcompress/image/keep_norm.py\n(.*?)```", text, re.S).group(1)
    module = types.ModuleType("mmcompress.image.keep_norm")
    module.__package__ = "mmcompress.image"
    sys.modules[module.__name__] = module
    try:
        exec(compile(code, "keep_norm.py", "exec"), module.__dict__)
        mmcompress.register("image", "keep_norm", re.search(r'"keep_norm": "(.*?)"', text).group(1))
        model = llava_next()
        inputs = make_inputs(model, [[(48, 48)], [(100, 40)]])
        with mmcompress.wrap(model, image={"name": "keep_norm", "keep": 0.3}) as w:
            w(**inputs)
            features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True).pooler_output
            for item, x in zip(w.last, features):
                patches = item.layout.places().is_patch
                kept = torch.zeros(len(x), dtype=torch.bool).index_fill(0, item.index, True)
                norm = x.norm(dim=-1)
                assert item.after == int(0.3 * item.before)
                assert norm[kept & patches].mean() > norm[~kept & patches].mean()
    finally:
        from mmcompress import registry
        registry._REDUCERS["image"].pop("keep_norm", None)
        del sys.modules[module.__name__]


def test_public_names():
    for name in mmcompress.__all__:
        assert getattr(mmcompress, name) is not None
    assert len(mmcompress.__all__) <= 22
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mmcompress.nothing  # noqa: B018


def test_importing_does_nothing_else():
    """No transformers model, no torch setting and no class is touched by the import."""
    import subprocess
    import sys
    code = """
import torch, transformers
from transformers import LlavaNextForConditionalGeneration as M
before = {k: id(v) for k, v in vars(M).items()}
import mmcompress
assert before == {k: id(v) for k, v in vars(M).items()}
import sys
assert 'matplotlib' not in sys.modules and 'typer' not in sys.modules and 'mmcompress.image' not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
