"""2-D average pooling of thumbnail and canvas: what a projector with a larger stride would give (baseline)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..ops.pooling import average_by_slot, even_split, grid_cells, slots_on_device
from ..tokens import ImageLayout, ImageReducer, Reduction, Tokens


@dataclass(frozen=True)
class AveragePool(ImageReducer):
    """Average neighbouring tokens into cells, thumbnail and canvas alike.

    The cells partition each grid: both sides shrink by about sqrt(keep), and row widths differ by at most one cell, so
    that any budget is met exactly. Each row of canvas cells keeps one newline. `mass` is the tokens in a cell.
    """

    def reduce(self, x: Tokens, k: int) -> Reduction:
        slot, index = slots_on_device(pooled_slots, x.features.device, x.layout, k)
        tokens, mass = average_by_slot(x.features, slot, k)
        batch = len(x.features)
        return Reduction(tokens=tokens, index=index.expand(batch, -1), source=slot.expand(batch, -1),
                         mass=mass.expand(batch, -1))


def pooled_slots(layout: ImageLayout, k: int) -> tuple[list[int], list[int]]:
    """The output slot of each of the N tokens (-1: dropped), and for each slot the position nearest its cell's middle."""
    rows, columns = layout.size
    newline = int(layout.newlines)
    of_canvas = layout.tokens - layout.thumbnail_tokens
    for_canvas = min(round(k * of_canvas / layout.tokens), k - 1, of_canvas) if layout.canvas_tokens else 0
    if for_canvas < 1 + newline:
        for_canvas = 0
    for_thumbnail = k - for_canvas
    if for_thumbnail > layout.thumbnail_tokens:                     # a thumbnail alone keeps its newline at the very end
        for_thumbnail = layout.thumbnail_tokens
        for_canvas = k - for_thumbnail
    slots = [c for line in grid_cells(*layout.tile, _widths(*layout.tile, for_thumbnail, 0)) for c in line]
    if layout.canvas_tokens and for_canvas:
        widths = _widths(rows, columns, for_canvas, newline)
        band = [i for i, size in enumerate(even_split(rows, len(widths))) for _ in range(size)]
        for r, cells in enumerate(grid_cells(rows, columns, widths)):
            start = for_thumbnail + band[r] * newline               # newlines of the bands above
            slots += [start + c for c in cells]
            if newline:
                slots.append(start + cells[-1] + 1)
    else:                                                           # newlines alone, or a canvas that nothing is left for
        slots += [for_thumbnail + i if i < for_canvas else -1 for i in range(of_canvas)]
    places: list[list[int]] = [[] for _ in range(k)]
    for place, slot in enumerate(slots):
        if slot >= 0:
            places[slot].append(place)
    return slots, [_middle(p) for p in places]


def _middle(places: list[int]) -> int:
    return places[len(places) // 2]


def _widths(rows: int, columns: int, budget: int, newline: int) -> list[int]:
    """Cells of each band so that cells and newlines come to `budget`: about sqrt of the ratio on either side."""
    ratio = budget / (rows * (columns + newline))
    bands = round(rows * math.sqrt(ratio))
    least = -(-budget // (columns + newline))                       # fewer bands could not hold the budget
    most = budget // (1 + newline)                                  # more would leave a band empty
    bands = max(1, least, min(bands, most, rows))
    return even_split(budget - bands * newline, bands)
