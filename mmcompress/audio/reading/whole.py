"""Whether a file is all there, by what its container says of its length; libsndfile and FFmpeg shorten most without a word.

FLAC is not here: its decoders notice. Nor are mp3 without a Xing header, bare AAC and MPEG-TS: they do not say how long
they are.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from ...video.reading import iso

UNKNOWN = 0x7ffff000                    # what is written to a pipe has a length of about 2 or 4 GiB, or none
PAGE = 65307                            # bytes of an Ogg page at most
SEGMENT = b"\x18\x53\x80\x67"           # of Matroska


def lost(path: Path) -> str:
    """What is missing at the end, in words; "" if nothing is, as far as one can tell.

    Raises ValueError for an mp4 without an index, or with one that contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
        if head[:4] in (b"RIFF", b"RF64"):
            claimed = _riff(file, size)
        elif head[:4] == b"OggS":
            return _ogg(file, size)
        elif head[:4] == b"\x1a\x45\xdf\xa3":
            claimed = _matroska(head)
        elif head[:3] == b"ID3" or head[:1] == b"\xff":
            claimed = _mp3(file, head)
        else:
            return _mp4(path)
    return f"{claimed - size:,} bytes at its end are missing" if claimed > size else ""


def _riff(file: BinaryIO, size: int) -> int:
    """Bytes that the file should have, 0 if it does not say."""
    at, large = 12, 0
    while at + 8 <= size:
        file.seek(at)
        kind, length = struct.unpack("<4sI", file.read(8))
        if kind == b"ds64" and at + 24 <= size:
            large = struct.unpack("<QQ", file.read(16))[1]
        if kind == b"data":
            return at + 8 + large if large else 0 if length >= UNKNOWN else at + 8 + length
        at += 8 + length + length % 2
    return 0


def _ogg(file: BinaryIO, size: int) -> str:
    file.seek(max(0, size - 2 * PAGE))
    tail = file.read()
    page = tail[tail.rfind(b"OggS"):]
    whole = len(page) >= 27 and len(page) >= 27 + page[26] + sum(page[27:27 + page[26]])
    return "" if whole and page[5] & 4 else "its last page is missing"


def _matroska(head: bytes) -> int:
    at = head.find(SEGMENT) + 4
    if at < 4 or at >= len(head) or not head[at]:
        return 0
    width = 9 - head[at].bit_length()
    length = int.from_bytes(head[at:at + width], "big") & ((1 << 7 * width) - 1)
    return 0 if length == (1 << 7 * width) - 1 else at + width + length         # all ones: not known when it was written


def _mp3(file: BinaryIO, head: bytes) -> int:
    at = 0
    if head[:3] == b"ID3" and len(head) > 10:
        a, b, c, d = head[6:10]                                                 # 7 bits each
        at = 10 + (a << 21 | b << 14 | c << 7 | d)
        file.seek(at)
        head = file.read(4096)
    tag = max(head[:64].find(b"Xing"), head[:64].find(b"Info"))
    if tag < 0 or len(head) < tag + 16:
        return 0
    flags, *numbers = struct.unpack_from(">III", head, tag + 4)
    return at + numbers[flags & 1] if flags & 2 else 0                          # the number of frames comes first, if at all


def _mp4(path: Path) -> str:
    movie = iso.inspect(path)
    if movie is None:
        return ""
    if not movie.indexed and not movie.fragmented:
        early = f"it ends {movie.missing:,} bytes early" if movie.missing else "it may still be being written"
        raise ValueError(f"it has no index (moov): {early}. Get the whole file")
    return f"{movie.missing:,} bytes at its end are missing" if movie.missing else ""
