"""Averages of runs of neighbouring tokens: what a model with a pooling layer would read (baseline)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops.pooling import average_by_slot
from ..tokens import Reduction, Tokens
from .base import AudioReducer, evenly


@dataclass(frozen=True)
class MeanPool(AudioReducer):
    """Cut the recording into k runs of equal length, give or take a token, and average each. `mass` is the tokens in a run."""

    def reduce_sound(self, x: Tokens, k: int) -> Reduction:
        n, device, batch = x.layout.length, x.features.device, len(x.features)
        slot = torch.arange(n, device=device) * k // n
        tokens, mass = average_by_slot(x.features, slot, k)
        return Reduction(tokens=tokens, index=evenly(n, k, device).expand(batch, -1), source=slot.expand(batch, -1),
                         mass=mass.expand(batch, -1))
