"""DyCoke, stage 1: of four frames one stays whole, the others keep what changed (Tao et al., "DyCoke", CVPR 2025).

The paper's: temporal merging in windows of four frames: frame 1 is compared with 0, 2 with 0, 3 with 2, place by place, and
of each the most similar cells go (rate 0.7). Nothing is averaged: the merged token is the earlier one. Stage 2, which drops
entries of the cache while decoding, is not here.
The code's (`paper_code=True`): where the number of frames is a multiple of four the last window keeps two whole frames, an
odd last frame is dropped, fewer than five frames fail. It leaves cells in the order of their similarity; ours are in reading
order. Ours: any exact budget (see `keep`); windows of 8, 16, ... frames; half the squared distance of unit vectors for
1 - cosine, in float32, so that cells that stand still tie exactly and the earlier one stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import check_keep, keep_count
from ..layout import VideoLayout
from ..ops.ranking import ranks, topk_in_order
from ..tokens import Reduction, Tokens, VideoReducer, select_from
from .evs import dissimilarity, unit_vectors


@dataclass(frozen=True)
class DyCoke(VideoReducer):
    """Whole key frames, and of the frames between them the cells least like the frame they refer to.

    keep         None: what `rate` leaves, int((1 - rate) P) cells of every frame that is not a key frame. A share of the
                 clip's tokens or an exact count: key frames are whole and the others share the rest evenly, earlier frames
                 first. Where the key frames of windows of four do not fit (keep below about 1/4), windows are of 8, 16, ...
                 frames until they do; with keep=0.25 the key frames are all that fits. A budget below one frame is spread
                 evenly over the first
    rate         share of a frame that goes, in [0, 1], the paper's 0.7; read with keep=None only
    paper_code   select exactly the cells that the authors' public code selects; takes `rate`, and no `keep`
    """

    keep: float | int | None = None     # type: ignore[assignment]
    rate: float = 0.7
    paper_code: bool = False

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
            if self.paper_code:
                raise ValueError(f"keep={self.keep}: paper_code=True prunes at a fixed rate, as the authors' code does; pass "
                                 f"rate instead")
            if self.rate != type(self).rate:
                raise ValueError(f"keep={self.keep} and rate={self.rate}: pass one of them")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate={self.rate}: the share of a frame that goes, in [0, 1]")

    def count(self, layout: VideoLayout) -> int:
        if self.keep is not None:
            return keep_count(layout.tokens, self.keep)
        t, p = layout.frames, layout.cells
        left = int((1 - self.rate) * p)                                         # of a pruned frame, floored as the code does
        if not self.paper_code:
            whole = -(-t // 4)
            return whole * p + (t - whole) * left + layout.tail
        if t < 5:
            raise ValueError(f"{t} frames: the authors' code needs 5 or more; leave paper_code out")
        windows = (t - 1) // 4                                                  # those whose third frame is pruned
        return t // 2 * (p + left) - windows * (p - left) + layout.tail

    def reduce_frames(self, x: Tokens, k: int) -> Reduction:
        features, (t, p) = x.frames.flatten(1, 2), (x.layout.frames, x.layout.cells)
        frame = torch.arange(t, device=features.device)
        if k < p:
            thin = ((2 * torch.arange(k, device=features.device) + 1) * p) // (2 * k)
            return select_from(features, thin.expand(len(features), -1))
        if self.paper_code:
            key = (frame % 4 == 0) | ((frame % 2 == 0) & (frame >= t - 2))
            gone = frame >= t - t % 2
        else:
            key, gone = frame % _window(t, p, k) == 0, torch.zeros_like(frame, dtype=torch.bool)
        turn = -ranks(change(x.frames)).float()                     # equal shares: every frame's first, every frame's second
        turn = turn.masked_fill(key[:, None], torch.inf).masked_fill(gone[:, None], -torch.inf)      # (B, T, P)
        return select_from(features, topk_in_order(turn.flatten(1), k))


def change(frames: Tensor) -> Tensor:
    """How much each cell differs from the frame it refers to. frames (B, T, P, D) -> (B, T, P) float32, 0 to 2

    Frame t refers to t without its lowest binary digit: 1 to 0, 2 to 0, 3 to 2, as the paper has it, and in longer windows 4 to
    0, 5 to 4, ...: a window of eight is two of four of which the second's key frame refers to the first's.
    """
    unit = unit_vectors(frames)
    frame = torch.arange(frames.shape[1], device=frames.device)
    return dissimilarity(unit, unit.index_select(1, frame & (frame - 1)))


def _window(frames: int, cells: int, k: int) -> int:
    """Frames to a window: the least of 4, 8, 16, ... with which k cells hold every key frame. Needs k >= cells."""
    window = 4
    while -(-frames // window) * cells > k:
        window *= 2
    return window
