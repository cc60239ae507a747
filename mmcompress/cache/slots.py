"""What one layer of a compressed cache holds: slots, each a key and a value with what is known about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Slots:
    """N slots a head. Heads may hold different ones; a head that holds fewer has slots that are not valid.

    keys    (B, H_kv, N, d), rotated as the model rotated them
    values  (B, H_kv, N, d_v)
    column  (B, H_kv, N) int64: which token of all that the cache has seen, padding counted; rises along the valid slots
    valid   (B, H_kv, N) bool: False is padding, or a head's missing slot
    bias    (B, H_kv, N) float32, the logarithm of how many tokens a slot stands for, added to its logit; None: one each
    """

    keys: Tensor
    values: Tensor
    column: Tensor
    valid: Tensor
    bias: Tensor | None = None

    @property
    def count(self) -> int:
        return self.keys.shape[2]

    @property
    def mass(self) -> Tensor:
        """How many tokens each slot stands for. (B, H_kv, N) float32, 0 where not valid"""
        mass = torch.ones_like(self.valid, dtype=torch.float32) if self.bias is None else self.bias.exp()
        return mass.masked_fill(~self.valid, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, the values and all that is noted about them."""
        parts = (self.keys, self.values, self.column, self.valid, self.bias)
        return sum(x.numel() * x.element_size() for x in parts if x is not None)

    def take(self, index: Tensor, valid: Tensor) -> Slots:
        """Some slots of each head. index (B, H_kv, K) int64, valid (B, H_kv, K) bool: which of the K there are"""
        wide = lambda x: x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))  # noqa: E731
        bias = None if self.bias is None else self.bias.gather(2, index)
        there = self.valid.gather(2, index) & valid
        return Slots(wide(self.keys), wide(self.values), self.column.gather(2, index), there, bias)

    def append(self, other: Slots) -> Slots:
        """These slots, then the other's."""
        bias = None
        if self.bias is not None or other.bias is not None:
            bias = torch.cat([_bias(self), _bias(other)], 2)
        both = {n: torch.cat([getattr(self, n), getattr(other, n)], 2) for n in ("keys", "values", "column", "valid")}
        return Slots(**both, bias=bias)

    def each(self, change: Callable[[Tensor], Tensor]) -> Slots:
        """The same change to every tensor: of rows, or of the slots in front."""
        bias = None if self.bias is None else change(self.bias)
        return replace(self, keys=change(self.keys), values=change(self.values), column=change(self.column),
                       valid=change(self.valid), bias=bias)


def _bias(slots: Slots) -> Tensor:
    return torch.zeros_like(slots.valid, dtype=torch.float32) if slots.bias is None else slots.bias


def slots_of(keys: Tensor, values: Tensor, start: int = 0) -> Slots:
    """One slot for every token of a stretch that begins at column `start`. keys, values (B, H_kv, N, d)"""
    column = torch.arange(start, start + keys.shape[2], device=keys.device).expand(keys.shape[:3])
    return Slots(keys, values, column, torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device))


def fold_into(slots: Slots, index: Tensor, valid: Tensor, target: Tensor) -> Slots:
    """Kept slots that take in others: means by mass of keys and values, and the logarithm of the summed mass.

    Attention over the result is attention over all of its members where a slot's members have equal keys, whatever their
    values: sum_i e^(q k) v_i = n e^(q k) mean(v).

    index   (B, H_kv, K) int64: the slots that stay, valid (B, H_kv, K) which of them there are
    target  (B, H_kv, N) int64: which of the K each slot goes into, -1 for those that are dropped; for those that stay their
            own. A slot keeps the column of the one that stays.
    """
    kept = slots.take(index, valid)
    to = target.clamp_min(0)
    part = slots.mass * (target >= 0)                                                               # (B, H, N)
    total = torch.zeros(index.shape, device=part.device).scatter_add(2, to, part)                   # (B, H, K)

    def mean(x: Tensor) -> Tensor:
        weighted = x.float() * part[..., None]
        out = torch.zeros(*index.shape, x.shape[-1], device=x.device)
        out = out.scatter_add(2, to[..., None].expand_as(weighted), weighted)
        return (out / total.clamp_min(1e-20)[..., None]).to(x.dtype)

    bias = total.clamp_min(1e-20).log().masked_fill(~kept.valid, 0)
    return replace(kept, keys=mean(slots.keys), values=mean(slots.values), bias=bias)
