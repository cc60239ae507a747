"""GlobalRank: the thumbnail commands one ranking over all crops (ours, after GlobalCom2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ops.canvas import spread_over_canvas, thumbnail_map
from ..ops.ranking import NewlinePolicy, keep_with_newlines
from ..ops.scores import patch_scores
from ..tokens import ImageReducer, Reduction, Tokens, select


@dataclass(frozen=True)
class GlobalRank(ImageReducer):
    """placeholder docstring, finalised after the experiments"""

    newlines: NewlinePolicy = "kept"
    captures: ClassVar[tuple[int, ...]] = (-1,)

    def reduce(self, x: Tokens, k: int) -> Reduction:
        local = patch_scores(x, "attention")
        spread = spread_over_canvas(thumbnail_map(local, x.layout), x.layout)
        score = local + spread
        score = score.masked_fill(x.places.tile == 0, -1)
        return select(x, keep_with_newlines(score, x.places, k, self.newlines))
