"""How much a patch matters by itself: the score maps that several methods share."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..tokens import Tokens

Scores = Literal["auto", "attention", "logits", "cosine"]
SCORES = ("auto", "attention", "logits", "cosine")


def patch_scores(x: Tokens, kind: Literal["attention", "logits", "cosine"], layer: int = -1) -> Tensor:
    """Score of every token, 0 at newlines. (B, N) float32

    "attention", "logits": the [CLS] row of a vision layer. "cosine": distinctness for towers without [CLS].
    """
    if kind == "attention":
        return x.cls_attention(layer)
    if kind == "logits":
        return x.cls_logits(layer)
    return distinctness(x)


def distinctness(x: Tokens) -> Tensor:
    """1 - cos(token, mean of its tile), scaled to sum to 1 over each tile. (B, N) float32, 0 at newlines.

    Ranks as the negative cosine does, and is a distribution as [CLS] attention is. Read from the projected features.
    """
    features, places = x.features.detach().float(), x.places
    member = F.one_hot(places.tile.clamp_min(0), x.layout.tiles).to(features.dtype) * places.is_patch[:, None]  # (N, T)
    mean = member.T @ features                                                                       # (B, T, D), up to scale
    score = 1 - F.cosine_similarity(features, member @ mean, dim=-1)                                 # (B, N)
    score = score.masked_fill(~places.is_patch, 0)
    total = (score @ member).clamp_min(1e-12)                                                        # (B, T)
    return score / (total @ member.T).masked_fill(~places.is_patch, 1)
