"""What a layer holds, in parts: slots of some heads, or of one precision. One key head's parts together are its slots.

The parts of a head follow one another; the newest tokens are in the last, which is exact (tensors), or there is none yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .slots import Heads, Slots, exactly

Parts = tuple[Slots, ...]


def as_parts(held: Slots | Parts) -> Parts:
    """What a plan returns, as parts, those that hold nothing left out."""
    return (held,) if isinstance(held, Slots) else tuple(part for part in held if part.count)


def by_heads(parts: Parts) -> dict[Heads | None, Parts]:
    """The parts of each group of heads, in order."""
    return {heads: tuple(p for p in parts if p.heads == heads) for heads in dict.fromkeys(p.heads for p in parts)}


def last_parts(parts: Parts) -> tuple[int, ...]:
    """Where each group's last part is, the one that new tokens go to."""
    return tuple({part.heads: i for i, part in enumerate(parts)}.values())


def grown(parts: Parts, new: Slots, index: Mapping[Heads | None, Tensor] | None = None) -> Parts:
    """The parts with new tokens of all heads at the end of each head's last. index: each group's heads, as tensors"""
    out = list(parts)
    for i in last_parts(parts):
        own = new.of_heads(out[i].heads, None if index is None else index[out[i].heads])
        if out[i].exact:
            out[i] = out[i].append(own)
        else:
            out.append(own)
    return tuple(out)


def joined(parts: Parts, dtype: torch.dtype) -> Slots:
    """One group's parts in one, exact; as they follow one another, so columns may not rise."""
    out = parts[0].dense(dtype)
    for part in parts[1:]:
        out = out.append(part.dense(dtype))
    return out


def in_one(parts: Parts, dtype: torch.dtype) -> Slots:
    """All heads' slots in one, exact, in the order of their columns. Heads that hold fewer have missing slots in front."""
    groups = [ordered(joined(own, dtype)) if len(own) > 1 else own[0].dense(dtype) for own in by_heads(parts).values()]
    if len(groups) == 1 and groups[0].heads is None:
        return groups[0]
    most = max(group.count for group in groups)
    heads = [head for group in groups for head in group.heads or ()]
    order = torch.tensor(sorted(range(len(heads)), key=heads.__getitem__), device=groups[0].column.device)
    padded = [_in_front(group, most - group.count) for group in groups]

    def one(name: str) -> Tensor:
        return torch.cat([getattr(group, name) for group in padded], 1)[:, order]

    def noted(name: str) -> Tensor | None:
        if all(getattr(group, name) is None for group in padded):
            return None
        return torch.cat([torch.zeros_like(group.valid, dtype=torch.float32) if getattr(group, name) is None
                          else getattr(group, name) for group in padded], 1)[:, order]

    return Slots(one("keys"), one("values"), one("column"), one("valid"), noted("bias"), noted("evidence"))


def ordered(slots: Slots) -> Slots:
    """The same slots with rising columns, those that are missing in front."""
    order = slots.column.masked_fill(~slots.valid, -1).argsort(dim=2, stable=True)
    return slots.take(order, torch.ones_like(slots.valid))


def split(slots: Slots, groups: tuple[tuple[Heads, int], ...]) -> Parts:
    """Slots of all heads, ragged, as a part for each group of heads with no more slots than its longest head.

    groups  the heads of each group, and how many slots none of its heads exceeds
    """
    parts = []
    for heads, width in groups:
        own = slots.of_heads(heads)
        if width < own.count:
            place = torch.arange(own.count, device=own.valid.device)
            index = torch.where(own.valid, place, -1).sort(-1).values[..., -width:]                 # the valid ones are last
            own = own.take(index.clamp_min(0), index >= 0)
        parts.append(own)
    return tuple(parts)


def _in_front(slots: Slots, n: int) -> Slots:
    """Slots with n missing ones before them."""
    if n == 0:
        return slots
    wide, flat = (0, 0, n, 0), (n, 0)
    noted = lambda x: None if x is None else F.pad(x, flat)  # noqa: E731
    return replace(slots, keys=F.pad(exactly(slots.keys), wide), values=F.pad(exactly(slots.values), wide),
                   column=F.pad(slots.column, flat), valid=F.pad(slots.valid, flat), bias=noted(slots.bias),
                   evidence=noted(slots.evidence))
