"""What a configuration asks of a model that it cannot do: refused before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .adapters import Adapter, known_model_types
from .compat import check_layers
from .config import MODALITIES, WrapConfig
from .errors import UnsupportedModelError
from .layers.base import works_on


def check(model: Any, adapter: Adapter, config: WrapConfig) -> None:
    """Raise UnsupportedModelError, or ValueError where a value does not fit the model."""
    name = type(model).__name__
    can = [slot for slot in MODALITIES if adapter.reads(slot)]
    for reducer in config.layers:
        if not any(works_on(reducer, modality) for modality in can):
            raise UnsupportedModelError(f"{type(reducer).__name__} reduces recordings, and {name} does not hear; use FastV, "
                                        f"PyramidDrop or StagePool")
    if adapter.seq2seq and config.layers:
        raise UnsupportedModelError(f"{name} has no prompt with sound in it, so layers=[...] has nothing to reduce; use "
                                    f"audio=...")
    steps = config.steps(adapter.depth)
    check_layers(model, steps)
    if steps and adapter.mrope:
        raise UnsupportedModelError(f"{name}: layers=[...] does not know its multi-dimensional rotary positions; use image=... "
                                    f"and video=...")
    for slot, verb in (("image", "sees no pictures"), ("video", "reads no clips"), ("audio", "does not hear")):
        if getattr(config, slot) is not None and not adapter.reads(slot):
            raise UnsupportedModelError(f"{name} {verb}, so {slot}=... has nothing to reduce; adapters/README.md lists what "
                                        f"each family takes (of known model types: {', '.join(known_model_types())})")
    if config.cache:
        _check_cache(model, config)


def _check_cache(model: Any, config: WrapConfig) -> None:
    from .cache import CompressedCache, chain

    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__} keeps one cache of its decoder's and one of its encoder's states, "
                                    f"which cache=... does not know; audio=... shortens the latter")
    made = CompressedCache(model.config.get_text_config(decoder=True), chain(config.cache))     # raises where keys are shared
    for plan in config.cache:
        if isinstance(getattr(plan, "keep", None), Sequence):
            plan.at(0, len(made.layers))                        # raises unless there is one for each layer
