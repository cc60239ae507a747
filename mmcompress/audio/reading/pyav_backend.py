"""Reading by PyAV (FFmpeg): m4a, aac, and the audio track of a video; and all that soundfile reads, if it is not installed.

A window is decoded from a little before it. Where its samples lie is known by their timestamps; in Matroska, which rounds them
to milliseconds, by the nearest multiple of the samples in a frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ...video.reading.index import Doubt, first_line
from ...video.reading.pyav_backend import NOT_VIDEO
from .blocks import Block, Damaged

LEAD = 0.5                              # seconds to decode before a window: codecs overlap frames, opus wants 80 ms
JITTER = 0.005                          # seconds that timestamps may be off, or half a frame; more is a hole
SCALES = {"u8": 2.0 ** 7, "s16": 2.0 ** 15, "s32": 2.0 ** 31, "flt": 1.0, "dbl": 1.0}


class PyAV:
    """An open file."""

    def __init__(self, path: Path, av: Any):
        self.av, self.path = av, path
        self.length: int | None = None
        self._open()
        try:
            frames = self._decoded()
            first = self._first(frames)
        except BaseException:
            self.close()
            raise
        self.rate, self.channels = int(first.sample_rate), int(first.layout.nb_channels)
        self.origin, self.head = first.pts or 0, first.samples
        base = self.stream.time_base
        self.step = base.numerator * self.rate / base.denominator               # samples per tick
        self.whole = base.denominator % (base.numerator * self.rate) == 0       # each sample has a timestamp of its own
        self.frames: Iterator[Any] | None = chain([first], frames)              # all of them, until `blocks` takes some

    def _open(self) -> None:
        try:
            # local files only: what calls itself a sound may be a playlist of addresses
            self.container = self.av.open(str(self.path), options={"protocol_whitelist": "file"}, metadata_errors="ignore")
        except (self.av.error.FFmpegError, OSError, ValueError) as e:
            raise Doubt(f"is no sound or video that FFmpeg can read ({first_line(e)})") from e
        self.stream: Any = self.container.streams.best("audio")
        if self.stream is not None and self.stream.codec_context is not None:
            self.stream.codec_context.options = {"err_detect": "crccheck"}      # else FFmpeg plays what it can

    def close(self) -> None:
        self.container.close()

    def _first(self, frames: Iterator[Any]) -> Any:
        name = self.container.format.name
        if name in NOT_VIDEO or name.endswith("_pipe"):
            raise Doubt(f"is a picture or a text ({name}), not a sound")
        if self.stream is None:
            kinds = ", ".join(sorted({s.type for s in self.container.streams})) or "nothing"
            raise Doubt(f"has no audio track, only {kinds}")
        if self.stream.codec_context is None:
            raise Doubt("has an audio track of a codec that this FFmpeg does not have")
        try:
            first = next(frames, None)
        except Damaged as e:
            raise Doubt(f"is damaged from its first sample on ({e})") from e
        if first is None:
            raise Doubt("has an audio track without a single sample")
        if first.format.name.removesuffix("p") not in SCALES:
            raise Doubt(f"has samples of a kind ({first.format.name}) that this does not read")
        return first

    def _decoded(self) -> Iterator[Any]:
        """Frames from where the file stands."""
        try:
            for packet in self.container.demux(self.stream):
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise Damaged("its data is damaged")
                    if frame.samples:
                        yield frame
        except self.av.error.FFmpegError as e:
            if not isinstance(e, EOFError):
                raise Damaged(first_line(e)) from e

    def blocks(self, first: int, stop: int | None) -> Iterator[Block]:
        for at, block in self._from(first):
            skip = max(0, first - at)
            if skip < len(block):
                yield block[skip:len(block) if stop is None else max(skip, stop - at)]
            if stop is not None and at + len(block) >= stop:
                return

    def _from(self, first: int) -> Iterator[tuple[int, Block]]:
        """(position, samples) from one that is not behind `first` on."""
        frames, self.frames = self.frames, None
        if first > 2 * LEAD * self.rate:
            frames = None
            run = self._sought(first)
            try:
                begin = next(run, None)
            except Damaged:                                                     # between there and `first`
                begin = None
            if begin is not None and begin[0] <= first:
                yield begin
                yield from run
                return
        if frames is None:
            self.container.close()
            self._open()
            frames = self._decoded()
        yield from self._placed(frames, 0)                                      # all of it, then

    def _sought(self, first: int) -> Iterator[tuple[int, Block]]:
        """From the frame on that `first` lies in, if the container can go there; from a later one if it goes too far."""
        try:
            self.container.seek(int(self.origin + (first - LEAD * self.rate) / self.step), stream=self.stream)
        except self.av.error.FFmpegError:
            return
        frames = self._decoded()
        next(frames, None)                                                      # often shortened
        for at, block in self._placed(frames, None):
            if at + len(block) > first:
                yield at, block

    def _placed(self, frames: Iterator[Any], at: int | None) -> Iterator[tuple[int, Block]]:
        """`at` is the position of the first one, None to go by its timestamp."""
        due: float | None = None
        for frame in frames:
            if (frame.sample_rate, frame.layout.nb_channels) != (self.rate, self.channels):
                raise Damaged(f"it goes on with {frame.layout.nb_channels} channels at {frame.sample_rate} Hz")
            if at is None:
                if frame.pts is None:
                    return
                at = self._position(frame)
            if frame.pts is not None:
                stamp = (frame.pts - self.origin) * self.step
                if due is not None and abs(stamp - due) > max(frame.samples / 2, JITTER * self.rate):
                    raise Damaged(f"its timestamps jump from {due / self.rate:.3f} to {stamp / self.rate:.3f} s")
                due = stamp + frame.samples
            block = _samples(frame)
            yield at, block
            at += len(block)
        self.length = at

    def _position(self, frame: Any) -> int:
        at = (frame.pts - self.origin) * self.step
        n = frame.samples
        if not self.whole and n > 8 * self.step:
            near = self.head + round((at - self.head) / n) * n
            if abs(near - at) <= max(1.0, self.step):
                return near
        return round(at)


def _samples(frame: Any) -> Block:
    """(n, channels)."""
    kind, x = frame.format.name.removesuffix("p"), frame.to_ndarray()
    x = x.T if frame.format.is_planar else x.reshape(frame.samples, -1)
    if kind == "flt":
        return x
    x = x.astype(np.float64) - (SCALES[kind] if kind == "u8" else 0.0)
    return (x / SCALES[kind]).astype(np.float32)
