"""The sound of a file at the rate that a model wants: `load("speech.mp3")`, `load("film.mp4", 24_000, start=60, end=90)`.

Two backends, tried in this order, each only if it is installed (`pip install 'mmcompress[audio]'` installs both):

1. `soundfile` (libsndfile): wav, flac, ogg, opus, aiff, mp3.
2. `pyav` (`av`, with its own FFmpeg): the rest, such as m4a, aac and the audio track of mp4, mkv, mov and webm.

The content decides, not the name of the file. Of wav and flac both give the same samples; of ogg, opus and mp3 they are equally
many and differ by less than 1e-4 (in the last 20 ms of opus by more). Of several audio tracks PyAV reads the one that FFmpeg
prefers. Time 0 is the first sample of the track, which in a video may be some milliseconds from its first frame. An m4a may end
with up to a frame (1,024 samples) of what its encoder padded; a bare .aac file, or AAC in MPEG-TS, begins with one, too.

Resampling is torchaudio's (resampling.py says how), and is not needed at the rate that the file has.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import AudioError
from ...video.reading import _module, _number
from ...video.reading.index import Doubt
from .blocks import Backend, Damaged
from .pyav_backend import PyAV
from .resampling import Window
from .sound import Sound, as_sound, check_finite, check_hertz, check_rate, resampled
from .soundfile_backend import SoundFile
from .whole import lost

__all__ = ["AudioError", "Sound", "as_sound", "check_rate", "duration", "load"]

BACKENDS: dict[str, tuple[str, Callable[[Path, Any], Backend]]] = {        # name -> (module, class), in order
    "soundfile": ("soundfile", SoundFile),
    "pyav": ("av", PyAV),
}


def load(path: str | os.PathLike[str], sample_rate: int = 16_000, *, mono: bool = True, start: float | None = None,
         end: float | None = None, backend: str = "auto") -> Sound:
    """The sound of the stretch from `start` to `end` (seconds; `end` itself is outside), always at `sample_rate` (Hz).

    mono     the mean of the channels, (T,); else (channels, T)
    end      beyond the end of the file means to its end
    backend  "auto", "soundfile" or "pyav", see the module

    A stretch is that slice of the whole: `load(p, start=1, end=2)` has the samples of `load(p).samples[16_000:32_000]`, exactly
    so if the codec is lossless, and else as exactly as its decoder starts in the middle. Memory: the stretch at the file's rate
    and at `sample_rate`, however long the file is.

    Raises AudioError for everything that is wrong with the file or that it does not have, and ImportError if no backend is
    installed, or if torchaudio is not and the file is at another rate.
    """
    check_hertz("sample_rate", sample_rate)
    low, high = _window(int(sample_rate), start, end)
    file = _check_path(path)
    opened, cut = _opened(file, backend)
    try:
        return _read(file, opened, Window(low, high, opened.rate, int(sample_rate)), mono, cut)
    finally:
        opened.close()


def duration(path: str | os.PathLike[str], backend: str = "auto") -> float:
    """Seconds of a sound file: what its header says where that is exact, else counted by decoding it. Errors as in `load`."""
    opened, _ = _opened(_check_path(path), backend)
    try:
        if opened.length is not None and getattr(opened, "exact", False):
            return opened.length / opened.rate
        return sum(len(block) for block in opened.blocks(0, None)) / opened.rate
    except Damaged as e:
        raise AudioError(f"{path} is cut off or damaged ({e}); load(path, end=...) reads what is whole") from e
    finally:
        opened.close()


def _opened(file: Path, backend: str) -> tuple[Backend, str]:
    """The file in the first backend that reads it, and what its size says of a missing end ("": nothing)."""
    installed, cut, errors = _installed(backend), _cut(file), []
    for name, module in installed.items():
        try:
            return BACKENDS[name][1](file, module), cut
        except Doubt as e:
            errors.append(e)                                            # the next one may do better
    hint = f"; {cut}" if cut else ""
    if name != "pyav" and errors[-1].elsewhere:
        hint += "; PyAV may read it: " + ("pass backend='pyav'" if _module("av") else "pip install av")
    raise AudioError(f"{file} {errors[-1]}{hint}") from errors[-1]


def _read(file: Path, opened: Backend, window: Window, mono: bool, cut: str) -> Sound:
    parts: list[Tensor] = []
    at, broken = window.first, ""
    try:
        for block in opened.blocks(window.first, window.stop):
            x = torch.from_numpy(np.ascontiguousarray(block.mean(1, keepdims=True) if mono else block)).T      # (C, n)
            check_finite(x, opened.rate, str(file), at)
            parts.append(x)
            at += x.shape[1]
    except Damaged as e:
        broken = str(e)
    _check_end(file, opened, window, at, broken or cut, bool(broken))
    y = window.cut(resampled(torch.cat(parts, 1), opened.rate, window.to, str(file)))
    return Sound(y[0] if mono else y, window.to, opened.rate, opened.channels)


def _check_end(file: Path, opened: Backend, window: Window, at: int, trouble: str, broken: bool) -> None:
    """Raises unless the window has something and all that it should have; reading came to the sample `at` of the file."""
    start = window.low / window.to
    if trouble and (window.needed is None or at < window.needed):
        left = at if broken or opened.length is None else min(opened.length, at)
        until = left * 1000 // opened.rate / 1000
        way_out = f"pass end={until}" if until > start else f"nothing from start={start} on" if start else "nothing is left"
        raise AudioError(f"{file} is cut off or damaged ({trouble}): only {until} s can be decoded; {way_out}")
    if opened.length == 0:
        raise AudioError(f"{file} has no samples: it is a header without a sound")
    if at * window.to <= window.low * opened.rate:
        lasts = f"lasts {opened.length / opened.rate:.3f} s" if opened.length is not None else "ends before"
        raise AudioError(f"start={start}: {file} {lasts}; pass less than that")


# what is asked for -------------------------------------------------------------------------------------------------------

def _window(to: int, start: float | None, end: float | None) -> tuple[int, int | None]:
    """(low, high) in samples at the rate `to`."""
    for name, value, wanted in (("start", start, "seconds, 0 or more"), ("end", end, "seconds above 0")):
        if value is not None and not (_number(value) and (value > 0 or (value == 0 and name == "start"))):
            raise AudioError(f"{name}={value!r}: pass {wanted}")
    if end is None:
        return round((start or 0.0) * to), None
    if (start or 0.0) >= end:
        raise AudioError(f"start={start} is not before end={end}; both are seconds")
    low, high = round((start or 0.0) * to), round(end * to)
    if low >= high:
        raise AudioError(f"start={start} and end={end} are less than a sample apart at {to} Hz; both are seconds")
    return low, high


def _check_path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise AudioError(f"path={path!r:.80}: pass the path of a file; as_sound(samples, sample_rate) takes samples")
    if "://" in str(path):
        raise AudioError(f"{path} is an address: download it and pass the path of the file")
    file = Path(path)
    try:
        if file.is_dir():
            raise AudioError(f"{file} is a directory: pass the path of a sound file in it")
        if not file.is_file():
            raise AudioError(f"{file} is not a file" if file.exists() else f"{file} does not exist (looked in {Path.cwd()})")
        with file.open("rb"):
            pass
        if file.stat().st_size == 0:
            raise AudioError(f"{file} is empty (0 bytes)")
    except OSError as e:
        raise AudioError(f"{file} cannot be opened: {e.strerror or e}") from e
    except ValueError as e:
        raise e if isinstance(e, AudioError) else AudioError(f"path={path!r:.80}: {e}") from e      # a null byte
    return file.absolute()


def _cut(file: Path) -> str:
    try:
        return lost(file)
    except ValueError as e:
        raise AudioError(f"{file} is damaged: {e}") from e


def _installed(backend: str) -> dict[str, Any]:
    """name -> module of the backends to try, in order."""
    if backend != "auto" and backend not in BACKENDS:
        raise AudioError(f"backend={backend!r}: known are auto, {', '.join(BACKENDS)}")
    names = list(BACKENDS) if backend == "auto" else [backend]
    installed = {name: module for name in names if (module := _module(BACKENDS[name][0])) is not None}
    if not installed:
        packages = " or ".join(BACKENDS[name][0] for name in names)
        raise ImportError(f"reading sound needs {packages}: pip install 'mmcompress[audio]'")
    return installed
