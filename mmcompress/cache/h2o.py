"""H2O (Zhang et al., NeurIPS 2023, arXiv 2306.14048): heavy hitters of the accumulated attention, and the recent tokens.

The paper's: the score is attention summed over all queries of the prompt, half of the budget is the recent window. Its code
goes on adding while decoding; here a prompt is judged once, by its own queries (`again=True`: every prompt by its own). Ours:
the mean over query heads that share a key head; sinks are optional, SinkLoRA (arXiv 2406.05678) uses four.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .plan import CachePlan
from .scores import column_sums
from .view import CacheView


@dataclass(frozen=True)
class H2O(CachePlan):
    """Keep the tokens that received the most attention, and the last ones as half of the budget."""

    sinks: int = 0
    recent: int | float = 0.5

    asks_queries: ClassVar[bool] = True

    def scores(self, x: CacheView) -> Tensor:
        return column_sums(x)
