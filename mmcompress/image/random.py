"""Random tokens: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops.ranking import topk_in_order
from ..tokens import ImageReducer, Reduction, Tokens, select


@dataclass(frozen=True)
class Random(ImageReducer):
    """Keep a random subset, the same for every picture of a layout under one seed, on any device and in any batch.

    To average over selections, vary `seed`, as `mmcompress eval` does from question to question.
    """

    seed: int = 0

    def reduce(self, x: Tokens, k: int) -> Reduction:
        n = x.layout.tokens
        draw = torch.arange(n, device=x.features.device) + (self.seed * 0x9E3779B9 & 0x7FFFFFFF)
        for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 0x297A2D39)):    # an integer hash, 31 bits wide
            draw = ((draw ^ (draw >> shift)) * factor) & 0x7FFFFFFF
        index = topk_in_order((draw * n + torch.arange(n, device=draw.device))[None], k)             # no ties
        return select(x, index.expand(len(x.features), -1))
