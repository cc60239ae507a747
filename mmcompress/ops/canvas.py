"""Between the thumbnail's score map and the crops of its canvas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens import ImageLayout


def thumbnail_map(scores: Tensor, layout: ImageLayout) -> Tensor:
    """The thumbnail's part of (B, N) scores as a map. (B, tile rows, tile columns)"""
    return scores[:, :layout.thumbnail_tokens].unflatten(1, layout.tile)


def spread_over_canvas(thumbnail: Tensor, layout: ImageLayout) -> Tensor:
    """Resize a thumbnail map bilinearly onto the unpadded canvas: each token's global score.

    thumbnail (B, h, w) -> (B, N): the thumbnail's tokens keep their own value, newlines get 0.
    """
    own = thumbnail.flatten(1)
    if not layout.canvas_tokens:
        return F.pad(own, (0, layout.newline_tokens))
    canvas = F.interpolate(thumbnail[:, None], size=layout.size, mode="bilinear", align_corners=False)[:, 0]
    return torch.cat([own, F.pad(canvas, (0, int(layout.newlines))).flatten(1)], 1)


def _overlap(crops: int, tile: int, valid: tuple[int, int], cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """How much of each of the thumbnail's `cells` along one axis each crop shows. -> (crops, cells), (crops,) extents"""
    first, end = valid
    edge = torch.arange(crops + 1, device=device, dtype=torch.float32) * tile
    edge = (edge.clamp(first, end) - first) * (cells / (end - first))       # the thumbnail shows exactly first..end
    cell = torch.arange(cells, device=device, dtype=torch.float32)
    shown = (torch.minimum(edge[1:, None], cell + 1) - torch.maximum(edge[:-1, None], cell)).clamp_min(0)
    return shown, edge[1:] - edge[:-1]


def crop_mass(thumbnail: Tensor, layout: ImageLayout) -> tuple[Tensor, Tensor]:
    """Mass of a thumbnail map over the part that each crop really shows.

    Padding-aware: the thumbnail has no padding while the canvas has, so a crop's block is where its unpadded part
    lies, cut at fractions of a cell. Where crops show unequal areas the mass is scaled to the mean area, since it sets
    a rate per token. With equal areas this is the plain block sum.

    thumbnail (B, h, w) -> mass (B, crops) float32, shown (crops,) bool: False for a crop of padding alone.
    """
    device = thumbnail.device
    down, height = _overlap(layout.grid[0], layout.tile[0], layout.rows, layout.tile[0], device)
    across, width = _overlap(layout.grid[1], layout.tile[1], layout.columns, layout.tile[1], device)
    mass = torch.einsum("gh,bhw,kw->bgk", down, thumbnail.float(), across).flatten(1)
    area = (height[:, None] * width[None]).flatten()
    shown = area > 0
    mean_area = area.sum() / shown.sum()
    return mass * (mean_area / area.clamp_min(1e-6)) * shown, shown


def crop_tokens(layout: ImageLayout, device: torch.device) -> Tensor:
    """Unpadded tokens of each crop. (crops,) float32; of a resized canvas, its share of them"""
    def extent(crops: int, tile: int, valid: tuple[int, int]) -> Tensor:
        edge = (torch.arange(crops + 1, device=device) * tile).clamp(*valid)
        return edge[1:] - edge[:-1]

    rows, columns = (extent(g, t, v) for g, t, v in zip(layout.grid, layout.tile, (layout.rows, layout.columns)))
    tokens = (rows[:, None] * columns[None]).flatten().float()
    return tokens if layout.resized is None else tokens * (layout.canvas_tokens / tokens.sum().clamp_min(1))
