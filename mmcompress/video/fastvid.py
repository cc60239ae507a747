"""FastVID: salient tokens and density anchors of dynamic segments (Shen et al., "Dynamic Density Pruning", NeurIPS 2025).

Read from the authors' code, whose three variants differ; ours follows the one for LLaVA-Video. Theirs: a clip is cut where
neighbouring frames' cosine is below `threshold`, and at least into `segments`; each frame keeps its most attended tokens; the
last frame of a segment and every `every`-th before it are anchor frames, which between them hold the segment's context tokens:
density peaks among what is not salient; every anchor frame by itself gathers all tokens of the segment that are neither salient
nor its own anchors, each into the most alike anchor, as beta x anchor + (1 - beta) x mean (beta is the least weight, the
anchor's is 1 / (members + 1) if that is larger). In the variant for LLaVA-OneVision the anchors are members of their own
groups too, and floors lose part of the budget; in the one for Qwen2.5-VL near-duplicate frames get nothing.
Ours: one exact total; context tokens divided over anchor frames by Webster's method, in their proportions (segment length
over anchor frames); where anchor frames have no room, further salient tokens; log-densities, which rank alike and do not
underflow (theirs do on tokens of large norm, where their noise of 1e-6 then picks the anchors); the frame's mean token is
its feature, as in their Qwen2.5-VL variant (the others load SigLIP's pooling head for it); clips shorter than `segments`,
and budgets too small for context tokens, work. A token gathered by several anchor frames counts in `source` and `mass` for the
most alike of their anchors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.density import as_reduction, blend, density_peaks, distances, first_best_of_groups, pick, slots, unit
from ..ops.ranking import mask_to_index, ranks
from ..ops.segments import CellScores, Segments, cell_scores, check_cell_scores, cut_least_alike, divide, frame_likeness
from ..tokens import Reduction, Tokens, VideoReducer

NEIGHBOURS = 4      # of a token's density, itself among them


@dataclass(frozen=True)
class FastVID(VideoReducer):
    """Salient tokens of every frame, and context tokens that gather the rest of their segment.

    segments     the least number of segments, or every frame is one (the authors' c)
    threshold    neighbouring frames less alike than this are cut apart (tau)
    context      share of the kept tokens that are context tokens, in [0, 1) (d)
    every        one anchor frame for so many frames of a segment (p)
    beta         the least weight of an anchor in its merged token, in [0, 1]
    scores       what is salient: "attention" of the vision tower; "distinct": 1 - cos(token, mean of its frame); "auto": the
                 first where the tower can give it
    """

    segments: int = 8
    threshold: float = 0.9
    context: float = 0.4
    every: int = 4
    beta: float = 0.6
    scores: CellScores = "auto"

    captures: ClassVar[tuple[int, ...]] = (-1,)
    receives: ClassVar[tuple[int, ...]] = (-1,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cell_scores(self.scores)
        for name in ("segments", "every"):
            if (value := getattr(self, name)) < 1 or value != int(value):
                raise ValueError(f"{name}={value}: a whole number of at least 1")
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: a cosine, in [-1, 1]; -1 cuts only into `segments`")
        if not 0 <= self.context < 1:
            raise ValueError(f"context={self.context}: lies in [0, 1); 0 keeps salient tokens alone")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta}: lies in [0, 1]; 1 leaves anchors as they are")

    def reduce_frames(self, x: Tokens, k: int) -> Reduction:
        frames, scores = x.frames, cell_scores(x, self.scores)
        t, p = scores.shape[1:]
        segments = cut_least_alike(frame_likeness(frames), self.segments, self.threshold)
        context = int(k * self.context)
        left, frame = k - context, torch.arange(t, device=frames.device)
        each_frame = left // t + (frame < left % t).long()                                           # (T,)
        salient = most_salient(scores, each_frame)
        if not context:
            return gather_context(frames, salient, torch.zeros_like(salient), segments, k, 0, self.beta)
        is_anchor, weight = anchor_frames(segments, self.every)
        counts = divide(weight, (p - each_frame) * is_anchor, context, p)                            # (B, T)
        anchors = density_anchors(frames, salient, counts)
        salient = salient | next_salient(scores, salient | anchors, context - counts.sum(1))
        return gather_context(frames, salient, anchors, segments, k, context, self.beta)


def anchor_frames(segments: Segments, every: int) -> tuple[Tensor, Tensor]:
    """Which frames hold context tokens: the last of a segment and every `every`-th before it; and each one's share.

    (B, T) bool, and (B, T) float32: the segment's length over the number of its anchor frames.
    """
    frame = torch.arange(segments.first.shape[1], device=segments.first.device)
    is_anchor = (segments.last - frame) % every == 0
    return is_anchor, segments.length / ((segments.length + every - 1) // every) * is_anchor


def most_salient(scores: Tensor, counts: Tensor) -> Tensor:
    """The `counts` (B, T) or (T,) best cells of every frame. scores (B, T, P) -> (B, T, P) bool"""
    return ranks(scores) < counts[..., None]


def next_salient(scores: Tensor, taken: Tensor, count: Tensor) -> Tensor:
    """`count` (B,) more cells that are not taken: each frame's best, then each one's second, and so on. (B, T, P) bool"""
    batch, t, p = scores.shape
    turn = ranks(scores.masked_fill(taken, -torch.inf)) * t + torch.arange(t, device=scores.device)[:, None]
    turn = torch.where(taken, t * p + turn, turn)                                                    # no two are equal
    return (ranks(-turn.flatten(1)) < count[:, None]).view(batch, t, p) & ~taken


def density_anchors(frames: Tensor, salient: Tensor, counts: Tensor) -> Tensor:
    """The `counts` (B, T) density peaks among the cells of each frame that are not salient. (B, T, P) bool"""
    peaks = density_peaks(distances(frames), ~salient, NEIGHBOURS, NEIGHBOURS)
    return (ranks(peaks) < counts[..., None]) & ~salient


def gather_context(frames: Tensor, salient: Tensor, anchors: Tensor, segments: Segments, k: int, context: int, beta: float
                   ) -> Reduction:
    """Salient cells as they are, anchors with what they gather (the authors' DTM).

    frames (B, T, P, D), salient, anchors (B, T, P) bool, disjoint, k true in each row; at most `context` anchors in a row.
    Memory: a few float32 maps of T * P x context.
    """
    batch, t, p, width = frames.shape
    cells, salient, anchors = frames.flatten(1, 2), salient.flatten(1), anchors.flatten(1)
    kept = salient | anchors
    slot = slots(kept)
    tokens = pick(cells, mask_to_index(kept, k))
    if not context:
        return as_reduction(tokens, kept, slot)
    anchor = mask_to_index(anchors, context)                                                         # (B, C), padded with N
    exists, anchor = anchor < t * p, anchor.clamp_max(t * p - 1)
    frame = (torch.arange(t * p, device=frames.device) // p).expand(batch, -1)
    segment = segments.first.gather(1, frame)                                                        # (B, N)
    own = anchors[..., None] & (frame[..., None] == frame.gather(1, anchor)[:, None])                # anchors of its frame
    same = segment[..., None] == segment.gather(1, anchor)[:, None]
    allowed = same & ~own & ~salient[..., None] & exists[:, None]                                    # (B, N, C)
    direction = unit(cells)
    likeness = direction @ pick(direction, anchor).transpose(1, 2)
    member = first_best_of_groups(likeness, allowed, anchor // p, t)
    weight = (1 / (member.sum(1) + 1)).clamp_min(beta)                                               # (B, C)
    merged = blend(pick(cells, anchor), cells, member, weight).to(cells.dtype)
    place = torch.where(exists, slot.gather(1, anchor), k)[..., None].expand(-1, -1, width)
    tokens = torch.cat([tokens, tokens.new_zeros(batch, 1, width)], 1).scatter(1, place, merged)[:, :k]
    nearest = likeness.masked_fill(~member, -torch.inf).argmax(2)
    joined = torch.where(member.any(2), slot.gather(1, anchor).gather(1, nearest), -1)
    return as_reduction(tokens, kept, torch.where(kept, slot, joined))
