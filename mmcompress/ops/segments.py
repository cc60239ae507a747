"""A clip as segments of frames: how alike neighbouring frames are, where to cut, and how a budget is divided.

Frames are numbered 0 ... T - 1; a segmentation says of each frame which are the first and the last frame of its segment, so
that rows of a batch may be cut differently and nothing waits for data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens import Tokens
from .ranking import ranks

CellScores = Literal["auto", "attention", "distinct"]
CELL_SCORES = ("auto", "attention", "distinct")


def check_cell_scores(kind: str) -> None:
    if kind not in CELL_SCORES:
        raise ValueError(f"scores={kind!r}: one of {', '.join(CELL_SCORES)}")


def cell_scores(x: Tokens, kind: CellScores, layer: int = -1) -> Tensor:
    """How much each cell of a clip matters by itself, without gradient. (B, T, P) float32

    "attention": what a vision layer pays it (`Tokens.saliency`). "distinct": 1 - cos(token, mean of its frame). "auto": the
    first where the tower can give it.
    """
    if kind == "auto":
        state = x.vision.get(layer)
        kind = "attention" if state is not None and (x.has_cls(layer) or state.received is not None) else "distinct"
    frames = x.frames.detach()
    if kind == "attention":
        return x.saliency(layer).detach().float()[:, :frames.shape[1] * frames.shape[2]].unflatten(1, frames.shape[1:3])
    frames = frames.float()
    return 1 - F.cosine_similarity(frames, frames.mean(2, keepdim=True), dim=-1)


def frame_likeness(frames: Tensor) -> Tensor:
    """Cosine of the mean tokens of neighbouring frames. (B, T, P, D) -> (B, T - 1) float32"""
    mean = F.normalize(frames.detach().float().mean(2), dim=-1)
    return (mean[:, :-1] * mean[:, 1:]).sum(-1)


def cell_likeness(frames: Tensor) -> Tensor:
    """Cosine of each cell to the same cell of the next frame. (B, T, P, D) -> (B, T - 1, P) float32"""
    unit = F.normalize(frames.detach().float(), dim=-1)
    return (unit[:, :-1] * unit[:, 1:]).sum(-1).clamp(-1, 1)


@dataclass(frozen=True, eq=False)
class Segments:
    """Of each frame, the first and the last frame of its segment."""

    first: Tensor           # (B, T) int64
    last: Tensor            # (B, T) int64

    @classmethod
    def starting(cls, starts: Tensor) -> Segments:
        """From which frames start a segment. starts (B, T) bool, true at frame 0"""
        t = starts.shape[1]
        frame = torch.arange(t, device=starts.device)
        ends = F.pad(starts[:, 1:], (0, 1), value=True)
        return cls(first=torch.where(starts, frame, 0).cummax(1).values,
                   last=t - 1 - torch.where(ends, t - 1 - frame, 0).flip(1).cummax(1).values.flip(1))

    @property
    def length(self) -> Tensor:
        """Frames of each frame's segment. (B, T) int64"""
        return self.last - self.first + 1


def cut_least_alike(likeness: Tensor, segments: int, threshold: float) -> Segments:
    """Cut where neighbouring frames are less alike than `threshold`, and at the least alike `segments` - 1 places.

    So there are at least min(segments, T) segments. likeness (B, T - 1); of equals the earlier is cut.
    """
    cut = (likeness < threshold) | (ranks(-likeness) < segments - 1)
    return Segments.starting(F.pad(cut, (1, 0), value=True))


def saved_by_windows(alike: Tensor) -> Tensor:
    """Tokens that are saved if the w + 1 frames up to e become one window whose static cells are shown once.

    A cell is static in a window if every frame's is alike to the next one's. alike (B, T - 1, P) bool
    -> (B, T, T) int64 at [e, w]: w times the number of static cells; 0 where the window would begin before frame 0.
    """
    batch, t = len(alike), alike.shape[1] + 1
    frame = torch.arange(t, device=alike.device)
    moved = F.pad(~alike, (0, 0, 1, 0), value=True)                                                  # (B, T, P)
    run = frame[:, None] - torch.where(moved, frame[:, None], 0).cummax(1).values                    # alike for so long
    lengths = torch.zeros(batch, t, t, dtype=torch.int64, device=alike.device).scatter_add(2, run, torch.ones_like(run))
    return lengths.flip(2).cumsum(2).flip(2) * frame                                                 # runs of at least w


def best_windows(saved: Tensor, longest: int | None = None) -> tuple[Segments, Tensor]:
    """The segmentation that saves most, by dynamic programming over its ends: best(e) = max_w best(e - w - 1) + saved(e, w).

    Of equals, the last window is a single frame, else the shortest. saved (B, T, T) as `saved_by_windows` gives it, longest:
    frames of the longest window allowed -> the segments, and what they save (B,) int64. A loop over the T frames.
    """
    t = saved.shape[1]
    best = [torch.zeros_like(saved[:, 0, 0])]
    more: list[Tensor] = []                                     # frames before e in the best window that ends at e
    for e in range(t):
        w = torch.arange(min(e + 1, longest or t), device=saved.device)
        before = torch.stack(best[e::-1][:len(w)], 1)                                                # (B, w): best(e - w - 1)
        key = ((before + saved[:, e, :len(w)]) * t + (t - 1 - w)).amax(1)                            # no two are equal
        best.append(key // t)
        more.append(t - 1 - key % t)
    first: list[Tensor] = []
    start = torch.full_like(best[0], t)
    for e in reversed(range(t)):
        start = torch.where(start > e, e - more[e], start)
        first.append(start)
    starts = torch.stack(first[::-1], 1) == torch.arange(t, device=saved.device)
    return Segments.starting(starts), best[-1]


def divide(weight: Tensor, capacity: Tensor, total: int, most: int) -> Tensor:
    """`total` seats to G groups in proportion to their weights (Webster's divisor method), never more than a group can hold.

    weight (B, G) float, capacity (B, G) int64 up to `most` -> (B, G) int64, which sum to min(total, sum of capacity). Of equal
    claims the earlier group's goes first. Shares depend on the row alone.
    """
    seat = torch.arange(most, device=weight.device)
    claim = weight[..., None].float() / (seat + 0.5)                                                 # (B, G, most)
    exists = seat < capacity[..., None]
    order = ranks(claim.masked_fill(~exists, -1.0).flatten(1)).view_as(claim)
    return ((order < total) & exists).sum(2)
