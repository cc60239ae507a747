"""KeyDiff (Park et al., 2025, arXiv 2504.15364): keys that differ from the others draw attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .plan import CachePlan
from .view import CacheView


@dataclass(frozen=True)
class KeyDiff(CachePlan):
    """Keep the tokens whose keys are least like the mean direction of all: -cos(k, mean of k / ||k||)."""

    sinks: int = 0
    recent: int | float = 0

    def scores(self, x: CacheView) -> Tensor:
        unit = F.normalize(x.keys.float(), dim=-1)
        mass = x.slots.mass[..., None]
        anchor = (unit * mass).sum(2, keepdim=True) / mass.sum(2, keepdim=True).clamp_min(1)        # (B, H, 1, d)
        return -F.cosine_similarity(unit, anchor, dim=-1)
