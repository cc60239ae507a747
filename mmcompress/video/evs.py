"""EVS: drop what did not change since the frame before (NVIDIA, "Efficient Video Sampling", 2025; vLLM's video pruning).

The method's, as serving engines run it: a token's dissimilarity is 1 - cosine to the same place one frame earlier, the first
frame is kept whole, the rest of the budget is one ranking over the clip. Ours: half the squared distance of the unit vectors,
in float32 whatever the features' dtype. It is the same number without its cancellation (but half of it beside a zero vector):
a cell that stands still scores exactly 0, so a still clip is settled by position instead of by rounding, and bf16 ties are few.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import VideoLayout
from ..ops.ranking import topk_in_order
from ..tokens import Reduction, Tokens, VideoReducer, select_from


@dataclass(frozen=True)
class EVS(VideoReducer):
    """The first frame, and the cells that differ most from the frame before.

    keep   share of the clip's tokens, or an exact count; raised to one frame (and the clip's tail) if it is less, since the
           first frame stays. For the number that a serving engine keeps at its pruning rate, pass
           `keep=retained_tokens(cells, frames, rate)`: it floors in floating point, where a share here is exact
    """

    def count(self, layout: VideoLayout) -> int:
        return max(super().count(layout), layout.cells + layout.tail)

    def reduce_frames(self, x: Tokens, k: int) -> Reduction:
        worth, _ = self.causal(x.frames, x.layout)
        return select_from(x.frames.flatten(1, 2), topk_in_order(worth.flatten(1), k))

    def causal(self, frames: Tensor, layout: VideoLayout, before: Tensor | None = None, start: int = 0
               ) -> tuple[Tensor, None]:
        """Change since the frame before. See `VideoReducer.causal`."""
        return novelty(frames, before), None


def novelty(frames: Tensor, before: Tensor | None = None) -> Tensor:
    """How much each cell differs from the same cell one frame earlier, 0 to 2; +inf where the clip begins.

    frames (B, T, P, D), before (B, P, D): the frame in front of them, None: there is none -> (B, T, P) float32
    """
    unit = unit_vectors(frames)
    change = dissimilarity(unit[:, 1:], unit[:, :-1])                                                # (B, T - 1, P)
    if before is None:
        first = torch.full_like(unit[:, :1, :, 0], torch.inf)
    else:
        first = dissimilarity(unit[:, :1], unit_vectors(before)[:, None])
    return torch.cat([first, change], 1)


def unit_vectors(x: Tensor) -> Tensor:
    """Features of length 1 in float32, without gradient: they rank, and ranks have none."""
    return F.normalize(x.detach().float(), dim=-1)


def dissimilarity(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine of unit vectors (..., D), as half their squared distance: exactly 0 where they are equal."""
    return 0.5 * (a - b).square().sum(-1)


def retained_tokens(tokens_per_frame: int, frames: int, rate: float) -> int:
    """How many tokens of a clip a serving engine (vLLM) keeps at a pruning rate in [0, 1): at least those of one frame.

    `int(tokens * (1 - rate))` in floating point, as engines size their placeholders: 100 tokens at 0.9 are 9, not 10.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate}: the share that is pruned, in [0, 1)")
    return max(tokens_per_frame, int(tokens_per_frame * frames * (1 - rate)))
