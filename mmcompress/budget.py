"""Budgets: from `keep` to an exact number of tokens, known before any data is seen."""

from __future__ import annotations

import math
from typing import Any


def check_keep(keep: Any, name: str = "keep") -> None:
    """Raise unless `keep` is a ratio in (0, 1] or a positive token count."""
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise ValueError(f"{name}={keep!r}: a float in (0, 1] is a share of the item's tokens, an int an exact count")
    if isinstance(keep, int):
        if keep < 1:
            raise ValueError(f"{name}={keep}: a token count is at least 1; pass a float for a share")
    elif not 0.0 < keep <= 1.0:
        raise ValueError(f"{name}={keep}: a ratio lies in (0, 1]; pass an int for a token budget")


def keep_count(tokens: int, keep: float | int) -> int:
    """How many of `tokens` stay: `floor(tokens * keep)` for a ratio, `keep` itself for a count; from 1 to `tokens`."""
    wanted = keep if isinstance(keep, int) else math.floor(tokens * keep + 1e-9)
    return max(1, min(tokens, wanted))
