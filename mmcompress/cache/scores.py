"""Attention that tokens pay the slots, without the map of all of them.

Where the mask says no more than causality and padding, by `ops.kv_scores`: one tile at a time, fused on a GPU. Under any other
mask (blocks of pictures, a mask the caller gave) and after another plan of a chain, by the layer's own attention in tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import kv_scores
from .view import CacheView

ROOM = 2**24            # logits held at a time where all tokens of a prompt ask


def accumulated(x: CacheView) -> Tensor:
    """What all queries so far have paid each slot, averaged over the group's heads. (B, H_kv, N) float32

    The cache gathers it for plans that say `accumulates`; where it did not, this call's queries are all that there were.
    """
    return column_sums(x) if x.slots.evidence is None else x.slots.evidence


def window_attention(x: CacheView, window: int) -> Tensor:
    """What the last `window` queries pay each slot, averaged over them and the group's heads. (B, H_kv, N) float32

    Padding does not ask: a row that has fewer real tokens averages over those it has.
    """
    length = x.queries.shape[3]
    plain, left = _plain(x)
    if plain and left:                                      # the last queries are the last in memory
        asking = x.asking[:, -window:]
        paid = _fused(x, max(0, length - window), asking)
        return paid / asking.sum(1).clamp_min(1)[:, None, None]
    rows, there = x.last_queries(window)
    each = x.probabilities(rows) * there[:, None, None, :, None]                                    # (B, H, G, w, N)
    return each.mean(2).sum(2) / there.sum(1).clamp_min(1)[:, None, None]


def column_sums(x: CacheView, room: int = ROOM) -> Tensor:
    """What all the call's queries pay each slot, summed over them and averaged over the group's heads. (B, H_kv, N) float32

    Exact, and memory is linear in the prompt. room: logits that are held at a time under an unusual mask
    """
    if _plain(x)[0]:
        return _fused(x, 0, x.asking)
    batch, kv_heads, groups, length, _ = x.queries.shape
    tile = max(1, room // (batch * kv_heads * groups * x.slots.count))
    total = torch.zeros(batch, kv_heads, x.slots.count, dtype=torch.float32, device=x.keys.device)
    for at in range(0, length, tile):
        rows = torch.arange(at, min(at + tile, length), device=total.device).expand(batch, -1)
        asked = x.asking[:, None, None, at:at + tile, None]
        total = total + (x.probabilities(rows) * asked).mean(2).sum(2)
    return total


def _plain(x: CacheView) -> tuple[bool, bool]:
    """Whether queries see exactly the slots before them in memory, and whether padding is in front of a row's tokens."""
    if not x.intact or x.softcap is not None or x.queries.dtype not in kv_scores.DTYPES:
        return False, False
    return x.sight.kind(x.queries.shape[3])


def _fused(x: CacheView, start: int, asking: Tensor) -> Tensor:
    """Column sums of the queries from `start` on, the group's heads averaged. asking (B, Q - start) bool"""
    valid = None if x.sight.mask is None and x.slots.bias is None and x.slots.count == x.real.shape[1] else x.valid
    return kv_scores.column_sums(x.queries[:, :, :, start:].flatten(1, 2), x.keys, valid=valid, bias=x.slots.bias,
                                 weights=None if valid is None else asking, heads="mean", scale=x.scaling)
