"""Density peaks among the tokens of a frame, and merging into cluster centres. Pure functions; ranks carry no gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens import Reduction
from .ranking import mask_to_index, ranks


def distances(x: Tensor) -> Tensor:
    """Euclidean distances divided by sqrt(D). (..., P, D) -> (..., P, P) float32

    By a matrix product, around the mean, so that a large part which all tokens share costs no precision. Tokens nearer than
    about a thousandth of their distance from the mean, where rounding begins, have distance 0.
    """
    x = x.detach().float()
    x = x - x.mean(-2, keepdim=True)
    size = torch.linalg.vector_norm(x, dim=-1)                                                       # (..., P)
    distance = torch.cdist(x, x, compute_mode="use_mm_for_euclid_dist")
    distance = torch.maximum(distance, distance.transpose(-1, -2))                  # symmetric to the bit, as densities tie
    equal = distance <= 1e-3 * (size[..., None, :] + size[..., :, None])
    return distance.masked_fill(equal, 0) / x.shape[-1] ** 0.5


def density_peaks(distance: Tensor, among: Tensor, neighbours: int | Tensor, most: int) -> Tensor:
    """How good a cluster centre each token is: log(rho delta), -inf outside. (..., P) float32 (Rodriguez and Laio, 2014)

    rho = exp(-mean of the squared distances to the nearest `neighbours` tokens, the token itself among them), delta the
    distance to the nearest token of larger rho, or the largest distance where there is none. In logarithms, which keep the
    order where rho underflows: from squared distances of about 100 on, rho is 0 in float32, and from 14 on it is below the
    noise of 1e-6 with which FastVID's and HoliTom's code settle ties. Here of equal rho the earlier counts as larger, so of
    equal tokens the first is a centre and the others come last.

    distance (..., P, P), among (..., P) bool the tokens that take part, neighbours an int or (...) int64 up to `most`
    """
    most = min(most, distance.shape[-1])
    if isinstance(neighbours, Tensor):
        neighbours = neighbours[..., None, None]
    near = distance.masked_fill(~among[..., None, :], torch.inf)
    near = near.topk(most, dim=-1, largest=False).values                            # values alone, so ties do not matter
    counts = (torch.arange(most, device=distance.device) < neighbours) & (near < torch.inf)
    log_rho = -torch.where(counts, near.square(), 0).sum(-1) / counts.sum(-1).clamp_min(1)           # (..., P)
    order = ranks(log_rho)
    denser = (order[..., None, :] < order[..., :, None]) & among[..., None, :]
    both = among[..., None, :] & among[..., :, None]
    farthest = distance.masked_fill(~both, 0).amax((-2, -1), keepdim=True)
    delta = torch.where(denser, distance, farthest).amin(-1)
    tiny, least = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).min
    score = (delta.clamp_min(tiny).log() + log_rho).clamp_min(least)                # 0 if all are equal; still before the rest
    return score.masked_fill(~among, -torch.inf)


def first_best_of_groups(likeness: Tensor, allowed: Tensor, group: Tensor, groups: int) -> Tensor:
    """In every group of candidates the one most alike to each token, of equals the first. (B, N, C) bool

    likeness (B, N, C) float32, allowed (B, N, C) bool which candidates a token may choose, group (B, C) int64 < groups
    """
    batch, n, c = likeness.shape
    number = torch.arange(c, device=likeness.device)
    group = group[:, None].expand(batch, n, c)
    likeness = likeness.masked_fill(~allowed, -torch.inf)
    highest = likeness.new_full((batch, n, groups), -torch.inf).scatter_reduce(2, group, likeness, "amax")
    reached = allowed & (likeness == highest.gather(2, group))
    first = torch.full((batch, n, groups), c, dtype=torch.int64, device=group.device)
    first = first.scatter_reduce(2, group, torch.where(reached, number, c), "amin")
    return allowed & (first.gather(2, group) == number)


def blend(centre: Tensor, values: Tensor, member: Tensor, own: Tensor) -> Tensor:
    """own x centre + (1 - own) x mean of its members; the centre where it has none. (..., C, D) float32

    centre (..., C, D), values (..., N, D), member (..., N, C) bool, without the centres themselves; own (..., C)
    """
    count = member.sum(-2)[..., None]                                                                # (..., C, 1)
    mean = member.float().transpose(-1, -2) @ values.float() / count.clamp_min(1)
    own = torch.where(count > 0, own[..., None], 1.0)
    return own * centre.float() + (1 - own) * mean


def pick(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, N, D) at index (B, K) -> (B, K, D)"""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def slots(kept: Tensor) -> Tensor:
    """The output slot of each kept cell in reading order, -1 for the others. (B, N) bool -> (B, N) int64"""
    return torch.where(kept, kept.long().cumsum(1) - 1, -1)


def unit(x: Tensor) -> Tensor:
    """x at unit length over its last axis, float32 and without gradient; zero stays zero."""
    return F.normalize(x.detach().float(), dim=-1)


def as_reduction(tokens: Tensor, kept: Tensor, source: Tensor) -> Reduction:
    """tokens (B, k, D) for the k cells that are kept (B, N) bool, and the slot each cell went to (B, N)."""
    batch, k = tokens.shape[:2]
    counts = torch.zeros(batch, k + 1, dtype=torch.float32, device=tokens.device)
    counts = counts.scatter_add(1, source + 1, torch.ones_like(source, dtype=torch.float32))         # whole numbers: exact
    return Reduction(tokens=tokens, index=mask_to_index(kept, k), source=source, mass=counts[:, 1:])
