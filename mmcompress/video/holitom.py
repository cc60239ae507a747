"""HoliTom: static tokens once for a window of frames, then merged or pruned with the rest (Shao et al., NeurIPS 2025).

Read from the authors' code, its part before the language model. Theirs: a cell is static in a window of frames if its cosine to
the next frame's exceeds `threshold` all along; windows are chosen by dynamic programming so that most tokens are saved; a
static cell is shown once, as the mean over its window; the ratio rises by what that saves. Of a window's static tokens density
peaks become centres (DPC-kNN with min(7, centres) neighbours), the others join the nearest, beta x centre + (1 - beta) x mean;
of each frame's other cells the most attended stay. What their D > 0 (density peaks inside frames) does is left out: their code
raises there, so their figures have D = 0.
Ours: one exact total, divided by Webster's method in their proportions (sizes) where they round each window (so a window of
few static tokens may still lose them); a static token stands at its cell of the window's first frame, in reading order, where
their OneVision path puts a window's static tokens before it; log-densities, which rank alike and do not underflow. Where the
budget exceeds what the windows leave, they do not spend it. Ours shows all of it and spends the rest on cutting static cells
in time where they are least alike to the frame before, each stretch the mean of its own frames; a full budget is every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.density import as_reduction, blend, density_peaks, distances, pick, slots
from ..ops.ranking import mask_to_index, ranks
from ..ops.segments import (
    CellScores,
    Segments,
    best_windows,
    cell_likeness,
    cell_scores,
    check_cell_scores,
    divide,
    saved_by_windows,
)
from ..tokens import Reduction, Tokens, VideoReducer


@dataclass(frozen=True)
class HoliTom(VideoReducer):
    """Static tokens merged over windows of frames, then pruned with the rest.

    threshold    a cell is static from one frame to the next if its cosine exceeds this (tau)
    beta         weight of a centre in its merged token, in [0, 1]
    window       frames of the longest window; None: no limit
    neighbours   of a token's density, itself among them; never more than there are centres (K)
    scores       which other tokens stay: "attention" of the vision tower; "distinct": 1 - cos(token, mean of its frame);
                 "auto": the first where the tower can give it

    `Reduction.mass` of a static token counts its cells in all frames it stands for. The programme is a loop over frames.
    """

    threshold: float = 0.8
    beta: float = 0.6
    window: int | None = None
    neighbours: int = 7
    scores: CellScores = "auto"

    captures: ClassVar[tuple[int, ...]] = (-1,)
    receives: ClassVar[tuple[int, ...]] = (-1,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cell_scores(self.scores)
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: a cosine, in [-1, 1]; 1 makes nothing static")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta}: lies in [0, 1]; 1 leaves centres as they are")
        if self.window is not None and (self.window < 1 or self.window != int(self.window)):
            raise ValueError(f"window={self.window}: a whole number of frames, or None for no limit")
        if self.neighbours < 1 or self.neighbours != int(self.neighbours):
            raise ValueError(f"neighbours={self.neighbours}: a whole number of at least 1")

    def reduce_frames(self, x: Tokens, k: int) -> Reduction:
        frames, scores = x.frames, cell_scores(x, self.scores)
        likeness = cell_likeness(frames)
        segments, static = static_windows(likeness, self.threshold, self.window)
        once = first_of_window(segments, static)
        counts = shares(once, static, k)
        left = (once | ~static).sum((1, 2))                                                          # (B,)
        cuts = weakest_links(likeness, static & ~once, (k - left).clamp_min(0))
        return merge_windows(frames, scores, static, once, cuts, counts, k, self.beta, self.neighbours)


def static_windows(likeness: Tensor, threshold: float, window: int | None) -> tuple[Segments, Tensor]:
    """The windows that save most, and which cells are static in theirs. likeness (B, T - 1, P) -> (B, T, P) bool"""
    t, p = likeness.shape[1] + 1, likeness.shape[2]
    alike = likeness > threshold
    segments, _ = best_windows(saved_by_windows(alike), window)
    moved = F.pad((~alike).long(), (0, 0, 1, 0)).cumsum(1)                                 # (B, T, P) up to each frame
    at = lambda frame: moved.gather(1, frame[..., None].expand(-1, t, p))  # noqa: E731
    return segments, (at(segments.last) == at(segments.first)) & (segments.length > 1)[..., None]


def first_of_window(segments: Segments, static: Tensor) -> Tensor:
    """The cells at which static tokens stand: those of their window's first frame. (B, T, P) bool"""
    frame = torch.arange(static.shape[1], device=static.device)
    return static & (segments.first == frame)[..., None]


def shares(once: Tensor, static: Tensor, k: int) -> Tensor:
    """How many of each window's static tokens and of each frame's others stay, in proportion to their number. (B, T, 2)

    once, static (B, T, P) bool. A window's static tokens are those of its first frame.
    """
    size = torch.stack([once.sum(2), (~static).sum(2)], 2).flatten(1)                                # (B, 2 T)
    return divide(size.float(), size, k, static.shape[2]).unflatten(1, (static.shape[1], 2))


def weakest_links(likeness: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` (B,) cells least alike to the frame before them. likeness (B, T - 1, P), among (B, T, P) bool -> bool"""
    link = F.pad(likeness, (0, 0, 1, 0)).masked_fill(~among, torch.inf)
    return (ranks(-link.flatten(1)) < count[:, None]).view_as(among) & among


def merge_windows(frames: Tensor, scores: Tensor, static: Tensor, once: Tensor, cuts: Tensor, counts: Tensor, k: int,
                  beta: float, neighbours: int) -> Reduction:
    """Average static cells over time, merge them into density peaks, and keep the best of the others.

    frames (B, T, P, D), scores (B, T, P); static, once, cuts (B, T, P) bool: the static cells, those at which their windows
    begin, and further ones at which a stretch of its own begins; counts (B, T, 2) int64: centres among `once` and cells among
    those that are not static, frame by frame; with the cuts they make k in each row.
    """
    p = frames.shape[2]
    values, begins = average_stretches(frames, once | cuts | ~static)
    distance = distances(values)
    peaks = density_peaks(distance, once, counts[..., 0].clamp(1, neighbours), neighbours)
    centres = (ranks(peaks) < counts[..., :1]) & once                                                # (B, T, P)
    best = (ranks(scores.masked_fill(static, -torch.inf)) < counts[..., 1:]) & ~static
    place = torch.arange(p, device=frames.device)
    nearest = distance.masked_fill(~centres[..., None, :], torch.inf).argmin(-1)                     # (B, T, P), ties: first
    nearest = torch.where(once & ~centres & centres.any(2, keepdim=True), nearest, place)            # others: themselves
    member = (nearest[..., None] == place) & (once & ~centres)[..., None] & centres[..., None, :]    # (B, T, P, P)
    values = blend(values, values, member, torch.full_like(peaks, beta))
    kept = (centres | cuts | best).flatten(1)
    index = mask_to_index(kept, k)
    tokens = torch.where(static.flatten(1).gather(1, index)[..., None], pick(values.flatten(1, 2), index).to(frames.dtype),
                         pick(frames.flatten(1, 2), index))
    frame = torch.arange(frames.shape[1], device=frames.device)[:, None]
    slot = slots(kept)
    joined = slot.gather(1, (frame * p + nearest).flatten(1))                                        # of each stretch
    return as_reduction(tokens, kept, joined.gather(1, (begins * p + place).flatten(1)))


def average_stretches(frames: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each cell over time, from where it begins to before it begins again.

    frames (B, T, P, D), begins (B, T, P) bool, true in frame 0 -> (B, T, P, D) float32, of use where a stretch begins, and
    (B, T, P) int64: the frame in which each cell's stretch begins.
    """
    frame = torch.arange(frames.shape[1], device=frames.device)
    start = torch.where(begins, frame[:, None], 0).cummax(1).values                                  # (B, T, P)
    member = (start.transpose(1, 2)[:, :, None] == frame[:, None]).float()                           # (B, P, T begins, T)
    total = member @ frames.float().transpose(1, 2)                                                  # (B, P, T, D)
    return (total / member.sum(3, keepdim=True).clamp_min(1)).transpose(1, 2), start
