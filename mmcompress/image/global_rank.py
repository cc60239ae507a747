"""GlobalRank: the thumbnail commands one ranking over all crops, and what repeats steps back (ours, after GlobalCom2).

From GlobalCom2 (Liu et al., 2025): a crop token's score mixes the crop's own [CLS] attention with the thumbnail's,
resized onto the crops. Ours: one ranking over the whole canvas instead of crop budgets; the thumbnail's own tokens, which
repeat what the crops show, come back only as the budget fills; a token counts for what it adds to better-ranked ones (the
one-shot suppression of MatrixNMS, Wang et al., SOLOv2, 2020, on feature similarity instead of overlap); newlines of kept
rows are paid for; kept tokens keep their original positions. docs/global_rank.md has the evidence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budget import keep_count
from ..ops.canvas import spread_over_canvas, thumbnail_map
from ..ops.ranking import NewlinePolicy, check_newline_budget, check_newlines, keep_with_newlines, ranks
from ..ops.scores import patch_scores
from ..ops.similarity import redundancy
from ..tokens import ImageLayout, ImageReducer, Reduction, Tokens, select


@dataclass(frozen=True)
class GlobalRank(ImageReducer):
    """One ranking over all crops: score x (1 - likeness to the most alike better-scored token) ^ redundancy.

    keep         share of the picture's tokens, newlines included, or an exact count
    alpha        weight of the thumbnail's score in a crop token's score, in [0, 1]; both maps at unit L2 norm
    smooth       width in tokens, odd, of a horizontal mean of the scores, so that a word is kept whole; 1: none
    redundancy   how much repetition costs; 0: nothing
    thumbnail    share of the thumbnail's own tokens that stay, best first, in [0, 1]; 0: it only commands; None: the fourth
                 power of the share of all tokens that stays (.06 at one half, .004 at a quarter)
    scores       "attention": [CLS] attention of the last vision layer; "cosine": distinctness, for towers without [CLS];
                 "auto": the first where the tower has a [CLS] token
    newlines     "kept": the newline of each row that keeps a token, "all", "none"; paid from the budget

    A thumbnail alone (LLaVA-1.5, single tiles) is ranked by its own scores.
    """

    alpha: float = 0.5
    smooth: int = 3
    redundancy: float = 1.0
    thumbnail: float | None = None
    scores: Literal["auto", "attention", "cosine"] = "auto"
    newlines: NewlinePolicy = "kept"

    captures: ClassVar[tuple[int, ...]] = (-1,)
    positions: ClassVar[Literal["closed", "original"]] = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_newlines(self.newlines)
        for name in ("alpha", "thumbnail"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: lies in [0, 1]")
        if self.smooth < 1 or self.smooth % 2 == 0:
            raise ValueError(f"smooth={self.smooth}: an odd width in tokens, 1 for none")
        if self.redundancy < 0:
            raise ValueError(f"redundancy={self.redundancy}: at least 0, 0 for none")
        if self.scores not in ("auto", "attention", "cosine"):
            raise ValueError(f"scores={self.scores!r}: one of auto, attention, cosine")

    def count(self, layout: ImageLayout) -> int:
        k = keep_count(layout.tokens, self.keep)
        check_newline_budget(layout, k, self.newlines)
        return k

    def reduce(self, x: Tokens, k: int) -> Reduction:
        layout, places = x.layout, x.places
        kind: Literal["attention", "cosine"] = (
            ("attention" if x.has_cls() else "cosine") if self.scores == "auto" else self.scores)
        local = patch_scores(x, kind)                                                                # (B, N)
        ranked = (places.tile > 0) if layout.canvas_tokens else (places.tile == 0)                   # (N,)
        spread = spread_over_canvas(thumbnail_map(local, layout), layout)
        score = (1 - self.alpha) * _unit(local * ranked) + self.alpha * _unit(spread * ranked)
        score = _smooth(score, layout, self.smooth)
        if self.redundancy:
            repeats = redundancy(x.features, score, ranked, layout)
            score = score * (1 - repeats.float()) ** self.redundancy
        if layout.canvas_tokens:
            share = (k / layout.tokens) ** 4 if self.thumbnail is None else self.thumbnail
            score = torch.where(ranked, score, _thumbnail_first(local, layout, round(share * layout.thumbnail_tokens)))
        return select(x, keep_with_newlines(score, places, k, self.newlines))


def _thumbnail_first(scores: Tensor, layout: ImageLayout, count: int) -> Tensor:
    """Scores that put the thumbnail's best `count` tokens before every crop token and the rest behind. (B, N)"""
    rank = ranks(scores[:, :layout.thumbnail_tokens])
    own = torch.where(rank < count, 1e3, -1e3) - rank
    return F.pad(own, (0, layout.tokens - layout.thumbnail_tokens))


def _unit(scores: Tensor) -> Tensor:
    return scores / scores.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _smooth(scores: Tensor, layout: ImageLayout, width: int) -> Tensor:
    """Horizontal mean over `width` tokens of one row. (B, N)"""
    if width == 1:
        return scores

    def mean(grid: Tensor) -> Tensor:                                                                # (B, rows, columns)
        return F.avg_pool2d(grid[:, None], (1, width), 1, (0, width // 2), count_include_pad=False)[:, 0]

    own = mean(thumbnail_map(scores, layout)).flatten(1)
    if not layout.canvas_tokens:
        return F.pad(own, (0, layout.newline_tokens))
    newline = int(layout.newlines)
    rows, columns = layout.size
    canvas = scores[:, layout.thumbnail_tokens:].unflatten(1, (rows, columns + newline))[:, :, :columns]
    return torch.cat([own, F.pad(mean(canvas), (0, newline)).flatten(1)], 1)
