"""How much tokens repeat each other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tokens import ImageLayout
from .ranking import ranks_within


def redundancy(features: Tensor, scores: Tensor, among: Tensor, layout: ImageLayout) -> Tensor:
    """Likeness of each token to the most alike token of its tile that scores higher (of equals: that comes first).

    Cosine of the features, centred on their mean over the picture, clamped to [0, 1]; 0 for the best of a tile. Compared
    within a tile: n^2 memory of one tile, not of the picture, and what lies in the same tile is what repeats.

    features (B, N, D), scores (B, N), among (N,) bool: the tokens that count, of whole tiles -> (B, N) in features' dtype
    """
    batch, _, width = features.shape
    tile, per_tile = layout.places(features.device).tile, layout.thumbnail_tokens
    first = int(layout.canvas_tokens > 0)                                              # the thumbnail does not take part
    tiles = layout.tiles - first
    features = features.detach()                                                       # it ranks, and ranks have no gradient
    weight = among.to(features.dtype)
    centred = features - ((weight / weight.sum()) @ features)[:, None]                 # in the model's dtype: D is wide
    unit = centred / torch.linalg.vector_norm(centred, dim=-1, keepdim=True, dtype=torch.float32).clamp_min(1e-6).to(centred)
    group = torch.where(among, tile - first, -1)
    slot = torch.where(among, group * per_tile + ranks_within(scores, group), tiles * per_tile)      # (B, N), best first
    by_rank = unit.new_zeros(batch, tiles * per_tile + 1, width).scatter(1, slot[..., None].expand_as(unit), unit)
    by_rank = by_rank[:, :-1].unflatten(1, (tiles, per_tile))                                        # (B, T, P, D)
    most = (by_rank @ by_rank.transpose(2, 3)).tril_(-1).amax(-1).clamp(0, 1).flatten(1)             # (B, T * P)
    return most.gather(1, slot.clamp_max(tiles * per_tile - 1)) * weight
