"""Attention masks of the columns that are left at a layer, cut from the ones the stock model made for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError


@dataclass(frozen=True, eq=False)
class Columns:
    """A call's own columns at a layer: `index` (B, count) int64 into those that entered the language model, -1 padding, or
    None for all of them."""

    index: Tensor | None
    count: int
    full: bool                  # none is padding


def fit_mask(mask: Any, new: Columns, held: Any, past: int, columns: int, width: int | None, flash: bool,
             device: torch.device) -> Tensor | None:
    """The mask of a layer that sees `new` of a call's `columns`, after what it holds of the `past` cached ones.

    mask   what the stock model gives the layer: (B, 1, columns, past + columns or more) bool or additive;
           (B, past + columns) for FlashAttention; None where causality says it all
    held   the cache's record of this layer (`run.Held`), None if it holds all of the past
    width  key columns the cache will give this layer, where it has fixed room; None without a cache
    """
    if mask is None:
        return _from_nothing(new, held, past, width, flash, device)
    if not isinstance(mask, Tensor):
        raise UnsupportedModelError(f"a mask of type {type(mask).__name__} cannot be cut inside the language model; use "
                                    f"attn_implementation='sdpa', 'eager' or 'flash_attention_2'")
    mask = mask.to(device)
    if mask.ndim == 2:
        return _flat(mask, new, held, past)
    no = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    if new.index is not None:
        mask = mask.expand(len(new.index), -1, -1, -1)
        rows = new.index.clamp_min(0)[:, None, :, None]
        mask = mask.gather(2, rows.expand(-1, mask.shape[1], -1, mask.shape[3]))
    old, own = mask[..., :past], mask[..., past:past + columns]
    if held is not None:
        seen = held.valid.to(device)[:, None, None].expand(len(mask), mask.shape[1], mask.shape[2], -1)
        if mask.dtype != torch.bool:
            seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, no)
        old = torch.cat([seen, old.expand(len(seen), -1, -1, -1)[..., held.base:]], -1)
    if new.index is not None:
        keys = new.index[:, None, None].expand(-1, own.shape[1], own.shape[2], -1)
        own = own.gather(3, keys.clamp_min(0)).masked_fill(keys < 0, no)
    out = torch.cat([old, own.expand(len(old), -1, -1, -1)], -1)
    room = 0 if width is None else width - out.shape[-1]
    return torch.nn.functional.pad(out, (0, room), value=no) if room > 0 else out


def _flat(mask: Tensor, new: Columns, held: Any, past: int) -> Tensor:
    old, own = mask[:, :past], mask[:, past:]
    if held is not None:
        old = torch.cat([held.valid.to(mask.device, mask.dtype), old[:, held.base:]], 1)
    if new.index is not None:
        own = own.gather(1, new.index.clamp_min(0)).masked_fill(new.index < 0, 0)
    return torch.cat([old, own], 1)


def _from_nothing(new: Columns, held: Any, past: int, width: int | None, flash: bool, device: torch.device) -> Tensor | None:
    """Where the stock mask is plain causality: None again, unless rows have become unequal."""
    kept = past if held is None else len(held.valid[0]) + past - held.base
    causal = past == 0 or new.count == 1
    if new.full and (held is None or held.full) and causal and width in (None, kept + new.count):
        return None
    rows = len(new.index) if new.index is not None else len(held.valid)
    ones = lambda n: torch.ones(rows, n, dtype=torch.bool, device=device)  # noqa: E731
    old = ones(past) if held is None else torch.cat([held.valid.to(device), ones(past - held.base)], 1)
    valid = torch.cat([old, ones(new.count) if new.index is None else new.index >= 0], 1)   # (B, kept + count)
    if flash:
        return valid
    query = kept + torch.arange(new.count, device=device)[:, None]
    key = torch.arange(kept + new.count, device=device)
    mask = (key <= query) & valid[:, None, None]                                            # (B, 1, count, kept + count)
    room = 0 if width is None else width - mask.shape[-1]
    return torch.nn.functional.pad(mask, (0, room)) if room > 0 else mask
