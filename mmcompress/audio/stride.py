"""Every n-th token: what a model with a larger stride would read (baseline)."""

from __future__ import annotations

from dataclasses import dataclass

from ..tokens import Reduction, Tokens, select
from .base import AudioReducer, evenly


@dataclass(frozen=True)
class Stride(AudioReducer):
    """Keep k tokens, evenly spaced in time, for any k."""

    def reduce_sound(self, x: Tokens, k: int) -> Reduction:
        index = evenly(x.layout.length, k, x.features.device)
        return select(x, index.expand(len(x.features), -1))
