"""MiKV (Yang et al., 2024, arXiv 2402.18096): no token is dropped; the less important ones are held in few bits.

Read from accounts of the paper; no code of the authors was found. The paper's: a share r = 0.2 of the tokens, half of it the
most recent and the rest by accumulated attention (H2O's; SnapKV's works too), stays in high precision. The others are rounded
to nearest on an asymmetric grid for each token (Eq. 1), in groups of half a head's channels, which no group straddles as rotary
embeddings turn the halves. Keys are balanced first (Eq. 2): each channel is multiplied by sqrt(max |q| / max |k|), seen at the
prefill and frozen, and queries are divided by it. Values are not balanced.

Ours: a KV head has one balancer and one choice of tokens; scales and offsets are float16. While decoding (`every=`), or where a
prompt comes in chunks (`again=`), all slots are ranked anew; one that comes up from the low tier stays as coarse as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..budget import keep_count
from ..ops.kv_quant import BITS, balancer
from .parts import Parts
from .plan import CachePlan, Keep, Kept, admit, budget
from .scores import accumulated
from .slots import Slots
from .stores import in_bits
from .view import CacheView


@dataclass(frozen=True)
class MiKV(CachePlan):
    """Hold the important tokens exactly and the others in few bits.

    keep       1.0, as nothing is dropped; less drops the least important, as H2O does
    high       so many tokens stay exact, or that share of the tokens that are kept
    recent     of these, so many last tokens, or that share of them
    bits       of the others: 8, 4 or 2
    high_bits  16: the high tier stays exact; 8, 4 or 2: it is rounded too, and tokens that come later are exact
    group      channels that share a grid; None: half a head's
    balance    multiply keys by the balancer first
    """

    keep: Keep = 1.0
    sinks: int = 0
    recent: int | float = 0.5
    high: int | float = 0.2
    bits: int = 2
    high_bits: int = 16
    group: int | None = None
    balance: bool = True

    accumulates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in BITS or self.high_bits not in (16, *BITS) or self.high_bits < self.bits:
            raise ValueError(f"bits={self.bits}, high_bits={self.high_bits}: bits are 8, 4 or 2; high_bits 16 (exact), 8, 4 or "
                             f"2, and no fewer than bits")
        if isinstance(self.high, bool) or self.high < 0 or (isinstance(self.high, float) and self.high > 1):
            raise ValueError(f"high={self.high}: how many tokens stay in high precision (int), or a share (float in [0, 1])")

    def scores(self, x: CacheView) -> Tensor:
        return accumulated(x)

    def store(self, x: CacheView) -> Slots | Parts:
        n = x.slots.count
        most = min(n, keep_count(n, self.high) if self.high else 0)
        if most == n and self.high_bits == 16:
            return x.slots
        there = x.valid.sum(-1, keepdim=True)                                                       # (B, H, 1)
        count = budget(there.flatten(), self.high).view_as(there) if self.high else torch.zeros_like(there)
        forced = self.forced(x.valid, count)
        forced_most = self.sinks + (self.recent if isinstance(self.recent, int) else int(most * self.recent + 1e-9))
        mask = admit(accumulated(x), x.valid, forced, count)
        high = Kept(mask, max(most, forced_most, 1))
        # every head has as many slots in the low tier as the one that needs most
        low = Kept(x.valid & ~mask, n - min(most, n))
        balance = self._balancer(x)
        parts = [self._rounded(x.slots.take(*low.index()), self.bits, balance)] if n > most else []
        top = x.slots.take(*high.index())
        if self.high_bits == 16:
            return (*parts, top)
        return (*parts, self._rounded(top, self.high_bits, balance))

    def _balancer(self, x: CacheView) -> Tensor | None:
        """Of a row's first prompt, and what it was ever after."""
        if not self.balance:
            return None
        queries = x.queries.masked_fill(~x.asking[:, None, None, :, None], 0).flatten(1, 2)
        new = balancer(queries, x.keys.masked_fill(~x.valid[..., None], 0))
        if x.balance is None:
            return new
        held = (x.valid & (x.slots.column < x.sight.start)).any(-1)     # not where all chunks so far were padding
        return torch.where(held[..., None, None], x.balance, new)

    def _rounded(self, slots: Slots, bits: int, balance: Tensor | None) -> Slots:
        keys: Any = in_bits(slots.keys, bits, self.group, balance)  # type: ignore[arg-type]
        values: Any = in_bits(slots.values, bits, self.group)  # type: ignore[arg-type]
        return replace(slots, keys=keys, values=values)
