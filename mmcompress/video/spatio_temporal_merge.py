"""SpatioTemporalMerge: what stays the same along time or beside it becomes one token, what changes is kept (ours).

Every cell of a clip points to the earlier cell it resembles most: the same place one frame before, a place around it (what
moves takes its token along), or its left or upper neighbour. How far it is from that cell is its novelty. The K most novel
cells stay; every other cell joins the token of the cell it points to, and tokens are the means of what joined them. So one
ranking over the whole clip spends the budget where and when something changes, the total is exact, and nothing loops over
time: pointers lead to earlier cells, so cutting K - 1 of them leaves K trees (`ops.forest`).

Cells are compared after the mean of their frame is taken off, by direction alone. A vision tower answers to what enters a
picture in all of its cells a little; that part is common to the frame and is no local change. On pico's clips this is worth
7 points at a tenth of the tokens and 22 at a twentieth, over plain squared distances (docs/video.md).

Related: HoliTom (Shao et al., 2025) averages cells that are static over a segment, EVS (NVIDIA, 2025) ranks by the change from
frame to frame and drops the rest. Ours is the forest, which needs neither segments nor thresholds and gives merging an exact
budget; the comparison within each frame's own mean; and that novelty looks back only, so that a stream is reduced to the same
tokens as the whole clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import VideoLayout
from ..ops.forest import merge_trees
from ..ops.ranking import topk_in_order
from ..tokens import Reduction, Tokens, VideoReducer

NEVER = 1e30        # the distance of a cell that resembles nothing: finite, so that it can still be merged if it must


@dataclass(frozen=True)
class SpatioTemporalMerge(VideoReducer):
    """One ranking of novelty over the clip, and merging into what each cell resembles.

    keep        share of the clip's tokens, or an exact count
    motion      how many cells, up, down and sideways, content may move from frame to frame and still be followed; 0: none
    spatial     weight of a distance to a neighbour in the same frame against one in time; larger merges less within a frame;
                None: never within a frame (then a budget below one frame merges the last cells in reading order into the first)
    tolerance   merge whatever is nearer than this even where the budget has room for it, so that a still clip costs one frame
                at any `keep`; the count is then an upper bound that depends on the data, which costs one host synchronisation.
                A squared distance between directions, 2 (1 - cosine), so between 0 and 4; None: spend the whole budget
    """

    motion: int = 1
    spatial: float | None = 1.0
    tolerance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.motion, bool) or not isinstance(self.motion, int) or self.motion < 0:
            raise ValueError(f"motion={self.motion!r}: a number of cells, 0 for none")
        if self.spatial is not None and not self.spatial > 0:
            raise ValueError(f"spatial={self.spatial}: a weight above 0, or None to merge along time only")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ValueError(f"tolerance={self.tolerance}: at least 0, or None to spend the whole budget")

    @property
    def count_is_bound(self) -> bool:
        return self.tolerance is not None

    def __call__(self, x: Tokens) -> Reduction:
        if self.tolerance is None:
            return super().__call__(x)
        return self.reduce(x, self.count(x.layout))             # a still clip is merged at keep=1.0 too

    def reduce_frames(self, x: Tokens, k: int) -> Reduction:
        frames = x.frames                                                                            # (B, T, P, D)
        novelty, parent = (one.flatten(1) for one in self.causal(frames, x.layout))                  # (B, T * P) each
        roots, worth = topk_in_order(novelty, k), None                                               # (B, K) ascending
        if self.tolerance is not None:
            worth = novelty.gather(1, roots) > self.tolerance
            order = torch.where(worth, roots, roots + novelty.shape[1]).argsort(1)
            roots, worth = roots.gather(1, order), worth.gather(1, order)
        tokens, source, mass = merge_trees(frames.flatten(1, 2), parent, roots, worth)
        return Reduction(tokens=tokens, index=roots, source=source, mass=mass, valid=worth)

    def causal(self, frames: Tensor, layout: VideoLayout, before: Tensor | None = None, start: int = 0
               ) -> tuple[Tensor, Tensor]:
        """How far each cell is from the earlier cell it resembles most, and which that is. See `VideoReducer.causal`."""
        with torch.no_grad():
            last = None if before is None else directions(before[:, None], layout)[:, 0]
            return _novelty(directions(frames, layout), layout, last, self.motion, self.spatial)


def directions(frames: Tensor, layout: VideoLayout) -> Tensor:
    """Where each cell lies from the mean of its frame's grid, at unit length. (B, T, P, D) -> the same, in its dtype

    A grid of one cell has no mean but itself: there the cell's own direction counts.
    """
    own = frames if layout.grid == (1, 1) else frames - frames[:, :, layout.lead:].mean(2, keepdim=True)
    length = torch.linalg.vector_norm(own, dim=-1, keepdim=True, dtype=torch.float32)
    return own / length.clamp_min(1e-6).to(own.dtype)


def _novelty(frames: Tensor, layout: VideoLayout, before: Tensor | None, motion: int, spatial: float | None
             ) -> tuple[Tensor, Tensor]:
    batch, t, p, _ = frames.shape
    device = frames.device
    earlier = frames[:, :1] if before is None else before[:, None]                                   # (B, 1, P, D)
    previous = torch.cat([earlier, frames[:, :-1]], 1)                                               # (B, T, P, D)
    still = (frames - previous).float().square().sum(-1)                                             # (B, T, P)
    if before is None:
        still = torch.cat([torch.full_like(still[:, :1], NEVER), still[:, 1:]], 1)
    place = torch.arange(p, device=device)
    number = place + p * torch.arange(t, device=device)[:, None]                                     # (T, P)
    best, parent = still, (number - p).expand(batch, t, p)
    near = _neighbours(layout, motion, device)                                                       # (P, P) bool each
    if motion and layout.grid != (1, 1):
        moved, cell = _nearest(frames, previous, near[0])
        moved = moved if before is not None else torch.cat([torch.full_like(moved[:, :1], NEVER), moved[:, 1:]], 1)
        better = moved < 0.9 * best                             # moving is believed where it explains clearly more
        best, parent = torch.where(better, moved, best), torch.where(better, number - place - p + cell, parent)
    if spatial is not None:
        beside, cell = _nearest(frames, frames, near[1])
        better = spatial * beside < best
        best = torch.where(better, spatial * beside, best)
        parent = torch.where(better, number - place + cell, parent)
    if before is None:
        alone = best >= NEVER                                   # resembles nothing: behind the first cell, if it must
        parent = torch.where(alone, 0, parent)
        best = torch.where(number == 0, torch.inf, best)
    return best, parent


def _nearest(frames: Tensor, others: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of the allowed cells, frame against frame. near (P, P) bool -> squared distance, cell, each (B, T, P).

    Found by inner products in the features' dtype, one matrix product a frame; the distance itself is then taken exactly.
    """
    norm = others.float().square().sum(-1)                                                           # (B, T, P)
    products = (frames @ others.transpose(-1, -2)).float()                                           # (B, T, P, P)
    apart = norm[:, :, None] - 2 * products                                                          # up to the cell's own norm
    apart = torch.where(near, apart, torch.inf)
    cell = apart.argmin(-1)                                                                          # (B, T, P)
    chosen = others.gather(2, cell[..., None].expand_as(others))
    distance = (frames - chosen).float().square().sum(-1)
    return torch.where(near.any(-1), distance, NEVER), cell


def _neighbours(layout: VideoLayout, motion: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which cells of the frame before a cell may have moved from, and which of its own frame it may join. (P, P) bool each"""
    (rows, columns), lead = layout.grid, layout.lead
    r = torch.arange(rows, device=device).repeat_interleave(columns)
    c = torch.arange(columns, device=device).repeat(rows)
    down, right = r[:, None] - r, c[:, None] - c                                                     # of a cell from another
    around = (down.abs() <= motion) & (right.abs() <= motion)
    beside = ((down == 0) & (right == 1)) | ((down == 1) & (right == 0))                             # left and upper
    return F.pad(around, (lead, 0, lead, 0)), F.pad(beside, (lead, 0, lead, 0))
