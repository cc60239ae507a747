"""KeyDiff (Park et al., 2025, arXiv 2504.15364): keys that differ from the others draw attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ops.kv_keys import key_diversity
from .plan import CachePlan
from .view import CacheView


@dataclass(frozen=True)
class KeyDiff(CachePlan):
    """Keep the tokens whose keys are least like the mean direction of all: -cos(k, mean of k / ||k||)."""

    sinks: int = 0
    recent: int | float = 0

    def scores(self, x: CacheView) -> Tensor:
        return key_diversity(x.keys, x.valid)
