"""Random tokens: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.hashing import hashed
from .plan import CachePlan
from .view import CacheView


@dataclass(frozen=True)
class Random(CachePlan):
    """Keep random tokens, others in every layer and head, alike on every device and in every batch under one seed."""

    sinks: int = 0
    recent: int | float = 0
    seed: int = 0

    def scores(self, x: CacheView) -> Tensor:
        heads = torch.arange(x.keys.shape[1], device=x.keys.device)[:, None]
        return hashed(hashed(x.position, self.seed) + hashed(heads + x.layer * x.keys.shape[1], self.seed + 1), 0).float()
