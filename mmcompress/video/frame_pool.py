"""Frame pooling: averages over blocks of time and space, what a model with larger strides would read (baseline)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..ops.pooling import average_by_slot, even_split, grid_cells, slots_on_device
from ..tokens import Reduction, Tokens, VideoLayout, VideoReducer


@dataclass(frozen=True)
class FramePool(VideoReducer):
    """Average neighbouring cells into blocks that partition the clip; any budget is met exactly.

    axes   "time": runs of frames are averaged position by position, frames stay sharp, and only a budget below one frame
           shrinks them; "space": every frame is shrunk alike; "both" (default): time and both sides of a frame by about the
           cube root of the share

    `mass` is the cells in a block. Leading tokens of frames ([CLS]) are averaged over the run, and dropped first.
    """

    axes: Literal["time", "space", "both"] = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axes not in ("time", "space", "both"):
            raise ValueError(f"axes={self.axes!r}: 'time', 'space' or 'both'")

    def reduce_frames(self, x: Tokens, k: int) -> Reduction:
        slot, index = slots_on_device(pooled_slots, x.features.device, x.layout, k, self.axes)
        tokens, mass = average_by_slot(x.frames.flatten(1, 2), slot, k)
        batch = len(x.features)
        return Reduction(tokens=tokens, index=index.expand(batch, -1), source=slot.expand(batch, -1),
                         mass=mass.expand(batch, -1))


def pooled_slots(layout: VideoLayout, k: int, axes: str) -> tuple[list[int], list[int]]:
    """The output slot of each of the T * P cells, and for each slot its representative cell, ascending."""
    t, p = layout.frames, layout.cells
    share = {"time": k / (t * p), "space": 1.0, "both": (k / (t * p)) ** (1 / 3)}[axes]
    runs = min(t, k, max(1, -(-k // p), round(t * share)))
    budgets = even_split(k, runs)
    members: list[list[int]] = []
    at = 0
    for frames, budget in zip(even_split(t, runs), budgets):
        cells = _frame_cells(layout, budget)
        blocks: list[list[int]] = [[] for _ in range(budget)]
        for frame in range(at, at + frames):
            for place, cell in enumerate(cells):
                if cell >= 0:
                    blocks[cell].append(frame * p + place)
        members += blocks
        at += frames
    members.sort(key=lambda block: block[len(block) // 2])
    slot = [-1] * (t * p)
    for number, block in enumerate(members):
        for cell in block:
            slot[cell] = number
    return slot, [block[len(block) // 2] for block in members]


def _frame_cells(layout: VideoLayout, budget: int) -> list[int]:
    """The block of each cell of a frame, `budget` of them; -1: in none."""
    rows, columns = layout.grid
    lead = min(layout.lead, max(0, budget - 1), max(int(layout.lead > 0), round(budget * layout.lead / layout.cells)))
    grid = budget - lead
    if grid > rows * columns:
        lead, grid = budget - rows * columns, rows * columns
    bands = max(1, -(-grid // columns), min(rows, grid, round(rows * math.sqrt(grid / (rows * columns)))))
    cells = [c for line in grid_cells(rows, columns, even_split(grid, bands)) for c in line]
    leading = [i * lead // layout.lead for i in range(layout.lead)] if lead else [-1] * layout.lead
    return leading + [lead + c for c in cells]
