"""What one layer of a compressed cache holds: slots, each a key and a value with what is known about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

Heads = tuple[int, ...]


class Stored(Protocol):
    """Keys or values (B, H_kv, N, d) in another form than a tensor: few bits, low rank, shared between layers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H_kv, N, d)"""
        ...

    def restore(self, dtype: torch.dtype) -> Tensor:
        """(B, H_kv, N, d), as attention reads them."""
        ...

    def tensors(self) -> Iterator[Tensor]:
        """All that is held: the bytes are theirs, once where several stores hold the same memory."""
        ...

    def each(self, change: Callable[[Tensor], Tensor]) -> Stored:
        """The same change to the rows (dimension 0) of all that is held."""
        ...


@dataclass(frozen=True, eq=False)
class Slots:
    """N slots a head. Heads may hold different ones; a head that holds fewer has slots that are not valid.

    keys      (B, H_kv, N, d), rotated as the model rotated them; a tensor, or `Stored`
    values    (B, H_kv, N, d_v), likewise
    column    (B, H_kv, N) int32: which token of all that the cache has seen, padding counted; rises along the valid slots
    valid     (B, H_kv, N) bool: False is padding, or a head's missing slot
    bias      (B, H_kv, N) float32, the logarithm of how many tokens a slot stands for, added to its logit; None: one each
    evidence  (B, H_kv, N) float32, attention received so far, summed over queries, where a plan gathers it; None: it does not
    heads     the key heads of the layer that these slots are for, H_kv of them; None: all
    """

    keys: Tensor | Stored
    values: Tensor | Stored
    column: Tensor
    valid: Tensor
    bias: Tensor | None = None
    evidence: Tensor | None = None
    heads: Heads | None = None

    @property
    def count(self) -> int:
        return self.column.shape[2]

    @property
    def exact(self) -> bool:
        """Whether keys and values are tensors."""
        return isinstance(self.keys, Tensor) and isinstance(self.values, Tensor)

    @property
    def mass(self) -> Tensor:
        """How many tokens each slot stands for. (B, H_kv, N) float32, 0 where not valid"""
        mass = torch.ones_like(self.valid, dtype=torch.float32) if self.bias is None else self.bias.exp()
        return mass.masked_fill(~self.valid, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, the values and all that is noted about them."""
        return bytes_of(self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        for x in (self.keys, self.values, self.column, self.valid, self.bias, self.evidence):
            if isinstance(x, Tensor):
                yield x
            elif x is not None:
                yield from x.tensors()

    def dense(self, dtype: torch.dtype) -> Slots:
        """The same slots with tensors for keys and values."""
        return self if self.exact else replace(self, keys=tensor(self.keys, dtype), values=tensor(self.values, dtype))

    def take(self, index: Tensor, valid: Tensor) -> Slots:
        """Some slots of each head. index (B, H_kv, K) int64, valid (B, H_kv, K) bool: which of the K there are"""
        wide = lambda x: exactly(x).gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))  # noqa: E731
        some = lambda x: None if x is None else x.gather(2, index)  # noqa: E731
        return replace(self, keys=wide(self.keys), values=wide(self.values), column=self.column.gather(2, index),
                       valid=self.valid.gather(2, index) & valid, bias=some(self.bias), evidence=some(self.evidence))

    def append(self, other: Slots) -> Slots:
        """These slots, then the other's."""
        if self.count == 0:
            return other
        return replace(self, keys=torch.cat([exactly(self.keys), exactly(other.keys)], 2),
                       values=torch.cat([exactly(self.values), exactly(other.values)], 2),
                       column=torch.cat([self.column, other.column], 2), valid=torch.cat([self.valid, other.valid], 2),
                       bias=_both(self.bias, other.bias, self, other),
                       evidence=_both(self.evidence, other.evidence, self, other))

    def each(self, change: Callable[[Tensor], Tensor]) -> Slots:
        """The same change to the rows of everything."""
        held = lambda x: change(x) if isinstance(x, Tensor) else x.each(change)  # noqa: E731
        noted = lambda x: None if x is None else change(x)  # noqa: E731
        return replace(self, keys=held(self.keys), values=held(self.values), column=change(self.column),
                       valid=change(self.valid), bias=noted(self.bias), evidence=noted(self.evidence))

    def first(self, n: int) -> Slots:
        """The n slots in front. A view of the memory."""
        some = lambda x: None if x is None else x[:, :, :n]  # noqa: E731
        return replace(self, keys=exactly(self.keys)[:, :, :n], values=exactly(self.values)[:, :, :n],
                       column=self.column[:, :, :n], valid=self.valid[:, :, :n], bias=some(self.bias),
                       evidence=some(self.evidence))

    def of_heads(self, heads: Heads | None, index: Tensor | None = None) -> Slots:
        """The slots of some key heads, out of those of all. index: the heads as a tensor on the device, where there is one"""
        if heads is None:
            return self
        index = torch.tensor(heads, device=self.valid.device) if index is None else index
        some = lambda x: None if x is None else x.index_select(1, index)  # noqa: E731
        return Slots(exactly(self.keys).index_select(1, index), exactly(self.values).index_select(1, index),
                     self.column.index_select(1, index), self.valid.index_select(1, index), some(self.bias),
                     some(self.evidence), heads)


def exactly(x: Tensor | Stored) -> Tensor:
    """Keys or values that must be a tensor; TypeError where they are stored in another form."""
    if not isinstance(x, Tensor):
        raise TypeError(f"slots stored as {type(x).__name__} are read, not changed; restore them with dense(dtype) first")
    return x


def tensor(x: Tensor | Stored, dtype: torch.dtype) -> Tensor:
    """Keys or values as attention reads them."""
    return x if isinstance(x, Tensor) else x.restore(dtype)


def bytes_of(tensors: Iterator[Tensor]) -> int:
    """Bytes of tensors, those that are the same memory once. Of a view what it shows."""
    return sum({(x.data_ptr(), x.numel() * x.element_size()): x.numel() * x.element_size() for x in tensors}.values())


def _both(a: Tensor | None, b: Tensor | None, first: Slots, second: Slots) -> Tensor | None:
    """What is noted of two stretches; 0 where it is noted of one alone."""
    if a is None and b is None:
        return None
    return torch.cat([torch.zeros_like(s.valid, dtype=torch.float32) if x is None else x
                      for x, s in ((a, first), (b, second))], 2)


def slots_of(keys: Tensor, values: Tensor, start: int = 0) -> Slots:
    """One slot for every token of a stretch that begins at column `start`. keys, values (B, H_kv, N, d)"""
    column = torch.arange(start, start + keys.shape[2], device=keys.device, dtype=torch.int32).expand(keys.shape[:3])
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
    summed = lambda x: torch.zeros(index.shape, device=x.device).scatter_add(2, to, x)  # noqa: E731
    total = summed(part)                                                                            # (B, H, K)

    def mean(x: Tensor) -> Tensor:
        weighted = x.float() * part[..., None]
        out = torch.zeros(*index.shape, x.shape[-1], device=x.device)
        out = out.scatter_add(2, to[..., None].expand_as(weighted), weighted)
        return (out / total.clamp_min(1e-20)[..., None]).to(x.dtype)

    bias = total.clamp_min(1e-20).log().masked_fill(~kept.valid, 0)
    evidence = None if slots.evidence is None else summed(slots.evidence * (target >= 0) * slots.valid)
    return replace(kept, keys=mean(exactly(slots.keys)), values=mean(exactly(slots.values)), bias=bias, evidence=evidence)
