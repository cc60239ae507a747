"""StreamingLLM (Xiao et al., ICLR 2024, arXiv 2309.17453): attention sinks and the most recent tokens.

The paper numbers positions within the cache anew at every step, to stream beyond a model's trained length; here tokens keep the
positions they had, as in every method of this package.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .plan import CachePlan
from .view import CacheView


@dataclass(frozen=True)
class StreamingLLM(CachePlan):
    """Keep the first `sinks` tokens and fill the budget with the last ones.

    `every=1` holds a budget in tokens while decoding too, as the paper does.
    """

    sinks: int = 4
    recent: int | float = 0

    def scores(self, x: CacheView) -> Tensor:
        return x.slots.column.float()
