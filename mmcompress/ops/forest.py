"""Merging over a forest: every node points to an earlier one, so cutting any r edges leaves exactly r trees more.

That is what makes a budget exact without a loop: of N nodes with one parent each, keep the K best as roots and every
other node joins the tree of its parent. Trees are found by pointer doubling in log2(N) gathers; nothing waits for data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def roots_of(parent: Tensor, is_root: Tensor) -> Tensor:
    """The root of each node's tree. parent (B, N) int64, not later than the node itself; is_root (B, N) bool -> (B, N) int64"""
    n = parent.shape[1]
    up = torch.where(is_root, torch.arange(n, device=parent.device), parent)
    for _ in range(max(1, math.ceil(math.log2(max(n, 2))))):
        up = up.gather(1, up)
    return up


def merge_trees(features: Tensor, parent: Tensor, roots: Tensor, worth: Tensor | None = None
                ) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of each tree. features (B, N, D), parent (B, N), roots (B, K) int64

    worth   (B, K) bool: which of the roots stand, the first always and the others before those that do not; None: all of them

    -> tokens (B, K, D), source (B, N) int64 the tree of each node, mass (B, K) float32. Sums are float32.
    """
    (batch, n, width), k = features.shape, roots.shape[1]
    device = features.device
    slots = torch.arange(k, device=device).expand(batch, k)
    if worth is not None:                                       # what does not stand repeats the first root
        roots, slots = torch.where(worth, roots, roots[:, :1]), torch.where(worth, slots, 0)
    is_root = torch.zeros(batch, n, dtype=torch.bool, device=device).scatter(1, roots, True)
    slot_of = torch.zeros(batch, n, dtype=torch.int64, device=device).scatter(1, roots, slots)
    source = slot_of.gather(1, roots_of(parent, is_root))                                            # (B, N)
    mass = torch.zeros(batch, k, dtype=torch.float32, device=device).scatter_add(
        1, source, torch.ones(batch, n, dtype=torch.float32, device=device))
    sums = torch.zeros(batch, k, width, dtype=torch.float32, device=device).scatter_add(
        1, source[..., None].expand(-1, -1, width), features.float())
    return (sums / mass.clamp_min(1)[..., None]).to(features.dtype), source, mass
