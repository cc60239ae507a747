"""What a cache knows of every column that it has seen, whatever became of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .view import TAGS, Total

PADDING = "_mmcompress_padding"         # on a cache: the mask of the last call, as `attach` noted it; `static.freeze` reads it


class Timeline:
    """One for all layers of a cache.

    positions  (B, L) int64: rotary positions
    tags       (B, n) int64, n <= L or ahead of it: modalities, text where not told
    missing    (B, len(TAGS)) int64: tokens of the stock prompt that never came, since a reducer dropped them
    coming     how many columns there will be when a prompt that comes in chunks is in; 0: no more than there are
    real       (B, n) int64, 2-D mask of such a prompt; None: no padding in what is to come
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.positions: Tensor | None = None
        self.tags: Tensor | None = None
        self.missing: Tensor | None = None
        self._missing_sums: tuple[int, int] = (0, 0)
        self.coming = 0
        self.real: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.positions is None else self.positions.shape[1]

    def extend(self, positions: Tensor | None, batch: int, start: int, stop: int, device: torch.device) -> None:
        """Note the positions of the columns from start to stop, once for all layers."""
        if self.length >= stop:
            return
        if positions is None:
            positions = torch.arange(start, stop, device=device)[None]
        elif positions.ndim == 3:
            positions = positions[0]                                                                # M-RoPE: time
        new = positions.to(device).expand(batch, -1)
        self.positions = new.clone() if self.positions is None else torch.cat([self.positions, new], 1)

    def tags_of(self, batch: int, length: int, device: torch.device) -> Tensor | None:
        """(B, length) int64, rows repeated for beams; None where nobody told"""
        if self.tags is None:
            return None
        tags = _rows(self.tags.to(device), batch)[:, :length]
        return F.pad(tags, (0, length - tags.shape[1]))

    def miss(self, counts: Tensor) -> None:
        """Count tokens that reducers dropped before the language model. counts (B, len(TAGS)) int64, see `TAGS`"""
        if counts.ndim != 2 or counts.shape[1] != len(TAGS) or counts.is_floating_point() or bool((counts < 0).any()):
            raise ValueError(f"counts {tuple(counts.shape)} {counts.dtype}: whole numbers of tokens (rows, {len(TAGS)}), none "
                             f"below 0, in the order {', '.join(TAGS)}")
        counts = counts.long().cpu()
        if self.missing is not None:
            rows = max(len(counts), len(self.missing))
            counts = _rows(self.missing.cpu(), rows) + _rows(counts, rows)
        self.missing = counts
        sums = self.missing.sum(1)
        self._missing_sums = int(sums.min()), int(sums.max())

    def beyond(self, batch: int, length: int, device: torch.device) -> Total:
        """What budgets count besides the columns so far."""
        more = max(0, self.coming - length)
        if not more and self.missing is None:
            return Total()
        counts = torch.zeros(batch, len(TAGS), dtype=torch.long, device=device)
        if self.missing is not None:
            counts += _rows(self.missing.to(device), batch)
        if more:
            tags = self.tags_of(batch, self.coming, device)
            later = torch.zeros(batch, more, dtype=torch.long, device=device) if tags is None else tags[:, length:]
            there = torch.ones_like(later) if self.real is None else _rows(self.real.to(device), batch)[:, length:].long()
            counts = counts.scatter_add(1, later, there)
        least = self._missing_sums[0] + (more if self.real is None else 0)
        return Total(counts, least, self._missing_sums[1] + more)

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Choose or repeat rows."""
        if self.positions is None:
            return
        rows = len(self.positions)
        self.positions = change(self.positions)
        self.tags, self.missing, self.real = (None if x is None else change(_rows(x, rows).to(self.positions.device))
                                              for x in (self.tags, self.missing, self.real))

    def crop(self, length: int) -> None:
        if self.positions is not None:
            self.positions = self.positions[:, :length]
        if self.tags is not None:
            self.tags = self.tags[:, :length]
        self.coming = min(self.coming, length)

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.positions, self.tags, self.missing, self.real) if x is not None]


def _rows(x: Tensor, batch: int) -> Tensor:
    """Rows repeated for beams and samples. (B, ..) -> (batch, ..)"""
    return x if len(x) == batch else x.repeat_interleave(batch // len(x), 0)
