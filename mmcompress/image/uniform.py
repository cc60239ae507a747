"""Uniform sampling: every N/K-th token of the packed sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..tokens import ImageReducer, Reduction, Tokens, select


@dataclass(frozen=True)
class Uniform(ImageReducer):
    """Keep tokens at equal steps of the sequence (baseline). Token i of K is number floor((i + 1/2) N / K)."""

    def reduce(self, x: Tokens, k: int) -> Reduction:
        step = torch.arange(k, device=x.features.device)
        index = ((2 * step + 1) * x.layout.tokens) // (2 * k)
        return select(x, index.expand(len(x.features), -1))
