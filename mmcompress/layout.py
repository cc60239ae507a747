"""How an item's tokens lie: a picture's canvas, a clip's frames, a recording's time, a sequence. Known before any data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .errors import SignalError


class Layout(ABC):
    """How the language-model tokens of one item lie. Hashable: items of equal layout are reduced in one batch."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """How many language-model tokens the item costs uncompressed."""

    @property
    def entered(self) -> int:
        """How many of its tokens entered the language model."""
        return self.tokens

    def places(self, device: torch.device | str = "cpu") -> Any:
        """Where each token lies; only layouts with a geometry tell."""
        raise SignalError("tokens of this picture were dropped or merged before, so their places on it are no longer a grid; "
                          "put the reducer that reads the geometry first, or use FastV, PyramidDrop or StagePool(dims=1)")


@dataclass(frozen=True)
class SequenceLayout(Layout):
    """What an earlier reduction left of an item: `length` tokens in reading order, without geometry."""

    length: int
    first: int                              # tokens of the item that entered the language model

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def entered(self) -> int:
        return self.first


@dataclass(frozen=True)
class ImageLayout(Layout):
    """A picture as a thumbnail, and crops that tile a canvas from which padding was cut (LLaVA-NeXT's `anyres`).

    With `grid=(0, 0)` there is the thumbnail alone (LLaVA-1.5, single-tile pictures). `newlines` says whether every
    canvas row (or, for a thumbnail alone, the whole) is closed by a newline token. Where a canvas was `resized`
    (LLaVA-OneVision shrinks large ones), a token counts for the crop and the patch that its middle lies on.
    """

    tile: tuple[int, int]                   # token rows and columns of one tile
    grid: tuple[int, int] = (0, 0)          # crops down and across
    rows: tuple[int, int] = (0, 0)          # canvas rows [first, end) that show the picture, not padding
    columns: tuple[int, int] = (0, 0)       # canvas columns likewise
    newlines: bool = False
    resized: tuple[int, int] | None = None  # rows and columns of the unpadded canvas after it was resized, if it was

    def __post_init__(self) -> None:
        height, width = self.canvas
        if min(self.tile) < 1 or not 0 <= self.rows[0] <= self.rows[1] <= height \
                or not 0 <= self.columns[0] <= self.columns[1] <= width:
            raise ValueError(f"{self}: rows and columns must lie on the {height} x {width} canvas of the crops")

    @property
    def canvas(self) -> tuple[int, int]:
        """Token rows and columns of the canvas, padding included."""
        return self.grid[0] * self.tile[0], self.grid[1] * self.tile[1]

    @property
    def size(self) -> tuple[int, int]:
        """Token rows and columns of the canvas that show the picture."""
        return self.resized or (self.rows[1] - self.rows[0], self.columns[1] - self.columns[0])

    @property
    def crops(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tiles(self) -> int:
        """Pictures the vision tower sees: the thumbnail and the crops."""
        return 1 + self.crops

    @property
    def thumbnail_tokens(self) -> int:
        return self.tile[0] * self.tile[1]

    @property
    def canvas_tokens(self) -> int:
        """Patches on the canvas. 0 without crops, and for slivers of pictures that padding swallows whole."""
        return self.size[0] * self.size[1]

    @property
    def newline_tokens(self) -> int:
        return (self.size[0] if self.crops else 1) if self.newlines else 0

    @property
    def patches(self) -> int:
        """Tokens that show a patch of the picture: all but the newlines."""
        return self.thumbnail_tokens + self.canvas_tokens

    @property
    def tokens(self) -> int:
        return self.patches + self.newline_tokens

    @property
    def nominal(self) -> int:
        """What papers often call 100 %: every patch of every tile, padding included."""
        return self.tiles * self.thumbnail_tokens

    def places(self, device: torch.device | str = "cpu") -> Places:
        """Where each of the N tokens lies, as tensors on `device` (cached)."""
        if torch.compiler.is_compiling():
            return _build_places(self, torch.device(device))
        return _places(self, torch.device(device))


@dataclass(frozen=True, eq=False)
class Places:
    """Where each of the N tokens of an `ImageLayout` lies. Newline tokens have tile -1 and patch 0."""

    tile: Tensor            # (N,) int64: 0 the thumbnail, 1.. the crops row by row, -1 a newline
    patch: Tensor           # (N,) int64: index into the tiles' patches laid end to end, (tiles * tile rows * columns)
    line: Tensor            # (N,) int64: number of the newline that closes the token's row; -1 if there is none
    newline: Tensor         # (newline_tokens,) int64: where newline number i stands in the sequence
    is_patch: Tensor        # (N,) bool


def _along(valid: tuple[int, int], size: int, device: torch.device) -> Tensor:
    """The canvas row (or column) that each of `size` rows shows in its middle. (size,) int64"""
    first, end = valid
    place = torch.arange(size, device=device)
    return first + ((2 * place + 1) * (end - first)) // (2 * size) if size else place


@dataclass(frozen=True)
class VideoLayout(Layout):
    """A clip as frames of equal grids, one after the other: cell by cell, row by row, frame by frame.

    frames   as the language model reads them; a model may have joined two of the file's into one
    grid     token rows and columns of a frame
    lead     tokens before each frame's grid that show no place ([CLS] in Video-LLaVA)
    tail     tokens after the last frame (LLaVA-OneVision's newline)

    A frame's `cells` are its leading tokens and its grid: what methods compare from frame to frame.
    """

    frames: int
    grid: tuple[int, int]
    lead: int = 0
    tail: int = 0

    def __post_init__(self) -> None:
        if self.frames < 1 or min(self.grid) < 1 or self.lead < 0 or self.tail < 0:
            raise ValueError(f"{self}: a clip has at least one frame of at least one token")

    @property
    def cells(self) -> int:
        """Tokens of one frame."""
        return self.lead + self.grid[0] * self.grid[1]

    @property
    def tile(self) -> tuple[int, int]:
        """What the vision tower's map of one frame is pooled to."""
        return self.grid

    @property
    def tiles(self) -> int:
        """Pictures the vision tower sees."""
        return self.frames

    @property
    def patches(self) -> int:
        """Tokens that show a place of a frame."""
        return self.frames * self.grid[0] * self.grid[1]

    @property
    def nominal(self) -> int:
        return self.patches

    @property
    def newline_tokens(self) -> int:
        """Tokens that show no place: leading ones and the tail."""
        return self.frames * self.lead + self.tail

    @property
    def tokens(self) -> int:
        return self.frames * self.cells + self.tail

    def places(self, device: torch.device | str = "cpu") -> VideoPlaces:
        """Where each of the N tokens lies, as tensors on `device`."""
        device = torch.device(device)
        number = torch.arange(self.tokens, device=device)
        cell = number % self.cells - self.lead
        within = number < self.frames * self.cells
        is_patch = within & (cell >= 0)
        where = lambda x: torch.where(is_patch, x, -1)  # noqa: E731
        return VideoPlaces(frame=torch.where(within, number // self.cells, -1), row=where(cell // self.grid[1]),
                           column=where(cell % self.grid[1]), is_patch=is_patch)


@dataclass(frozen=True, eq=False)
class VideoPlaces:
    """Where each of the N tokens of a `VideoLayout` lies: its (t, y, x). -1 where it has none."""

    frame: Tensor           # (N,) int64
    row: Tensor             # (N,) int64
    column: Tensor          # (N,) int64
    is_patch: Tensor        # (N,) bool


@dataclass(frozen=True)
class AudioLayout(Layout):
    """A recording as tokens of equal duration, one after the other.

    length  tokens, as the language model (or Whisper's decoder) reads them
    rate    tokens per second
    sound   how many of them, from the first, hear the recording; the rest hear the silence that fills a window of fixed length
            (Whisper). -1: all
    """

    length: int
    rate: float
    sound: int = -1

    def __post_init__(self) -> None:
        if self.sound == -1:
            object.__setattr__(self, "sound", self.length)
        if self.length < 1 or not self.rate > 0 or not 0 <= self.sound <= self.length:
            raise ValueError(f"{self}: a recording has at least one token, a positive rate, and 0 to `length` tokens of sound")

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def tail(self) -> int:
        """Tokens that hear the silence behind the recording."""
        return self.length - self.sound

    @property
    def seconds(self) -> float:
        """Duration that the tokens cover, the silence of a fixed window included."""
        return self.length / self.rate

    @property
    def patches(self) -> int:
        """Tokens that hear the recording."""
        return self.sound

    @property
    def nominal(self) -> int:
        return self.length

    @property
    def newline_tokens(self) -> int:
        return 0

    def places(self, device: torch.device | str = "cpu") -> AudioPlaces:
        """When each of the N tokens begins and ends, as tensors on `device`."""
        number = torch.arange(self.length, device=torch.device(device))
        return AudioPlaces(start=number / self.rate, end=(number + 1) / self.rate, is_patch=number < self.sound)


@dataclass(frozen=True, eq=False)
class AudioPlaces:
    """When each of the N tokens of an `AudioLayout` sounds, in seconds from the recording's beginning."""

    start: Tensor           # (N,) float32
    end: Tensor             # (N,) float32
    is_patch: Tensor        # (N,) bool: false for the silence behind the recording


@lru_cache(maxsize=512)
def _places(layout: ImageLayout, device: torch.device) -> Places:
    with torch.inference_mode(False):           # a cached inference tensor could never serve a training step
        return _build_places(layout, device)


def _build_places(layout: ImageLayout, device: torch.device) -> Places:
    (height, width), per_tile = layout.tile, layout.thumbnail_tokens
    alone = layout.crops == 0
    patch = torch.arange(per_tile, device=device)
    tile = torch.zeros_like(patch)
    line = torch.full_like(patch, 0 if alone and layout.newlines else -1)
    if alone:
        if layout.newlines:
            tile, patch, line = (torch.cat([t, t.new_full((1,), v)]) for t, v in ((tile, -1), (patch, 0), (line, 0)))
    else:
        r = _along(layout.rows, layout.size[0], device)[:, None]
        c = _along(layout.columns, layout.size[1], device)[None]
        place = torch.arange(len(r), device=device)[:, None]
        crop_tile = 1 + (r // height) * layout.grid[1] + c // width                         # (rows, columns)
        crop_patch = crop_tile * per_tile + (r % height) * width + c % width
        crop_line = place.expand_as(crop_tile)
        if layout.newlines:
            end = torch.ones_like(r)
            crop_tile = torch.cat([crop_tile, -end], 1)
            crop_patch = torch.cat([crop_patch, 0 * end], 1)
            crop_line = torch.cat([crop_line, place], 1)
        else:
            crop_line = torch.full_like(crop_line, -1)
        tile, patch, line = (torch.cat([a, b.flatten()])
                             for a, b in ((tile, crop_tile), (patch, crop_patch), (line, crop_line)))
    is_patch = tile >= 0
    first = per_tile if alone else per_tile + layout.size[1]
    step = 1 if alone else layout.size[1] + 1
    newline = first + step * torch.arange(layout.newline_tokens, device=device)
    return Places(tile=tile, patch=patch, line=line, newline=newline, is_patch=is_patch)
