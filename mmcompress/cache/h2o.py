"""H2O (Zhang et al., NeurIPS 2023, arXiv 2306.14048): heavy hitters of the accumulated attention, and the recent tokens.

The paper's: the score is attention summed over all queries so far, half of the budget is the recent window; a token that is
dropped keeps no score. Its code goes on adding while decoding and drops one token a step: `every=1`. A prompt that comes in
chunks (`again=True`) is judged by the sums over all of its chunks. Ours: the mean over query heads that share a key head; sinks
are optional, SinkLoRA (arXiv 2406.05678) uses four.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .plan import CachePlan
from .scores import accumulated
from .view import CacheView


@dataclass(frozen=True)
class H2O(CachePlan):
    """Keep the tokens that received the most attention, and the last ones as half of the budget."""

    sinks: int = 0
    recent: int | float = 0.5

    accumulates: ClassVar[bool] = True

    def scores(self, x: CacheView) -> Tensor:
        return accumulated(x)
