"""How much an item has to say: the number of its tokens that the ones before do not say already."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .hashing import hashed

SKETCH = 128            # directions that features are projected on before they are compared
BLOCK = 1024            # tokens that are compared with all earlier ones at a time


def distinct_tokens(features: Tensor) -> Tensor:
    """Sum over the tokens of 1 - the largest cosine to an earlier token. features (B, N, D) -> (B,) float32, from 1 to N

    A token that repeats an earlier one adds nothing, so a still clip counts as one of its frames, silence as one token; a
    cosine below 0 counts as 0. Wide features are compared in a sketch: a fixed projection on random signs, which keeps
    cosines to about 1 / sqrt(128). Blocks of tokens are compared at a time, so memory is linear in N. Ours.
    """
    x = features.detach().float()
    if x.shape[-1] > SKETCH:
        x = x @ _signs(x.shape[-1], x.device)
    x = F.normalize(x, dim=-1)
    n = x.shape[1]
    place = torch.arange(n, device=x.device)
    total = x.new_zeros(len(x))
    for at in range(0, n, BLOCK):
        rows = place[at:at + BLOCK]
        like = x[:, at:at + BLOCK] @ x[:, :at + BLOCK].transpose(1, 2)                               # (B, block, earlier)
        earlier = place[:like.shape[-1]] < rows[:, None]
        nearest = like.masked_fill(~earlier, 0).amax(-1).clamp(0, 1)
        total = total + (1 - nearest).sum(-1)
    return total


def _signs(width: int, device: torch.device) -> Tensor:
    """A fixed matrix of random signs (width, SKETCH) float32."""
    rank = hashed(torch.arange(width * SKETCH, device=device), 0).view(width, SKETCH)
    return torch.where(rank >= rank.median(), 1.0, -1.0)
