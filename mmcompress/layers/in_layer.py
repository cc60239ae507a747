"""InLayer: any image reducer at the input of a decoder layer instead of at the projector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import registry
from .base import LayerReducer, Positions, Step, check_layer, check_positions


@dataclass(frozen=True)
class InLayer(LayerReducer):
    """Reduce every picture with an image reducer when its hidden states reach decoder layer K.

    layer      K, counted from 0
    reducer    an image reducer, its registered name, or a dict {"name": ..., fields}; its features are then hidden states, its
               geometry and its [CLS] attention are the picture's as before
    positions  "original" (default): tokens attend to each other in the layers below, so they stay where they were; or "closed"
    """

    layer: int = 2
    reducer: Any = "global_rank"
    positions: Positions = "original"

    def __post_init__(self) -> None:
        check_layer("InLayer", self.layer)
        check_positions(self.positions)
        object.__setattr__(self, "reducer", registry.build("image", self.reducer))
        if getattr(self.reducer, "count_is_bound", False):
            raise ValueError(f"{registry.label(self.reducer)}: its count depends on data, so it works at the projector only: "
                             f"pass it as image=...")
        if getattr(self.reducer, "reads_question", False):
            raise ValueError(f"{registry.label(self.reducer)} compares the question's embeddings with the projector's output; "
                             f"pass it as image=...")

    def steps(self) -> tuple[Step, ...]:
        return (Step(self.layer, self.reducer, positions=self.positions),)
