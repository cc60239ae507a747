"""StagePool: LLaVolta's visual context compressor, average pooling inside the language model (Chen et al., NeurIPS 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from ..errors import SignalError
from ..layout import SequenceLayout
from ..ops.pooling import average_by_slot, slots_on_device
from ..tokens import ImageLayout, Layout, Reduction, Tokens, identity
from .base import LayerReducer, Positions, Step, check_layer, check_positions


@dataclass(frozen=True)
class StridedPool:
    """Average each run of `stride` tokens (dims=1), or each block of about that many on the picture (dims=2).

    In 1-D, runs follow the packed sequence as the language model reads it; the last one may be shorter (`avg_pool1d`, which the
    authors call, would drop it; their 576 tokens divide evenly). In 2-D a block has a x b places, a the largest divisor of
    `stride` with a <= b, inside the thumbnail or on the unpadded canvas; newlines of pooled rows are averaged among
    themselves. A pooled token stands for the middle one of its block: floor of the mean position, as published.
    """

    stride: int
    dims: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        if isinstance(self.stride, bool) or not isinstance(self.stride, int) or self.stride < 1:
            raise ValueError(f"stride={self.stride!r}: how many tokens become one, 1 or more")
        if self.dims not in (1, 2):
            raise ValueError(f"dims={self.dims!r}: 1 (runs of the sequence, as published) or 2 (blocks of the picture)")

    def count(self, layout: Layout) -> int:
        return len(pooled_blocks(layout, self.stride, self.dims)[1])

    def __call__(self, x: Tokens) -> Reduction:
        if self.stride == 1:
            return identity(x)
        slot, index = slots_on_device(pooled_blocks, x.features.device, x.layout, self.stride, self.dims)
        tokens, mass = average_by_slot(x.features, slot, len(index))
        batch = len(x.features)
        return Reduction(tokens=tokens, index=index.expand(batch, -1), source=slot.expand(batch, -1),
                         mass=mass.expand(batch, -1))


@dataclass(frozen=True)
class StagePool(LayerReducer):
    """Average-pool the hidden states of every picture at the input of decoder layer K.

    layer      K, counted from 0 (LLaVolta: 2 heavy, 16 light, of 32)
    stride     how many tokens become one
    dims       1: runs of the sequence, as published; 2: blocks of the picture
    positions  pooled tokens stand at the mean of their positions, rounded down, and text keeps its own ("original", as
               published; the code averages in float16, inexact from 1,024 on: not reproduced); or "closed"
    """

    layer: int = 2
    stride: int = 8
    dims: Literal[1, 2] = 1
    positions: Positions = "original"

    def __post_init__(self) -> None:
        check_layer("StagePool", self.layer)
        check_positions(self.positions)
        self.pool                                                               # noqa: B018

    @property
    def pool(self) -> StridedPool:
        return StridedPool(self.stride, self.dims)

    def steps(self) -> tuple[Step, ...]:
        return (Step(self.layer, self.pool, positions=self.positions),)


@lru_cache(maxsize=256)
def pooled_blocks(layout: Any, stride: int, dims: int) -> tuple[list[int], list[int]]:
    """The slot of each of the N tokens, and for each slot the token in the middle of its block."""
    keys = _blocks(layout, stride) if dims == 2 else [(i // stride,) for i in range(layout.tokens)]
    slot_of = {key: slot for slot, key in enumerate(dict.fromkeys(keys))}
    members: list[list[int]] = [[] for _ in slot_of]
    for place, key in enumerate(keys):
        members[slot_of[key]].append(place)
    return [slot_of[key] for key in keys], [_middle(places, layout, dims) for places in members]


def _middle(places: list[int], layout: Any, dims: int) -> int:
    if dims == 1 or len(places) == 1:
        return (places[0] + places[-1]) // 2
    rows = len({place_row(layout, p) for p in places})
    columns = len(places) // rows
    return places[(rows - 1) // 2 * columns + (columns - 1) // 2]


def place_row(layout: ImageLayout, place: int) -> int:
    """Row of a token within the thumbnail or the unpadded canvas."""
    if place < layout.thumbnail_tokens:
        return place // layout.tile[1]
    return (place - layout.thumbnail_tokens) // max(1, layout.size[1] + int(layout.newlines))


def _blocks(layout: Any, stride: int) -> list[tuple[Any, ...]]:
    """A key for the block of each token, in sequence order."""
    if not isinstance(layout, ImageLayout):
        if isinstance(layout, SequenceLayout):
            layout.places()                                                     # raises: no geometry is left
        raise SignalError("StagePool(dims=2) averages blocks of a picture, and this call holds a clip or a recording; pass "
                          "dims=1, which averages runs of any sequence")
    a = max(d for d in range(1, int(stride**0.5) + 1) if stride % d == 0)
    b = stride // a
    height, width = layout.tile
    keys: list[tuple[Any, ...]] = [("thumbnail", r // a, c // b) for r in range(height) for c in range(width)]
    if not layout.crops:
        return keys + [("newline",)] * layout.newline_tokens
    rows, columns = layout.size
    for r in range(rows):
        keys += [("canvas", r // a, c // b) for c in range(columns)]
        keys += [("newline", r // a)] * int(layout.newlines)
    return keys
