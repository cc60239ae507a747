"""The index of an mp4 or mov file (ISO 14496-12), as far as one must know it to tell whole files from damaged ones.

No frame is read. Times are in units of the track's timescale.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

STARTS = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")       # what the first box of such a file may be
PURE = ((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0))             # turned by 0, 90, 180, 270 degrees


@dataclass(frozen=True, eq=False)
class Track:
    """pts (N,) int64 in the order of decoding; edits: media time of each edit that shows something; codec as in `avc1`."""

    codec: str
    timescale: int
    pts: NDArray[np.int64]
    edits: tuple[int, ...]
    shown: float | None         # seconds that the edits show; None without any
    turned: bool                # its matrix turns it by a multiple of 90 degrees or not at all; a mirrored one is not


@dataclass(frozen=True, eq=False)
class Movie:
    """tracks: the video tracks; missing: bytes that the file claims to have beyond its end; indexed: there is a moov box."""

    indexed: bool
    fragmented: bool
    missing: int
    tracks: tuple[Track, ...]


def inspect(path: Path) -> Movie | None:
    """None if this is another kind of file.

    Raises ValueError if its index contradicts itself.
    """
    size = path.stat().st_size
    kinds: list[bytes] = []
    moov, missing = b"", 0
    with path.open("rb") as file:
        at = 0
        while at + 8 <= size:
            file.seek(at)
            length, kind = struct.unpack(">I4s", file.read(8))
            if not kinds and kind not in STARTS:
                return None
            head = 8
            if length == 1 and at + 16 <= size:
                length, head = struct.unpack(">Q", file.read(8))[0], 16
            elif length == 0:
                length = size - at                                              # this box is the rest of the file
            if length < head:
                missing += 1                                                    # not a box: what follows is lost
                break
            if kind == b"moov" and at + length <= size:
                moov = file.read(length - head)
            kinds.append(kind)
            missing += max(0, at + length - size)
            at += length
        if not kinds:
            return None
    try:
        tracks = tuple(_tracks(moov, size))
    except (struct.error, IndexError, KeyError, OverflowError) as e:
        raise ValueError(f"its index (moov) contradicts itself: {e!r}") from e
    fragmented = b"moof" in kinds or any(kind == b"mvex" for kind, _ in _boxes(moov))
    return Movie(bool(moov), fragmented, missing, tracks)


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, payload) of the boxes in a box."""
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        length = length or len(data) - at
        if length < 8 or at + length > len(data):
            return
        yield kind, data[at + 8:at + length]
        at += length


def _find(data: bytes, *path: bytes) -> bytes:
    for name in path:
        data = dict(_boxes(data))[name]
    return data


def _tracks(moov: bytes, most: int) -> Iterator[Track]:
    for kind, trak in _boxes(moov):
        if kind == b"trak" and _find(trak, b"mdia", b"hdlr")[8:12] == b"vide":
            movie = _find(moov, b"mvhd")
            yield _track(trak, struct.unpack_from(">I", movie, 20 if movie[0] else 12)[0], most)


def _track(trak: bytes, movie_scale: int, most: int) -> Track:
    head, media = _find(trak, b"tkhd"), _find(trak, b"mdia", b"mdhd")
    table = dict(_boxes(_find(trak, b"mdia", b"minf", b"stbl")))
    steps = _runs(table[b"stts"], ">u4", most)
    pts = np.cumsum(steps) - steps
    if b"ctts" in table:
        pts = pts + _runs(table[b"ctts"], ">i4", most)[:len(pts)]               # a shorter one raises below, as ValueError
    a, b, _, c, d = struct.unpack_from(">5i", head, 52 if head[0] else 40)
    edits = [(length, at) for length, at in _edits(dict(_boxes(trak)).get(b"edts", b"")) if at >= 0]
    return Track(codec=table[b"stsd"][12:16].decode("latin-1"),
                 timescale=struct.unpack_from(">I", media, 20 if media[0] else 12)[0], pts=pts,
                 edits=tuple(at for _, at in edits),
                 shown=sum(length for length, _ in edits) / movie_scale if edits and movie_scale else None,
                 turned=tuple(round(x / 65536, 3) for x in (a, b, c, d)) in PURE)


def _runs(box: bytes, kind: str, most: int) -> NDArray[np.int64]:
    """A run-length table of (count, value), written out; a file of `most` bytes has no more frames than that."""
    rows = np.frombuffer(box, ">u4", 2 * struct.unpack_from(">I", box, 4)[0], 8).reshape(-1, 2)
    counts = rows[:, 0].astype(np.int64)
    if counts.sum() > most:
        raise ValueError(f"its index counts {counts.sum():,} frames in {most:,} bytes")
    return np.repeat(rows[:, 1].view(kind).astype(np.int64), counts)


def _edits(edts: bytes) -> Iterator[tuple[int, int]]:
    """(duration in the movie's timescale, media time in the track's; -1 shows nothing) of each edit."""
    box = dict(_boxes(edts)).get(b"elst")
    if box is not None:
        row = struct.Struct(">Qqi" if box[0] else ">Iii")
        for i in range(struct.unpack_from(">I", box, 4)[0]):
            length, at, _ = row.unpack_from(box, 8 + i * row.size)
            yield length, at
