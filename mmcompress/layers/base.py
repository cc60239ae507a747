"""What every reducer inside the language model is: reductions at the inputs of decoder layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from ..tokens import Reducer

Positions = Literal["closed", "original"]
Signal = Literal["paid", "received", "keys"]


@dataclass(frozen=True)
class Step:
    """One reduction of every item's tokens at the input of one decoder layer.

    layer       decoder layer, counted from 0, that no longer sees the dropped tokens
    reducer     count(layout) -> k, and Tokens -> Reduction, exactly as an image reducer; its features are hidden states. It
                takes pictures, clips and recordings, or those that its attribute `modalities` names
    reads       decoder layer whose signals it needs (`layer` or the one before); None: none
    positions   "original": what stays keeps its rotary position; "closed": positions close up from this layer on
    signals     what it needs of the layer it reads: "paid", the attention of the prompt's querying tokens
                (`Tokens.text_attention`), "received", that of all its tokens (`Tokens.received_attention`), "keys"
                (`Tokens.layer_keys`)
    """

    layer: int
    reducer: Reducer
    reads: int | None = None
    positions: Positions = "original"
    signals: tuple[Signal, ...] = ("paid",)


class LayerReducer(ABC):
    """Base of the reducers in `wrap(model, layers=[...])`: a frozen dataclass whose fields are its configuration."""

    @abstractmethod
    def steps(self) -> tuple[Step, ...]:
        """Its reductions, by layer."""

    def within(self, depth: int) -> LayerReducer:
        """The same for a language model of `depth` layers; only schedules up to its last layer differ."""
        return self


def check_layer(name: str, layer: Any) -> None:
    """Raise unless `layer` is the number of a decoder layer that can be reduced inside the model."""
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
        raise ValueError(f"{name}: layer={layer!r}: a decoder layer's number, 1 or more; at layer 0 stands the projector's "
                         f"output, which wrap(model, image=...) reduces")


def check_positions(positions: Any) -> None:
    if positions not in ("closed", "original"):
        raise ValueError(f"positions={positions!r}: 'closed' or 'original'")


def works_on(reducer: Any, modality: str) -> bool:
    """Whether a step's reducer takes items of a modality: all of them, unless it names some as its `modalities`."""
    named = getattr(reducer, "modalities", None)
    return named is None or modality in named


def steps_of(layers: Sequence[Any], depth: int) -> tuple[Step, ...]:
    """All steps of some layer reducers, by layer; raises if the model has too few layers or two steps meet at one."""
    fitted = (reducer.within(depth) if isinstance(reducer, LayerReducer) else reducer for reducer in layers)
    steps = sorted((step for reducer in fitted for step in reducer.steps()), key=lambda step: step.layer)
    for step in steps:
        if step.layer >= depth:
            raise ValueError(f"{type(step.reducer).__name__} at layer {step.layer}: this language model has {depth} layers, "
                             f"numbered from 0; choose a smaller layer")
    for a, b in pairwise(steps):
        if a.layer == b.layer:
            raise ValueError(f"{type(a.reducer).__name__} and {type(b.reducer).__name__} both work at layer {a.layer}; "
                             f"give each a layer of its own")
    return tuple(steps)
