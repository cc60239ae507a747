"""Reading by soundfile (libsndfile): wav, flac, ogg, opus, aiff, and mp3 since libsndfile 1.1."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...video.reading.index import Doubt
from .blocks import Block, Damaged

# by their first bytes; libsndfile knows more by weaker signs, and would take a text for some of them
FORMATS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF")
BLOCK = 1 << 14                         # samples at a time
UNKNOWN = 1 << 60                       # samples


class SoundFile:
    """An open file."""

    def __init__(self, path: Path, soundfile: Any):
        self.error = soundfile.LibsndfileError
        raw = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb")  # without a name to guess a format by
        try:
            self.file = soundfile.SoundFile(raw)
        except (self.error, TypeError) as e:
            raw.close()
            raise Doubt(f"is no sound that libsndfile can read ({getattr(e, 'error_string', e)})", elsewhere=True) from e
        self.raw = raw
        if self.file.format not in FORMATS:
            self.close()
            raise Doubt(f"may be {self.file.format}, which this does not read by libsndfile", elsewhere=True)
        self.rate, self.channels = int(self.file.samplerate), int(self.file.channels)
        self.length = int(self.file.frames) if self.file.frames < UNKNOWN else None
        self.exact = self.file.format != "MP3"                                          # of an mp3 it may be an estimate
        self.seeks = self.file.format != "OGG"      # libsndfile 1.2.2 lands elsewhere near the end (its issue 885)

    def close(self) -> None:
        self.file.close()
        self.raw.close()

    def blocks(self, first: int, stop: int | None) -> Iterator[Block]:
        if self.length is not None and first >= self.length:
            return
        at = 0
        try:
            if first and self.seeks:
                at = self.file.seek(first)
            while stop is None or at < stop:
                until = at // BLOCK * BLOCK + BLOCK                     # where damage is reported must not depend on `first`
                wanted = min(until, until if stop is None else stop) - at
                block = self.file.read(wanted, dtype="float32", always_2d=True)
                at += len(block)
                if at > first:
                    yield block[-(at - first):]
                if len(block) < wanted:
                    break
        except self.error as e:
            raise Damaged(str(e.error_string)) from e
        if stop is None or at < stop:
            if self.exact and self.length is not None and at < self.length:
                raise Damaged(f"it should have {self.length:,} samples and has {at:,}")
            self.length = at
