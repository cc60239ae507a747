"""Key norm (Devoto et al., EMNLP 2024, arXiv 2406.11430): keys of small L2 norm draw attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ops.kv_keys import key_norm
from .plan import CachePlan
from .view import CacheView


@dataclass(frozen=True)
class KNorm(CachePlan):
    """Keep the tokens whose keys have the smallest norm.

    The paper leaves the first two layers whole: `keep=(1.0, 1.0, 0.5, ...)`.
    """

    sinks: int = 0
    recent: int | float = 0

    def scores(self, x: CacheView) -> Tensor:
        return key_norm(x.keys)
