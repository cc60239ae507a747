"""Intervals for shares and for their differences."""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share: the p with |hits / n - p| <= z sqrt(p (1 - p) / n). z=1.96 covers 95 %."""
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"hits={hits}, n={n}: there must be at least one trial, and no more hits than trials")
    share, spread = hits / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return middle - half if hits else 0.0, middle + half if hits < n else 1.0


def paired(a: Sequence[bool], b: Sequence[bool], z: float = 1.96) -> tuple[float, float]:
    """Difference of two shares of hits on the same trials, and half its interval: mean(a - b), z standard errors of it."""
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"{len(a)} and {len(b)} trials: both must be the same trials in the same order, two at least")
    differences = [int(x) - int(y) for x, y in zip(a, b)]
    n, mean = len(a), sum(differences) / len(a)
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    return mean, z * math.sqrt(variance / n)
