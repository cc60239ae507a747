"""Averaging tokens over the cells of a partition that is known from the layout alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def even_split(total: int, parts: int) -> list[int]:
    """`total` cut into `parts` integers that differ by at most one, the larger ones spread evenly."""
    edges = [total * i // parts for i in range(parts + 1)]
    return [b - a for a, b in pairwise(edges)]


def grid_cells(rows: int, columns: int, widths: list[int]) -> list[list[int]]:
    """Partition a rows x columns grid into len(widths) bands, band i into widths[i] cells; the cell of every place.

    Bands and cells are contiguous and as even as integers allow; cells are numbered in reading order.
    """
    band_of = [i for i, size in enumerate(even_split(rows, len(widths))) for _ in range(size)]
    first = [sum(widths[:i]) for i in range(len(widths))]
    return [[first[band] + column * widths[band] // columns for column in range(columns)] for band in band_of]


def average_by_slot(features: Tensor, slot: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mean of the tokens of each slot. features (B, N, D), slot (N,) int64 in [0, k), -1 dropped -> (B, k, D), (k,) mass.

    Sums are float32, in time and memory of N, whatever k is.
    """
    batch, _, width = features.shape
    place = torch.where(slot < 0, k, slot)
    mass = torch.zeros(k + 1, dtype=torch.float32, device=features.device).index_add(
        0, place, torch.ones_like(place, dtype=torch.float32))[:k]
    sums = torch.zeros(batch, k + 1, width, dtype=torch.float32, device=features.device)
    mean = sums.index_add(1, place, features.float())[:, :k] / mass.clamp_min(1)[:, None]
    return mean.to(features.dtype), mass


Slots = Callable[..., tuple[list[int], list[int]]]


def slots_on_device(slots: Slots, device: torch.device, *args: Any) -> tuple[Tensor, Tensor]:
    """What `slots(*args)` says of a partition, slot of each token and index of each slot, as tensors; copied once a device."""
    if torch.compiler.is_compiling():
        slot, index = slots(*args)
        return torch.tensor(slot, device=device), torch.tensor(index, device=device)
    return _cached(slots, device, *args)


@lru_cache(maxsize=256)
def _cached(slots: Slots, device: torch.device, *args: Any) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):                   # a cached inference tensor could never serve a training step
        slot, index = slots(*args)
        return torch.tensor(slot, device=device), torch.tensor(index, device=device)
