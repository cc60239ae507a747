"""What compressing a cache saved and what it took, kept apart from the cache: it outlives it and holds no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..report import Stopwatch


@dataclass(frozen=True)
class LayerTally:
    """One layer after it was compressed.

    seen          tokens that have come in, padding included
    slots         slots that its longest head has memory for
    nbytes        bytes held: keys, values, scales, columns, validity, masses
    stock_nbytes  bytes of the stock cache's keys and values of the same tokens
    """

    seen: int
    slots: int
    nbytes: int
    stock_nbytes: int
    dtype: torch.dtype


@dataclass
class Tally:
    """One cache. `peak`: the most bytes that it held while prompts came in, a layer that was not compressed yet included."""

    stopwatch: Stopwatch
    layers: dict[int, LayerTally] = field(default_factory=dict)
    peak: int = 0
    held: dict[int, int] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tally:
        """Figures of its own; the stopwatch, which may hold events of a GPU, is the same."""
        new = memo[id(self)] = Tally(self.stopwatch, dict(self.layers), self.peak, dict(self.held))
        return new

    def hold(self, layer: int, nbytes: int) -> None:
        """Note what a layer holds now."""
        self.held[layer] = nbytes
        self.peak = max(self.peak, sum(self.held.values()))
