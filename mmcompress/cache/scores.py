"""Attention that a prompt's tokens pay the slots, without the map of all of them. Plain references for fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .view import CacheView

ROOM = 2**24            # logits held at a time where all tokens of a prompt ask


def window_attention(x: CacheView, window: int) -> Tensor:
    """What the last `window` queries pay each slot, averaged over them and the group's heads. (B, H_kv, N) float32

    Padding does not ask: a row that has fewer real tokens averages over those it has.
    """
    rows, there = x.last_queries(window)
    paid = x.probabilities(rows) * there[:, None, None, :, None]                                    # (B, H, G, w, N)
    return paid.mean(2).sum(2) / there.sum(1).clamp_min(1)[:, None, None]


def column_sums(x: CacheView, room: int = ROOM) -> Tensor:
    """What all the call's queries pay each slot, summed over them and averaged over the group's heads. (B, H_kv, N) float32

    Exact, in tiles of as many queries as make about `room` logits, so memory is linear in the prompt.
    """
    batch, kv_heads, groups, length, _ = x.queries.shape
    tile = max(1, room // (batch * kv_heads * groups * x.slots.count))
    total = torch.zeros(batch, kv_heads, x.slots.count, dtype=torch.float32, device=x.keys.device)
    for at in range(0, length, tile):
        rows = torch.arange(at, min(at + tile, length), device=total.device).expand(batch, -1)
        asked = x.asking[:, None, None, at:at + tile, None]
        total = total + (x.probabilities(rows) * asked).mean(2).sum(2)
    return total
