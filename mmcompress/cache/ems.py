"""EMS (Li et al., 2024, arXiv 2412.08521): what matters to all or to the last queries stays and takes in what is like it.

No code was found, and the paper was read in its abstract and a third party's notes alone. The paper's: the score is the
larger of accumulated attention (global) and attention of a recent window (local), once their scales are aligned; each head's
best tokens are centres; every other token is merged into the centre most like it or goes to an extra class of zeros, so that
heads that evict much and heads that merge much have one shape; merges are weighted by attention and preserve the norms of keys.

Not known, and chosen: scales are aligned by the number of queries, so global and local are both what one query pays on average,
and sum to 1 over the slots; likeness is the cosine of rotated keys, and from `tau` on a token is merged; a merged key has the
direction of the weighted mean and the weighted mean of its members' norms; the weights are the Global-Local score; all that
stays is a centre, the window too. Ours: a score a KV head; the zero class is not stored, as slots in no class are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import CachePlan, Kept
from .scores import ROOM, accumulated, window_attention
from .slots import Slots, exactly, fold_into
from .view import CacheView


@dataclass(frozen=True, eq=False)
class Weighed(Kept):
    """Kept slots, and the score by which all weigh in a merge. scores (B, H_kv, N) float32"""

    scores: Tensor | None = None


@dataclass(frozen=True)
class EMS(CachePlan):
    """Keep what all queries or the last ones attend to; merge the rest into it by likeness, or drop it.

    recent  the window: its queries make the local score, and it always stays
    tau     cosine with the nearest centre from which a token is merged into it; at 1.0 next to none is, and the plan evicts
    mass    count a centre in attention as often as it has members (ours). The paper has no such term, so not by default; with
            it attention is what it was where members have equal keys and values, without it they count as one token
    """

    sinks: int = 0
    recent: int | float = 32
    tau: float = 0.6
    mass: bool = False

    accumulates: ClassVar[bool] = True
    asks_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.recent, int) or self.recent < 1:
            raise ValueError(f"recent={self.recent}: the window that makes the local score has 1 token or more (int)")
        if not -1 <= self.tau <= 1:
            raise ValueError(f"tau={self.tau}: the least cosine of keys that are merged, in [-1, 1]")

    def scores(self, x: CacheView) -> Tensor:
        assert isinstance(self.recent, int)
        everyone = accumulated(x) / x.real.sum(1).clamp_min(1)[:, None, None]
        return torch.maximum(everyone, window_attention(x, self.recent))

    def evict(self, x: CacheView, scores: Tensor) -> Kept:
        kept = super().evict(x, scores)
        return Weighed(kept.mask, kept.width, scores)

    def fold(self, x: CacheView, kept: Kept) -> Slots:
        assert isinstance(kept, Weighed) and kept.scores is not None
        index, valid = kept.index()
        likeness, centre = nearest(x.keys, index, valid)
        centre = torch.where(kept.mask, kept.mask.long().cumsum(-1) - 1, centre)                    # a centre is its own
        target = torch.where(kept.mask | (x.valid & (likeness >= self.tau)), centre, -1)
        paid = kept.scores.clamp_min(1e-12)
        weight = paid / paid.gather(2, index).gather(2, centre)                                     # 1 at a centre
        new = fold_into(replace(x.slots, bias=weight.log()), index, valid, target)
        folded = exactly(new.keys)
        of_members = lambda part: torch.zeros(index.shape, device=part.device).scatter_add(  # noqa: E731
            2, target.clamp_min(0), part * (target >= 0))                                           # sums, (B, H, K)
        norm = of_members(weight * x.keys.float().norm(dim=-1)) / of_members(weight).clamp_min(1e-20)
        scale = norm / folded.float().norm(dim=-1).clamp_min(1e-20)
        keys = (folded.float() * scale[..., None]).to(x.keys.dtype)
        bias = of_members(x.slots.mass).clamp_min(1e-20).log().masked_fill(~new.valid, 0) if self.mass else None
        return replace(new, keys=keys, bias=bias)


def nearest(keys: Tensor, index: Tensor, valid: Tensor, room: int = ROOM) -> tuple[Tensor, Tensor]:
    """The centre most like each slot, by the cosine of keys, a block of slots at a time. -> cosine, which of the K (B, H_kv, N)

    keys (B, H_kv, N, d), index (B, H_kv, K) int64: the centres, valid (B, H_kv, K) bool; room: cosines held at a time
    """
    unit = F.normalize(keys.float(), dim=-1)
    centres = unit.gather(2, index[..., None].expand(-1, -1, -1, unit.shape[-1])).transpose(2, 3)    # (B, H, d, K)
    block = max(1, room // max(1, index.numel()))
    best = [(part @ centres).masked_fill(~valid[:, :, None], -torch.inf).max(-1) for part in unit.split(block, 2)]
    return torch.cat([b.values for b in best], 2), torch.cat([b.indices for b in best], 2)
