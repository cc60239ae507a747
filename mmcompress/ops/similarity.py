"""How much tokens repeat each other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tokens import ImageLayout


def redundancy(features: Tensor, rank: Tensor, among: Tensor, layout: ImageLayout) -> Tensor:
    """Likeness of each token to the most alike token of its tile that ranks before it.

    Cosine of the features, centred on their mean over the picture, clamped to [0, 1]; 0 for the best of a tile. Compared
    within a tile: n^2 memory of one tile, not of the picture, and what lies in the same tile is what repeats.

    features (B, N, D), rank (B, N) int64, among (N,) bool: the tokens that count -> (B, N) float32
    """
    batch, n, width = features.shape
    places, tiles, per_tile = layout.places(features.device), layout.tiles, layout.thumbnail_tokens
    weight = among.to(features.dtype)
    centred = features - ((weight / weight.sum()) @ features)[:, None]                 # in the model's dtype: D is wide
    unit = centred / torch.linalg.vector_norm(centred, dim=-1, keepdim=True, dtype=torch.float32).clamp_min(1e-6).to(centred)
    slot = torch.where(among, places.patch, tiles * per_tile)                          # what does not count goes to the end
    by_tile = unit.new_zeros(batch, tiles * per_tile + 1, width).index_copy(1, slot, unit)[:, :-1]
    rank_by_tile = torch.full((batch, tiles * per_tile + 1), n, device=rank.device).index_copy(1, slot, rank)[:, :-1]
    by_tile, rank_by_tile = (t.unflatten(1, (tiles, per_tile)) for t in (by_tile, rank_by_tile))
    likeness = by_tile @ by_tile.transpose(2, 3)                                                     # (B, T, P, P)
    earlier = rank_by_tile[..., None, :] < rank_by_tile[..., None]
    most = likeness.masked_fill(~earlier, 0).amax(-1).clamp(0, 1)                                    # (B, T, P)
    return most.flatten(1).float().index_select(1, places.patch) * among
