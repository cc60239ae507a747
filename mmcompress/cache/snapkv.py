"""SnapKV (Li et al., NeurIPS 2024, arXiv 2404.14469): what the end of the prompt looks at, pooled over neighbours.

The paper's: a window of last queries votes, votes are pooled, the window itself always stays. Its code's: average pooling of
kernel 5 (the paper speaks of maximum too), the window's own columns take no part in pooling. Ours: one vote for the query heads
that share a key head (the code repeats keys first and keeps a choice for each query head); padding does not vote.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.kv_keys import Pool, pool_scores
from .plan import CachePlan
from .scores import window_attention
from .view import CacheView


@dataclass(frozen=True)
class SnapKV(CachePlan):
    """Keep the tokens that the last `recent` ones look at.

    recent  the window: its queries vote, and it always stays
    kernel  votes are pooled over so many neighbours, an odd number
    pooling "avg", or "max", which the paper's text speaks of
    """

    sinks: int = 0
    recent: int | float = 32
    kernel: int = 5
    pooling: Pool = "avg"

    asks_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.recent, int) or self.recent < 1:
            raise ValueError(f"recent={self.recent}: the window that votes has 1 token or more (int)")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: votes are averaged over an odd number of neighbours; 1: over none")

        if self.pooling not in ("avg", "max"):
            raise ValueError(f"pooling={self.pooling!r}: 'avg' or 'max'")

    def scores(self, x: CacheView) -> Tensor:
        assert isinstance(self.recent, int)
        order = x.valid.long().cumsum(-1)
        outside = x.valid & (order <= order[..., -1:] - self.recent)
        votes = window_attention(x, self.recent)                                                    # (B, H, N)
        if x.sight.mask is None and x.slots.count == x.real.shape[1]:                               # no slot is missing
            pooled = pool_scores(votes, self.kernel, self.pooling, outside)
        else:                                               # neighbours are those that are there
            close = (~x.valid).long().argsort(dim=-1, stable=True)
            pooled = pool_scores(votes.gather(2, close), self.kernel, self.pooling, outside.gather(2, close))
            pooled = pooled.gather(2, close.argsort(dim=-1))
        return pooled.masked_fill(~outside, torch.inf)
