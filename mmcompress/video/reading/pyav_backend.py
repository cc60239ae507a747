"""Reading by PyAV: an index of all packets, then decoding from the keyframe before each wanted frame.

Colours and sizes go through the filter that decord uses, `[transpose,] scale=W:H:flags=bicubic, format=rgb24`, so both give
the same bytes. `VideoFrame.to_ndarray` and `reformat` do not: they are up to 3 grey levels off at 10 bit, 13 when resizing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .index import Doubt, Frame, Index, Positions, Undecodable, first_line, fit
from .iso import Movie

NOT_VIDEO = ("image2", "tty")           # formats of pictures and of text, which FFmpeg decodes as video; and *_pipe
CLUSTER_HEAD = 128                      # bytes between two frames of a whole Matroska file, at most
ATTACHED = 0x400                        # AV_DISPOSITION_ATTACHED_PIC: the cover of a piece of music


class PyAV:
    """An open file; `movie` is its index if it is an mp4."""

    def __init__(self, path: Path, movie: Movie | None, av: Any):
        self.av, self.path = av, path
        self._open()
        try:
            self.index = self._index(movie)
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        try:
            # local files only: what calls itself a video may be a playlist of addresses
            self.container = self.av.open(str(self.path), options={"protocol_whitelist": "file"}, metadata_errors="ignore")
        except (self.av.error.FFmpegError, OSError, ValueError) as e:
            raise Doubt(f"is not a video that FFmpeg can read ({first_line(e)})") from e
        self.stream: Any = self.container.streams.best("video")
        if self.stream is not None and self.stream.codec_context is not None:
            self.stream.thread_type = "AUTO"

    def close(self) -> None:
        self.container.close()

    def _index(self, movie: Movie | None) -> Index:
        stream, name = self.stream, self.container.format.name
        if name in NOT_VIDEO or name.endswith("_pipe"):
            raise Doubt(f"is a picture or a text ({name}), not a video; PIL.Image.open reads pictures")
        if stream is None or int(stream.disposition) & ATTACHED:
            kinds = ", ".join(sorted({s.type for s in self.container.streams})) or "nothing"
            raise Doubt(f"has no video stream, only {kinds}")
        if stream.codec_context is None:
            raise Doubt("has a video stream of a codec that this FFmpeg does not have")
        packets, torn, reach, lost = self._packets()
        if not packets:
            raise Doubt("has a video stream without a single frame" if not torn else "is cut off before its first frame")
        if any(pts is None for pts, *_ in packets):
            raise Doubt("has frames without timestamps; `ffmpeg -i FILE -c copy OUT.mp4` writes them")
        if movie is not None and movie.missing and len(packets) != stream.frames:
            torn = True
        if torn:
            last = max(dts if dts is not None else pts for pts, dts, *_ in packets)
            packets = [p for p in packets if p[0] <= last] or packets[:1]       # later ones may be in a patchy row
        packets.sort(key=lambda p: p[0])
        base, first = stream.time_base, packets[0][0]
        self.pts = np.array([p[0] for p in packets], dtype=np.int64)
        keys = np.flatnonzero([p[3] for p in packets])
        self.seek_to = {int(k): packets[k][0] if packets[k][1] is None else packets[k][1] for k in keys}
        seconds = (self.pts - first) * (base.numerator / base.denominator)
        step = float(np.median(np.diff(seconds))) if len(packets) > 1 else 0.0
        end = float(seconds[-1]) + (float(packets[-1][2] * base) if packets[-1][2] else step)
        holes = tuple((float(a + step), float(b)) for a, b in pairwise(seconds)
                      if b - a > 1.5 * step and any(a < float((t - first) * base) <= b for t in lost))
        return Index(seconds, keys, end, self._declared(float(first * base), reach), torn, holes)

    def _packets(self) -> tuple[list[tuple[Any, ...]], bool, float, list[int]]:
        """(pts, dts, duration, is key) of each frame; whether one is torn; seconds that other streams reach; pts behind gaps.

        In a Matroska file whose clusters are damaged the demuxer skips to the next whole one without a word.
        """
        streams = [self.stream] if self.stream.duration is not None else list(self.container.streams)
        packets, lost, torn, reach, at = [], [], False, 0.0, None
        tight = self.container.format.name.startswith("matroska")
        try:
            for p in self.container.demux(streams):
                if p.size == 0 or p.is_discard:                     # the end; or cut away by an edit list
                    continue
                skipped = tight and at is not None and p.pos is not None and p.pos - at > CLUSTER_HEAD
                at = None if p.pos is None else p.pos + p.size
                if p.pts is not None:
                    if p.stream_index != self.stream.index:
                        reach = max(reach, float((p.pts + (p.duration or 0)) * p.time_base))
                    if skipped:
                        lost.append(int(p.pts * p.time_base / self.stream.time_base))
                if p.stream_index == self.stream.index:
                    torn |= p.is_corrupt
                    if not torn:
                        packets.append((p.pts, p.dts, p.duration, p.is_keyframe))
        except self.av.error.FFmpegError:
            torn = True                                             # the index ends here; `declared` shows what is missing
        return packets, torn, reach, lost

    def _declared(self, first: float, reach: float) -> float | None:
        """Seconds that the video should last: its own length, or the file's if no other stream is there to fill it."""
        if self.stream.duration is not None:
            return float(self.stream.duration * self.stream.time_base)
        if self.container.duration is None:
            return None
        whole = self.container.duration / self.av.time_base
        return None if reach > whole - 0.25 else whole - first

    def frames(self, positions: Positions, size: tuple[int, int] | int | None) -> Iterator[Frame]:
        convert = Converter(self.av, self.stream.time_base, size)      # not the stream: a file that is opened again has another
        wanted = iter(positions.tolist())
        position = next(wanted, None)
        while position is not None:
            key = self._key(position)
            for frame, damage in self._run(key):
                if frame is None or frame.pts > self.pts[position]:
                    raise Undecodable(self.index, position, damage or "the decoder leaves it out")
                if frame.pts < self.pts[position]:
                    continue
                if damage:
                    raise Undecodable(self.index, position, damage)
                yield convert(frame)
                position = next(wanted, None)
                if position is None or self._key(position) != key:
                    break                                           # further on: seek instead of decoding what is between

    def _key(self, position: int) -> int:
        """The keyframe to decode from: the last that does not show later; the first frame if there is none."""
        at = int(np.searchsorted(self.index.keys, position, side="right")) - 1
        return int(self.index.keys[at]) if at >= 0 else 0

    def _run(self, key: int) -> Iterator[tuple[Any, str]]:
        """(frame, what was damaged since a keyframe) from the keyframe `key` on, then (None, ...)."""
        if key in self.seek_to:
            self.container.seek(self.seek_to[key], stream=self.stream)
            run = self._decode()
            for frame, damage in run:
                if frame is None or frame.pts > self.pts[key]:
                    break                                           # some containers seek too far
                if frame.pts == self.pts[key]:
                    yield frame, damage
                    yield from run
                    return
        self.container.close()
        self._open()
        yield from self._decode()                                   # all of it, then

    def _decode(self) -> Iterator[tuple[Any, str]]:
        """(frame, damage) of each frame from where the file stands, then (None, damage); damage ends with the next keyframe."""
        damage, since = "", -np.inf
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets, None)
            except self.av.error.FFmpegError as e:
                packet, damage = None, first_line(e)
            if packet is None:
                break
            try:
                frames = packet.decode()
            except self.av.error.FFmpegError as e:
                damage, since, frames = first_line(e), np.inf if packet.pts is None else packet.pts, ()
            for frame in frames:
                if frame.pts is None:
                    continue
                if frame.is_corrupt:
                    damage, since = "its data is damaged", frame.pts
                elif frame.key_frame and frame.pts > since:
                    damage = ""
                yield frame, damage
        yield None, damage


# what a display matrix (a, b, c, d) does to a picture, as filters; the four that only turn are decord's
TURNS: dict[tuple[float, ...], tuple[tuple[str, str], ...]] = {
    (1, 0, 0, 1): (), (0, 1, -1, 0): (("transpose", "clock"),), (0, -1, 1, 0): (("transpose", "cclock"),),
    (-1, 0, 0, -1): (("transpose", "clock"), ("transpose", "clock")), (-1, 0, 0, 1): (("hflip", ""),),
    (1, 0, 0, -1): (("vflip", ""),), (0, 1, 1, 0): (("transpose", "cclock_flip"),),
    (0, -1, -1, 0): (("transpose", "clock_flip"),),
}


class Converter:
    """Frames to upright RGB arrays at a size."""

    def __init__(self, av: Any, time_base: Fraction, size: tuple[int, int] | int | None):
        self.av, self.time_base, self.size = av, time_base, size
        self.shape: tuple[int, int] | None = None

    def __call__(self, frame: Any) -> Frame:
        if (frame.height, frame.width) != self.shape:               # the first frame; or the resolution changes in between
            self.shape, self.graph = (frame.height, frame.width), self._graph(frame)
        self.graph.push(frame)
        out: Frame = self.graph.pull().to_ndarray()
        return out

    def _graph(self, frame: Any) -> Any:
        turns = TURNS.get(matrix := _matrix(frame))
        if turns is None:
            raise Doubt(f"is to be shown turned by another angle than 90, 180 or 270 degrees (display matrix {matrix})")
        shape = (frame.width, frame.height) if len(turns) == 1 and turns[0][0] == "transpose" else (frame.height, frame.width)
        if not isinstance(self.size, tuple):
            self.size = fit(shape, self.size)                       # the first frame's; the others follow it
        height, width = self.size
        graph = self.av.filter.Graph()
        last = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=self.time_base)
        for name, options in (*turns, ("scale", f"{width}:{height}:flags=bicubic"), ("format", "rgb24"), ("buffersink", "")):
            node = graph.add(name, options) if options else graph.add(name)
            last.link_to(node)
            last = node
        graph.configure()
        return graph


def _matrix(frame: Any) -> tuple[float, ...]:
    """(a, b, c, d) of the frame's display matrix; of the identity if it has none."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
            return tuple(round(x / 65536, 3) for x in (a, b, c, d))
    return 1, 0, 0, 1
