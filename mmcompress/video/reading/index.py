"""What a backend knows of a file before it decodes anything, and what it promises."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]               # (H, W, 3) RGB
Positions = NDArray[np.int64]           # (T,) of frames in the order of presentation, ascending


@dataclass(frozen=True, eq=False)
class Index:
    """The frames of a file in the order of presentation; nothing of them is decoded.

    seconds   (N,) float64, ascending, when each frame appears; the first is 0
    keys      (K,) int64, which of them can be decoded without any frame before them
    end       seconds, when the last of them goes
    declared  seconds, how long the file says that the video lasts; None where it does not say
    torn      whether data at the end is missing for sure, however much it is
    holes     (from, to) in seconds, where frames are missing because data is
    """

    seconds: NDArray[np.float64]
    keys: Positions
    end: float
    declared: float | None
    torn: bool = False
    holes: tuple[tuple[float, float], ...] = ()

    @property
    def cut(self) -> bool:
        """Whether frames are missing at the end."""
        slack = max(0.02, 0.6 * self.end / len(self.seconds))           # seconds; writers round
        return self.torn or (self.declared is not None and self.declared > self.end + slack)

    @property
    def duration(self) -> float:
        """Seconds; of a file that is cut off what it says, if that is more than is left."""
        return max(self.end, self.declared or 0.0) if self.cut else self.end

    @property
    def fps(self) -> float:
        """Frames per second, on average; a single frame without a duration counts as one."""
        return len(self.seconds) / self.end if self.end > 0 else 1.0


class Backend(Protocol):
    """An open file. `frames` gives the wanted ones in order, resized to (height, width) if asked."""

    index: Index

    def frames(self, positions: Positions, size: tuple[int, int] | int | None) -> Iterator[Frame]: ...

    def close(self) -> None: ...


class Doubt(Exception):
    """This backend cannot vouch for this file. The message is the second half of a sentence about the file.

    elsewhere  whether another backend may read it
    """

    def __init__(self, message: str, elsewhere: bool = False):
        super().__init__(message)
        self.elsewhere = elsewhere


class Undecodable(Exception):
    """The frame at `position` cannot be decoded. The message is the second half of a sentence about the file."""

    def __init__(self, index: Index, position: int, reason: str):
        keys = index.keys[index.keys <= position]
        safe = math.floor(1000 * index.seconds[keys[-1]]) / 1000 if len(keys) else 0.0
        way_out = f"pass end={safe}, the keyframe before it" if safe else "there is no keyframe before it to stop at"
        super().__init__(f"is damaged: its frame at {index.seconds[position]:.3f} of {index.duration:.3f} s cannot be decoded "
                         f"({reason}); {way_out}")


def fit(shape: tuple[int, ...], size: tuple[int, int] | int | None) -> tuple[int, int]:
    """(height, width) of a frame of (height, width) `shape` at `size`; an int is the shorter side."""
    height, width = shape[:2]
    if size is None:
        return height, width
    if isinstance(size, tuple):
        return size
    short = min(height, width)
    return max(1, round(height * size / short)), max(1, round(width * size / short))


def first_line(error: Any) -> str:
    """What an error says, without the number that PyAV and the source position that decord put in front of it."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(text).splitlines()[0].split("Check failed: ")[-1]
