"""Random tokens: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from ..ops.hashing import random_order
from ..ops.ranking import topk_in_order
from ..tokens import ImageReducer, Reduction, Tokens, select


@dataclass(frozen=True)
class Random(ImageReducer):
    """Keep a random subset, the same for every picture of a layout under one seed, on any device and in any batch.

    To average over selections, vary `seed`, as `mmcompress eval` does from question to question.
    """

    seed: int = 0

    def reduce(self, x: Tokens, k: int) -> Reduction:
        index = topk_in_order(random_order(x.layout.tokens, self.seed, x.features.device)[None], k)
        return select(x, index.expand(len(x.features), -1))
