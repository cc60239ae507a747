"""SpeechPrune: what resembles the question, then what the first layer would attend to (Lin et al., arXiv 2412.12009, 2024).

The paper's. Phase 1: g_i is the mean cosine of token i to the question's tokens, summed over frames of one second; the softmax
p over frames gives frame j floor(K1 p_j) tokens, those of largest g. Phase 2: Q' = sign(S) sign(W_Q), K' = sign(S) sign(W_K)
with the first decoder layer's weights, A = softmax(Q' K'^T / sqrt(d)) among the K1 tokens, without mask, norm, bias or
rotation; the k tokens of largest mean of A stay. There is no public code.

Ours, where the paper is silent or cannot be meant. A mean of A over keys is 1 / K1 for every token, so the mean here is over
heads and querying tokens: the attention a token receives. Its rows are nearly one-hot, so many tokens receive exactly 0; ties
go to the larger g, then to the earlier token. Counts are exact: a frame holds no more than its tokens, the others share what it
leaves, and what the floors lose goes to the largest remainders. A sum over a short frame is scaled up to a second's. K1 is
sqrt(N k) by default; the paper's is 750, the 30 s its model takes, whatever k is. A question is all text behind the recording,
the template's tokens included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budget import check_keep, keep_count
from ..layout import AudioLayout
from ..ops.ranking import mask_to_index, ranks, ranks_within
from ..tokens import Reduction, Tokens, select
from .base import AudioReducer, evenly

TILE = 1024         # querying tokens whose attention is held at once, of one head


@dataclass(frozen=True)
class SpeechPrune(AudioReducer):
    """Keep what the question is about. The time and, up to a tile, memory of H attention maps of K1 x K1, before the model.

    first   K1, the tokens that phase 1 leaves to phase 2: a share of the recording's or a count, never less than are kept in
            the end; 1.0: phase 2 alone. None: the geometric mean of both. Without a question they are evenly spaced
    """

    first: float | int | None = None

    reads_question: ClassVar[bool] = True
    reads_first_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first is not None:
            check_keep(self.first, "first")

    def reduce_sound(self, x: Tokens, k: int) -> Reduction:
        query, key = x.first_layer()
        features, n = x.features.detach(), x.layout.length
        g, asked = similarity(features, x.question, x.question_mask)
        wanted = round(math.sqrt(n * k)) if self.first is None else keep_count(n, self.first)
        index = evenly(n, max(k, wanted), features.device).expand(len(features), -1)                 # (B, K1)
        if index.shape[1] < n:
            index = torch.where(asked, by_frames(g, x.layout, index.shape[1]), index)
        some = features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))
        best = first_by(received(some, query, key), g.gather(1, index))[:, :k]
        return select(x, index.gather(1, best).sort(1).values)


def similarity(features: Tensor, question: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean cosine of each token to the question's. features (B, N, D), question (B, Q, D), mask (B, Q) bool, None: all real

    -> (B, N) float32, 0 where there is no question, and whether there is one, (B, 1) bool
    """
    if question is None:
        return torch.zeros_like(features[..., 0], dtype=torch.float32), features.new_zeros(len(features), 1, dtype=torch.bool)
    real = torch.ones_like(question[..., 0], dtype=torch.bool) if mask is None else mask
    count = real.sum(1, keepdim=True)
    text = F.normalize(question.detach().float(), dim=-1).masked_fill(~real[..., None], 0).sum(1) / count.clamp_min(1)
    return torch.einsum("bnd,bd->bn", F.normalize(features.float(), dim=-1), text), count > 0


def by_frames(g: Tensor, layout: AudioLayout, k: int) -> Tensor:
    """Phase 1: the tokens of largest g of each second, as many as its share. g (B, N) -> (B, k) int64, ascending"""
    n, rate = layout.length, layout.rate
    frames = int((n - 1) / rate) + 1
    frame = (torch.arange(n, device=g.device) / rate).long().clamp(max=frames - 1)
    size = torch.zeros(frames, dtype=torch.int64, device=g.device).index_add(0, frame, torch.ones_like(frame))
    mean = torch.zeros(len(g), frames, device=g.device).index_add(1, frame, g) / size.clamp_min(1)
    share = shares((rate * mean).softmax(1), size, k)                                                # (B, frames)
    return mask_to_index(ranks_within(g, frame) < share[:, frame], k)


def shares(p: Tensor, size: Tensor, total: int) -> Tensor:
    """`total` tokens to frames that hold `size`: floor(theta p) each, and one more for the largest remainders.

    With theta the theta p, cut off at `size`, sum to `total`; where no frame is full, theta = total.
    p (B, G) float32 > 0, size (G,) int64, total <= its sum -> (B, G) int64, sum `total`; of equals the earlier has more
    """
    p = p.clamp_min(1e-30)
    order = (size / p).argsort(dim=1, stable=True)                                                   # which are full first
    some, sizes = p.gather(1, order), size[order]
    left = some.flip(1).cumsum(1).flip(1)
    theta = ((total - (sizes.cumsum(1) - sizes)) / left).amax(1, keepdim=True)      # it rises while the frames before are full
    quota = torch.minimum(p * theta, size)
    whole = quota.long()
    remainder = (quota - whole).masked_fill(whole == size, -1.0)
    return whole + (ranks(remainder) < total - whole.sum(1, keepdim=True))


def received(tokens: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Phase 2: attention that each token receives under binarised tokens and weights, mean over heads and querying tokens.

    tokens (B, N, D), query (H, d, D), key (H_kv, d, D) -> (B, N) float32. Head by head, in tiles of queries.
    """
    signs, scale = tokens.sign().float(), query.shape[1] ** -0.5
    project = lambda w: signs @ w.sign().float().T  # noqa: E731                                      (B, N, d), exact integers
    total = torch.zeros_like(signs[..., 0])
    for heads, w in zip(query.unflatten(0, (len(key), -1)), key):
        keys = project(w).transpose(1, 2)
        for head in heads:
            for rows in project(head).split(TILE, 1):
                total = total + (rows @ keys * scale).softmax(-1).sum(1)
    return total / (len(query) * tokens.shape[1])


def first_by(score: Tensor, tie: Tensor) -> Tensor:
    """Positions in the order of their scores, of equals the larger `tie` first, then the earlier. (B, N) -> (B, N) int64"""
    order = tie.argsort(dim=1, descending=True, stable=True)
    return order.gather(1, score.gather(1, order).argsort(dim=1, descending=True, stable=True))
