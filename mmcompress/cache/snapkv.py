"""SnapKV (Li et al., NeurIPS 2024, arXiv 2404.14469): what the end of the prompt looks at, pooled over neighbours.

The paper's: a window of last queries votes, votes are pooled, the window itself always stays. Its code's: average pooling of
kernel 5 (the paper speaks of maximum too), the window's own columns take no part in pooling. Ours: one vote for the query heads
that share a key head (the code repeats keys first and keeps a choice for each query head); padding does not vote.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import CachePlan
from .scores import window_attention
from .view import CacheView


@dataclass(frozen=True)
class SnapKV(CachePlan):
    """Keep the tokens that the last `recent` ones look at.

    recent  the window: its queries vote, and it always stays
    kernel  votes are averaged over so many neighbours, an odd number
    """

    sinks: int = 0
    recent: int | float = 32
    kernel: int = 5

    asks_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.recent, int) or self.recent < 1:
            raise ValueError(f"recent={self.recent}: the window that votes has 1 token or more (int)")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: votes are averaged over an odd number of neighbours; 1: over none")

    def scores(self, x: CacheView) -> Tensor:
        assert isinstance(self.recent, int)
        order = x.valid.long().cumsum(-1)
        outside = x.valid & (order <= order[..., -1:] - self.recent)
        votes = window_attention(x, self.recent).masked_fill(~outside, 0)                           # (B, H, N)
        pooled = F.avg_pool1d(votes, self.kernel, 1, self.kernel // 2)
        return pooled.masked_fill(~outside, torch.inf)
