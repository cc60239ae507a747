"""GlobalCom2: the thumbnail commands how much of each crop stays (Liu et al., "Compression with Global Guidance", 2025).

The paper's: (a) the thumbnail keeps the tokens of highest [CLS] attention; (b) crop j keeps the share
r_j = R (1 + sigma_j - 1/n), sigma the softmax of the thumbnail's score mass over each crop; (c) a crop token's score
is alpha G + (1 - alpha) L, G the thumbnail's map resized bilinearly onto the crops, L the crop's own [CLS] attention;
without [CLS], the negative cosine to the mean stands in. Ours: mass relative to its mean, so that the temperature bites
under softmaxed attention (with the paper's tau = 10 and block sums below 1 the budgets are uniform to 1 %); blocks that
follow the unpadded picture; one exact total, newline tokens included, by apportionment instead of floors.
The code's (`paper_code=True`): attention logits of the last layer, tau = 10, L2-normalised maps summed without alpha,
floor counts, every newline kept unpaid, the thumbnail in score order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budget import keep_count
from ..ops.canvas import crop_mass, crop_tokens, spread_over_canvas, thumbnail_map
from ..ops.ranking import NewlinePolicy, apportion, check_newline_budget, check_newlines, keep_with_newlines, ranks_within
from ..ops.scores import SCORES, Scores, patch_scores
from ..tokens import ImageLayout, ImageReducer, Reduction, Tokens, identity, select


@dataclass(frozen=True)
class GlobalCom2(ImageReducer):
    """Thumbnail-guided pruning of a picture's crops.

    keep         share of the picture's tokens, newlines included, or an exact count
    temperature  of the softmax over crops; smaller moves more tokens to the crops the thumbnail attends to. Relative to
                 the mean block mass for scores that are distributions ("attention", "cosine"; default 0.5), absolute
                 for "logits" (default 10, as the authors' code has it)
    alpha        weight of the thumbnail's score in a crop token's score, in [0, 1]; the paper's 0.5
    scores       "auto": "attention" where the vision tower has a [CLS] token, else "cosine"; "logits": before softmax
    newlines     "kept": the newline of each row that keeps a token, "all", "none"; all of them paid from the budget
    paper_code   select exactly the patches that the authors' public code selects for one picture. Takes `keep` as a
                 ratio and no other argument. The count then depends on the data: `count` is its upper bound and
                 `Reduction.valid` marks the tokens that exist, which costs one host synchronisation on packing. On padded
                 pictures the sequence is still ours: the authors also emit newlines for rows of padding, which
                 transformers never packs; where padding lies left and right they put kept patches back by their number
                 among the unpadded ones, hence on wrong rows; and they truncate sizes where transformers rounds
    """

    temperature: float | None = None
    alpha: float = 0.5
    scores: Scores = "auto"
    newlines: NewlinePolicy = "kept"
    paper_code: bool = False

    captures: ClassVar[tuple[int, ...]] = (-1,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_newlines(self.newlines)
        if self.scores not in SCORES:
            raise ValueError(f"scores={self.scores!r}: one of {', '.join(SCORES)}")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: must be positive")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: lies in [0, 1]")
        if self.paper_code:
            given = (self.temperature, self.alpha, self.scores, self.newlines)
            if given != (None, 0.5, "auto", "kept"):
                raise ValueError("paper_code=True fixes temperature, alpha, scores and newlines; leave them out")
            if isinstance(self.keep, int):
                raise ValueError(f"keep={self.keep}: paper_code=True takes a ratio, as the authors' code does")

    @property
    def count_is_bound(self) -> bool:
        return self.paper_code

    def count(self, layout: ImageLayout) -> int:
        if self.paper_code:
            return _paper_code_bound(layout, float(self.keep))
        k = keep_count(layout.tokens, self.keep)
        check_newline_budget(layout, k, self.newlines)
        return k

    def reduce(self, x: Tokens, k: int) -> Reduction:
        if self.paper_code:
            return _paper_code(x, float(self.keep), k)
        layout, places = x.layout, x.places
        kind: Literal["attention", "logits", "cosine"] = (
            ("attention" if x.has_cls() else "cosine") if self.scores == "auto" else self.scores)
        local = patch_scores(x, kind)                                                   # (B, N)
        thumbnail = thumbnail_map(local, layout)
        guided = self.alpha * spread_over_canvas(thumbnail, layout) + (1 - self.alpha) * local
        weight = torch.full_like(local[:, :1], layout.thumbnail_tokens)
        if layout.canvas_tokens:
            mass, shown = crop_mass(thumbnail, layout)
            weight = torch.cat([weight, crop_tokens(layout, local.device) * self._rates(mass, shown, kind)], 1)
        ranking = apportion(guided, places.tile, weight)
        return select(x, keep_with_newlines(ranking, places, k, self.newlines))

    def _rates(self, mass: Tensor, shown: Tensor, kind: str) -> Tensor:
        """r_j / R = 1 + sigma_j - 1/n over the crops that show anything. (B, crops)"""
        n = shown.sum()
        if kind == "logits":
            heat = mass / (10.0 if self.temperature is None else self.temperature)
        else:
            mean = mass.sum(1, keepdim=True) / n
            heat = mass / mean.clamp_min(1e-12) / (0.5 if self.temperature is None else self.temperature)
        sigma = heat.masked_fill(~shown, -torch.inf).softmax(1)
        return (1 + sigma - 1 / n) * shown


def _paper_code_bound(layout: ImageLayout, keep: float) -> int:
    """The most tokens that the authors' rule can keep: every crop at its largest rate, R (2 - 1/n)."""
    if not layout.canvas_tokens or keep == 1.0:
        return layout.tokens
    rate = min(1.0, keep * (2 - 1 / layout.crops))
    sizes = crop_tokens(layout, torch.device("cpu")).tolist()
    return int(layout.thumbnail_tokens * keep) + sum(int(n * rate + 1e-6) for n in sizes) + layout.newline_tokens


def _paper_code(x: Tokens, keep: float, bound: int) -> Reduction:
    """The authors' selection (llava/model/llava_arch.py of their repository), vectorised over a batch."""
    layout, places = x.layout, x.places
    if not layout.canvas_tokens:
        return identity(x)                                          # a single tile is not compressed there
    logits = x.cls_logits(-1)                                                                        # (B, N)
    batch, n = logits.shape
    device = logits.device
    thumbnail = thumbnail_map(logits, layout)

    # crop budgets: block sums with floor division, the remainder in the last block, in float64 as numpy does
    (down, across), (height, width) = layout.grid, layout.tile
    row = (torch.arange(height, device=device) // max(height // down, 1)).clamp_max(down - 1)
    column = (torch.arange(width, device=device) // max(width // across, 1)).clamp_max(across - 1)
    block = (row[:, None] * across + column).flatten().expand(batch, -1)
    sums = torch.zeros(batch, layout.crops, dtype=torch.float64, device=device)
    sums = sums.scatter_add(1, block, thumbnail.flatten(1).double())
    heat = ((sums - sums.amax(1, keepdim=True)) / 10.0).exp()
    sigma = heat / (heat.sum(1, keepdim=True) + 1e-8)
    rate = (keep * (1 + sigma - sigma.mean(1, keepdim=True))).clamp_max(1.0)
    budget = (crop_tokens(layout, device).double() * rate).floor().long()                            # (B, crops)

    # crop scores: both maps L2-normalised over the crop's unpadded tokens, then summed
    spread = spread_over_canvas(thumbnail, layout)
    in_crop = F.one_hot(places.tile.clamp_min(0), layout.tiles)[:, 1:] * places.is_patch[:, None]    # (N, crops)
    in_crop = in_crop.to(logits.dtype)

    def normalise(scores: Tensor) -> Tensor:
        norm = (scores.square() @ in_crop).sqrt().clamp_min(1e-12)                                   # (B, crops)
        return scores / (norm @ in_crop.T).masked_fill(in_crop.sum(1) == 0, 1)

    score = torch.where(places.tile == 0, logits, normalise(logits) + normalise(spread))
    rank = ranks_within(score, places.tile)                                                          # (B, N)
    allowed = F.pad(budget, (1, 0), value=int(layout.thumbnail_tokens * keep)).index_select(1, places.tile.clamp_min(0))
    kept = torch.where(places.is_patch, rank < allowed, True)

    # order: the thumbnail by score, then the rest as it lies; what is not kept goes to the end and is invalid
    place = torch.arange(n, device=device).expand(batch, n)
    key = torch.where(places.tile == 0, rank, place)
    order = torch.where(kept, key, key + n).argsort(1)[:, :bound]
    valid = kept.gather(1, order)
    reduction = select(x, order)
    source = torch.where(kept, reduction.source, -1)
    return Reduction(tokens=reduction.tokens, index=order, source=source, valid=valid)
