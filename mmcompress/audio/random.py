"""Random tokens of a recording: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from ..ops.hashing import random_order
from ..ops.ranking import topk_in_order
from ..tokens import Reduction, Tokens, select
from .base import AudioReducer


@dataclass(frozen=True)
class Random(AudioReducer):
    """Keep a random subset, the same for every recording of a length under one seed, on any device and in any batch."""

    seed: int = 0

    def reduce_sound(self, x: Tokens, k: int) -> Reduction:
        order = random_order(x.layout.length, self.seed, x.features.device)
        return select(x, topk_in_order(order.expand(len(x.features), -1), k))
