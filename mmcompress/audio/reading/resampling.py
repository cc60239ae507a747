"""Resampling by torchaudio's windowed sinc, and which samples of a file a window of the resampled sound needs.

Sample k at the rate r is the sound at k / r seconds. torchaudio's default filter, 6 zero crossings, changes a sine of 6 kHz by
1.5 % and one of 7 kHz by 19 % on the way from 44.1 to 16 kHz; 64 crossings keep sines within 1e-3 up to 7.5 kHz and take no
longer (10 s of sound in 6 to 10 ms on one CPU core, torch 2.14.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WIDTH, ROLLOFF = 64, 0.99               # zero crossings on each side; share of the Nyquist frequency that passes
PIECE = 1 << 20                         # samples to resample at a time
MOST = 1 << 24                          # coefficients of a filter: rates without a common factor need many


def resample(x: Tensor, rate: int, to: int) -> Tensor:
    """x (..., T) float32 at `rate` as (..., ceil(T * to / rate)) float32 at `to`; before and after it is silence.

    Raises ValueError if the two rates need a filter of more than 16 million coefficients, ImportError without torchaudio.
    """
    if rate == to:
        return x
    g = math.gcd(rate, to)
    size = to // g * (rate // g + 2 * reach(rate, to))
    if size > MOST:
        raise ValueError(f"from {rate} to {to} Hz takes a filter of {size:,} coefficients, as the rates share only the factor "
                         f"{g}; take it at {rate} Hz, or at a rate that shares more with it")
    function, total = _torchaudio(rate, to).functional.resample, -(-x.shape[-1] * to // rate)
    y = x.new_empty(*x.shape[:-1], total)
    for low in range(0, total, PIECE):                                  # it copies what it is given more than once
        piece = Window(low, min(low + PIECE, total), rate, to)
        part = x[..., piece.first:piece.stop].contiguous()
        y[..., low:piece.high] = piece.cut(function(part, rate, to, lowpass_filter_width=WIDTH, rolloff=ROLLOFF))
    return y


def reach(rate: int, to: int) -> int:
    """Samples at `rate` before and after its time that a sample at `to` takes into account."""
    return 0 if rate == to else math.ceil(WIDTH * rate / (min(rate, to) * ROLLOFF)) + 1


@dataclass(frozen=True)
class Window:
    """Samples [low, high) at the rate `to`, high None for the end, of a file at `rate`: the same as that slice of all of it."""

    low: int
    high: int | None
    rate: int
    to: int

    @property
    def first(self) -> int:
        """The sample of the file to read from: at a time that both rates have a sample at."""
        period = self.rate // math.gcd(self.rate, self.to)
        return max(0, self.low * self.rate // self.to - reach(self.rate, self.to)) // period * period

    @property
    def stop(self) -> int | None:
        """The sample of the file to read until."""
        if self.high is None:
            return None
        return -(-self.high * self.rate // self.to) + reach(self.rate, self.to)

    @property
    def needed(self) -> int | None:
        """As `stop`, without those that only the filter sees."""
        return None if self.high is None else (self.high - 1) * self.rate // self.to + 1

    def cut(self, y: Tensor) -> Tensor:
        """y (..., T) at `to`, what was read from `first` on."""
        skip = self.first * self.to // self.rate
        return y[..., self.low - skip:None if self.high is None else self.high - skip].contiguous()


def _torchaudio(rate: int, to: int) -> Any:
    try:
        import torchaudio
    except ModuleNotFoundError as e:
        if e.name != "torchaudio":
            raise
        raise ImportError(f"resampling from {rate} to {to} Hz needs torchaudio: pip install 'mmcompress[audio]'; at {rate} Hz "
                          "the sound can be had without") from e
    except (OSError, RuntimeError, ImportError) as e:           # its libraries are for another torch, or another CUDA
        raise ImportError(f"torchaudio does not load beside torch {torch.__version__}; install the one that belongs to it, "
                          f"https://pytorch.org/get-started names the index ({str(e).splitlines()[0]:.200})") from e
    return torchaudio
