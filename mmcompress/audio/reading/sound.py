"""A sound at a known rate, and making one of samples that are already in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import AudioError
from .resampling import resample

MOST_CHANNELS = 32                      # what a 2-D array's shorter side may be to be taken for its channels
LOUDEST = 256.0                         # full scale is 1; a float far above it holds integers that nobody scaled
FULL_SCALE = {torch.int16: 2.0 ** 15, torch.int32: 2.0 ** 31}


@dataclass(frozen=True, eq=False)
class Sound:
    """Samples and their rate.

    samples          (T,) float32, full scale is -1 ... 1; (channels, T) if it was read with mono=False
    sample_rate      samples per second
    source_rate      of the file, before resampling
    source_channels  of the file, before mixing down

    For Hugging Face processors: `processor(audio=sound.samples.numpy(), sampling_rate=sound.sample_rate, ...)`.
    """

    samples: Tensor
    sample_rate: int
    source_rate: int
    source_channels: int

    @property
    def seconds(self) -> float:
        return self.samples.shape[-1] / self.sample_rate


def as_sound(samples: Any, sample_rate: int | None = None, to: int = 16_000, mono: bool = True) -> Sound:
    """A Sound at the rate `to` of samples in memory.

    samples      (T,), (channels, T) or (T, channels), the channels being the side of at most 32, if only one is. A tensor, an
                 array or a list of int16, int32 (both are scaled to -1 ... 1) or floats. Or a Sound, which knows its rate
    sample_rate  samples per second that they are at now
    mono         mix the channels down to their mean, (T,); else (channels, T)

    Raises AudioError for an unknown rate, another shape or dtype, no samples, NaN or infinity, and floats that hold unscaled
    integers; ImportError if it must resample and torchaudio is not installed.
    """
    rate, channels = None, None
    if isinstance(samples, Sound):
        if sample_rate is not None and sample_rate != samples.sample_rate:
            raise AudioError(f"sample_rate={sample_rate!r}: this Sound is at {samples.sample_rate} Hz; leave it out")
        sample_rate, rate, channels = samples.sample_rate, samples.source_rate, samples.source_channels
        samples = samples.samples
    if sample_rate is None:
        raise AudioError("samples at an unknown rate: pass sample_rate=, the Hz that they were recorded at. A row of datasets "
                         "has it in row['audio']['sampling_rate']; mmcompress.audio.load(path) takes it from the file")
    check_hertz("sample_rate", sample_rate)
    check_hertz("to", to)
    sample_rate, to = int(sample_rate), int(to)
    x = _scaled(_channels_first(_tensor(samples)))                                  # (C, T)
    check_finite(x, sample_rate, "samples")
    channels = channels or x.shape[0]
    if mono:
        x = x.mean(0, keepdim=True)
    x = resampled(x, sample_rate, to, "samples")
    return Sound(x[0] if mono else x, to, rate or sample_rate, channels)


def check_rate(processor: Any, sound: Sound) -> None:
    """Raises AudioError if `sound` is not at the rate that a processor, a feature extractor or an int (Hz) asks for."""
    wanted = processor
    if not isinstance(processor, int):
        extractor = getattr(processor, "feature_extractor", processor)
        wanted = getattr(extractor, "sampling_rate", None)
        if wanted is None:
            raise AudioError(f"{type(processor).__name__} names no sampling_rate: pass the rate in Hz that it expects")
    if sound.sample_rate != wanted:
        raise AudioError(f"the sound is at {sound.sample_rate} Hz and {wanted} Hz are expected: load it with "
                         f"sample_rate={wanted}, or as_sound(sound, to={wanted})")


def check_hertz(name: str, value: Any) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise AudioError(f"{name}={value!r}: pass samples per second, an int above 0 such as 16000")


def check_finite(x: Tensor, rate: int, what: str, first: int = 0) -> None:
    """x (C, T) from the sample `first` on."""
    bad = ~torch.isfinite(x)
    if bad.any():
        at, channel = bad.T.nonzero()[0].tolist()
        raise AudioError(f"{what}: sample {first + at}, at {(first + at) / rate:.3f} s, is {float(x[channel, at])}; "
                         "full scale is -1 ... 1. Repair it (numpy.nan_to_num makes such samples 0)")


def resampled(x: Tensor, rate: int, to: int, what: str) -> Tensor:
    try:
        return resample(x, rate, to)
    except ValueError as e:
        raise AudioError(f"{what}: {e}") from e


def _tensor(samples: Any) -> Tensor:
    if isinstance(samples, (str, bytes, dict)) or samples is None:
        raise AudioError(f"samples={samples!r:.80}: pass a tensor or an array; mmcompress.audio.load reads files")
    try:
        x = samples.detach().cpu() if isinstance(samples, Tensor) else torch.tensor(np.asarray(samples))
    except (TypeError, ValueError) as e:
        raise AudioError(f"samples of type {type(samples).__name__}: pass numbers in a tensor or an array ({e})") from e
    if x.dtype not in FULL_SCALE and not x.is_floating_point():
        raise AudioError(f"samples are {x.dtype}: pass int16, int32 or floats in -1 ... 1; others have no agreed full scale")
    return x


def _channels_first(x: Tensor) -> Tensor:
    """(C, T)."""
    if x.ndim not in (1, 2) or not x.numel():
        raise AudioError(f"samples of shape {tuple(x.shape)}: pass (T,), (channels, T) or (T, channels), not empty")
    if x.ndim == 1:
        return x[None]
    first, last = (n <= MOST_CHANNELS for n in x.shape)
    if first == last:
        raise AudioError(f"samples of shape {tuple(x.shape)}: which side are the channels? Pass (T,), or one channel at a time")
    return x if first else x.T


def _scaled(x: Tensor) -> Tensor:
    if x.dtype in FULL_SCALE:
        return (x.double() / FULL_SCALE[x.dtype]).float()
    peak = float(x[torch.isfinite(x)].abs().max()) if torch.isfinite(x).any() else 0.0
    if peak > LOUDEST:
        raise AudioError(f"samples are {x.dtype} and reach {peak:g}; full scale is 1: divide by 32768 if they were 16 bit")
    return x.float().clone(memory_format=torch.contiguous_format)               # not the caller's memory
