"""Random numbers that depend on a seed and a position alone: alike on every device, in every batch, for every length."""

from __future__ import annotations

import torch
from torch import Tensor


def hashed(position: Tensor, seed: int) -> Tensor:
    """An integer hash, 31 bits wide, of positions (n,) int64 under a seed. -> (n,) int64"""
    draw = position + (seed * 0x9E3779B9 & 0x7FFFFFFF)
    for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 0x297A2D39)):
        draw = ((draw ^ (draw >> shift)) * factor) & 0x7FFFFFFF
    return draw


def random_order(n: int, seed: int, device: torch.device) -> Tensor:
    """Scores (n,) int64 without ties."""
    place = torch.arange(n, device=device)
    return hashed(place, seed) * n + place
