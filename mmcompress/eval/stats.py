"""Intervals for shares."""

from __future__ import annotations

import math


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share: the p with |hits / n - p| <= z sqrt(p (1 - p) / n). z=1.96 covers 95 %."""
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"hits={hits}, n={n}: there must be at least one trial, and no more hits than trials")
    share, spread = hits / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return middle - half if hits else 0.0, middle + half if hits < n else 1.0
