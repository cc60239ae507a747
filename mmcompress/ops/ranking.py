"""From scores to the k positions that stay: plain top-k, apportioned rankings, newline policies."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..tokens import ImageLayout, Places

NewlinePolicy = Literal["kept", "all", "none"]
NEWLINE_POLICIES = ("kept", "all", "none")


def check_newlines(policy: str) -> None:
    if policy not in NEWLINE_POLICIES:
        raise ValueError(f"newlines={policy!r}: one of {', '.join(NEWLINE_POLICIES)}")


def topk_in_order(scores: Tensor, k: int) -> Tensor:
    """Positions of the k largest scores, ascending; ties go to the earlier one. scores (B, N) -> (B, k) int64.

    A stable sort, since `topk` settles ties as it likes, by device and batch.
    """
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k].sort(1).values


def ranks(scores: Tensor) -> Tensor:
    """Rank of each score along the last axis, 0 for the largest; ties go to the earlier position."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, place)


def ranks_within(scores: Tensor, group: Tensor) -> Tensor:
    """Rank of each score among those of its own group, 0 for the largest. scores (B, N), group (N,) int64 >= -1.

    One stable sort by score, one by group, and the start of each group subtracted: no loop over groups.
    """
    by_score = scores.argsort(dim=1, descending=True, stable=True)                                   # (B, N)
    by_group = group[by_score].argsort(dim=1, stable=True)
    order = by_score.gather(1, by_group)                                                             # group, then score
    sorted_group = group.sort(stable=True).values
    start = torch.searchsorted(sorted_group, sorted_group)                                           # first of each group
    within = torch.arange(len(group), device=group.device) - start
    return torch.empty_like(order).scatter(1, order, within.expand_as(order))


def apportion(scores: Tensor, group: Tensor, weight: Tensor) -> Tensor:
    """One ranking over all groups that gives each its share at every length (Webster's divisor method).

    The token that is r-th within its group (from 0) is admitted at time (r + 1/2) / weight; the first k by time are
    the apportionment of k seats to parties of these weights, and a group that runs out leaves its seats to the others,
    so a clipped budget is redistributed and the total is exact without any rounding.
    Source: Sainte-Lague / Webster; its use for crop budgets is ours.

    scores (B, N), group (N,) int64 (-1: outside, never before the others), weight (B, G) float >= 0
    -> (B, N) float32 scores, higher is admitted earlier.
    """
    share = weight.index_select(1, group.clamp_min(0)).clamp_min(1e-12)                              # (B, N)
    time = (ranks_within(scores, group).float() + 0.5) / share
    return (-time).masked_fill(group < 0, -torch.inf)


def keep_with_newlines(scores: Tensor, places: Places, k: int, policy: NewlinePolicy) -> Tensor:
    """Exactly k positions by score, newline tokens paid for. scores (B, N), newlines' own scores are ignored -> (B, k).

    "kept": the longest prefix of the ranking whose tokens and newly opened rows fit; one slot may be left, and goes
    to the best token whose row is open already (or that has none). "all": every newline, then the best patches.
    "none": the best patches; newlines only where the patches run out.
    """
    if policy == "kept" and len(places.newline):
        return _keep_with_open_rows(scores, places, k)
    fill = torch.inf if policy == "all" else -torch.inf
    return topk_in_order(scores.masked_fill(~places.is_patch, fill), k)


def _keep_with_open_rows(scores: Tensor, places: Places, k: int) -> Tensor:
    batch, n = scores.shape
    lines = len(places.newline)
    has_line = places.is_patch & (places.line >= 0)
    line = torch.where(has_line, places.line, lines).expand(batch, n)                  # number `lines`: no row to open
    rank = ranks(scores.masked_fill(~places.is_patch, -torch.inf))                                   # (B, N)
    first = torch.full((batch, lines + 1), n, dtype=rank.dtype, device=rank.device)
    first = first.scatter_reduce(1, line, torch.where(has_line, rank, n), "amin")                    # (B, lines + 1)
    opens = has_line & (rank == first.gather(1, line))
    # a newline comes with its row; one whose row shows nothing (a sliver of a picture) stands for itself, ranked last
    alone = first.gather(1, places.line.clamp_min(0).expand(batch, n)) == n
    cost = torch.where(places.is_patch, 1 + opens.long(), alone.long())
    spent = torch.zeros_like(rank).scatter(1, rank, cost).cumsum(1).gather(1, rank)    # after this token, in rank order
    chosen = spent <= k
    left = k - (cost * chosen).sum(1, keepdim=True)                                                  # (B, 1): 0 or 1
    opened = torch.zeros_like(first).scatter_reduce(1, line, (chosen & has_line).long(), "amax")
    waiting = rank + n * ((opened.gather(1, line) == 0) & has_line) + 4 * n * (chosen | ~places.is_patch)
    chosen = chosen.scatter(1, waiting.argmin(1, keepdim=True), left > 0) | chosen
    newlines = torch.zeros_like(chosen).scatter(1, places.newline.expand(batch, lines), opened[:, :lines] > 0)
    return mask_to_index(chosen | newlines, k)


def mask_to_index(mask: Tensor, k: int) -> Tensor:
    """Positions of the k true entries of each row, ascending. mask (B, N) with k true a row -> (B, k) int64."""
    n = mask.shape[1]
    place = torch.arange(n, device=mask.device)
    return torch.where(mask, place, n).sort(1).values[:, :k]


def check_newline_budget(layout: ImageLayout, k: int, policy: NewlinePolicy) -> None:
    """Raise if `policy="all"` leaves no token for the picture."""
    if policy == "all" and k <= layout.newline_tokens and k < layout.tokens:
        raise ValueError(f"a budget of {k} tokens does not exceed the {layout.newline_tokens} newline tokens that "
                         f"newlines='all' keeps; raise keep, or pass newlines='kept'")
