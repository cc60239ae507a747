"""What a codec learns from: segments of recordings, or of speech that is synthesised as it is needed.

A segment is a pure function of (seed, process, step, place in the batch), so that a resumed run hears what an unbroken one
would have heard. Files are drawn by their length, so that every second is as likely as any other.
"""

from __future__ import annotations

import random
import zlib
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...audio.reading.files import within
from .recipe import Speech


class Source(Protocol):
    """Sounds by number."""

    weights: list[float]            # how often each is drawn

    def crop(self, number: int, place: float, count: int) -> Tensor:
        """`count` samples of a sound, or all if it has fewer, from `place` in 0 ... 1 of where they can begin. (n,) float32"""


class Files:
    """Sound files, read stretch by stretch."""

    def __init__(self, paths: Sequence[Path], rate: int) -> None:
        from tqdm import tqdm

        from ...audio.reading import duration

        self.paths, self.rate = list(paths), rate
        self.weights = [duration(path) for path in tqdm(self.paths, desc="lengths", unit="file", leave=False, disable=None)]

    def crop(self, number: int, place: float, count: int) -> Tensor:
        from ...audio import load

        start = place * max(0.0, self.weights[number] - count / self.rate)
        return load(self.paths[number], self.rate, start=start, end=start + count / self.rate).samples


class Sentences:
    """Synthesised sentences, each made when first drawn and then kept: 64 kB a second at 16 kHz."""

    def __init__(self, seed: str, count: int, rate: int) -> None:
        self.seed, self.rate, self.made = seed, rate, dict[int, Tensor]()
        self.weights = [1.0] * count

    def crop(self, number: int, place: float, count: int) -> Tensor:
        from ...audio import as_sound
        from ...audio.speech import draw

        if number not in self.made:
            self.made[number] = as_sound(draw(f"{self.seed}/{number}").sound, to=self.rate).samples
        whole = self.made[number]
        start = round(place * max(0, len(whole) - count))
        return whole[start:start + count]


class Segments(torch.utils.data.Dataset[Tensor]):
    """Batch `step` of a process: (batch, 1, count) float32."""

    def __init__(self, source: Source, seed: str, batch: int, count: int, gain: float = 0.0) -> None:
        self.source, self.seed, self.batch, self.count, self.gain = source, seed, batch, count, gain
        self.sums = list(accumulate(source.weights))

    def __getitem__(self, step: int) -> Tensor:
        return torch.stack([self._segment(random.Random(f"{self.seed}/{step}/{i}")) for i in range(self.batch)])[:, None]

    def _segment(self, rng: random.Random) -> Tensor:
        number = bisect(self.sums, rng.random() * self.sums[-1])
        x = self.source.crop(number, rng.random(), self.count) * 10 ** (rng.uniform(-self.gain, self.gain) / 20)
        before = rng.randrange(self.count - len(x) + 1)
        return F.pad(x, (before, self.count - len(x) - before)).clamp(-1, 1)


def sources(data: Speech, rate: int) -> tuple[Source, Source]:
    """What is learned from and what is held out. Raises ValueError if a side has no files, AudioError for a bad file."""
    if not data.files:
        return Sentences("train", data.sentences, rate), Sentences("held out", data.sentences, rate)
    files = find(data.files)
    kept = [f for f in files if held_out(f.name, data.every)]
    if data.every and (not kept or len(kept) == len(files)):
        raise ValueError(f"data.files: of {len(files)} files {len(kept)} would be held out (data.every={data.every}); give "
                         f"more files, or data.every=0 to hold out none and be measured on what was learned")
    learned = [f for f in files if not held_out(f.name, data.every)]
    return Files(learned, rate), Files(kept or files, rate)


def find(places: Sequence[str]) -> list[Path]:
    """The sound files among these files and folders, ascending."""
    found: set[Path] = set()
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"data.files: {place} does not exist (looked in {Path.cwd()})")
        found.update(within(place) if place.is_dir() else [place])
    return sorted(found)


def held_out(name: str, every: int = 5) -> bool:
    """Whether a file is kept for measuring, by its name alone: one of `every`, the same everywhere and always."""
    return bool(every) and zlib.crc32(name.encode()) % every == 0


def batches(segments: Segments, numbers: Sequence[int], workers: int) -> Any:
    """Iterates over these batches, read by `workers` processes."""
    return iter(torch.utils.data.DataLoader(segments, batch_size=None, sampler=numbers, num_workers=workers))
