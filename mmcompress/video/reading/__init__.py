"""Frames of a video file with their real timestamps: `read(path, frames=32)` or `read(path, fps=2, start=10, end=20)`.

Two backends, tried in this order, each only if it is installed (`pip install mmcompress[video]` installs both):

1. `decord`, of the distribution **decord2**: where it can be trusted, which is checked for each file.
2. `pyav` (`av`): reads everything else, and is the reference: it looks at the timestamp of each frame that it decodes.

Both return the same bytes. Which of them read a clip is in `Clip.backend`: a file that decord would misread
(decord_backend.py says which) or fails on goes to PyAV, and is an error where PyAV is absent. decord2, not decord: decord 0.6.0
carries FFmpeg 4.1, which has no AV1 decoder and is up to 5 grey levels off at 10 bit, and it took about a quarter longer
on 720p. decord2 3.4 carries FFmpeg 8, like PyAV 18. Its `get_batch` fails on some narrow videos (96 and 144 pixels) and
returns wrong frames on a busy machine, so frames are taken one by one from the keyframe on.

Damage that the decoder patches over: of 361 H.264 files with one to three random bytes in their pictures, PyAV refused 356 and
returned 4 wrong; decord, which does not pass on what the decoder flags, returned 318 wrong (decord2 3.4, PyAV 18.1; by a script
that is not in the tree). Take
`backend="pyav"` for files that you do not trust. VP9 and MJPEG flag nothing, so there neither notices.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import VideoError
from . import iso
from .decord_backend import Decord
from .index import Backend, Doubt, Index, Positions, Undecodable
from .pyav_backend import PyAV

DEFAULT_FRAMES = 32
SLACK = 5e-4            # seconds: a frame that starts this little late was meant to be there already
BACKENDS: dict[str, tuple[str, Callable[[Path, iso.Movie | None, Any], Backend]]] = {    # name -> (module, class), in order
    "decord": ("decord", Decord),
    "pyav": ("av", PyAV),
}


@dataclass(frozen=True, eq=False)
class Clip:
    """What was read of a file.

    frames      (T, H, W, 3) uint8 RGB, upright
    timestamps  (T,) float64 seconds, ascending, when each frame appears; 0 is the file's first frame
    fps         frames per second of the file, on average
    duration    seconds of the file
    path        the file
    backend     "decord" or "pyav"
    start, end  seconds, the stretch that was sampled
    total       frames of the file in that stretch
    """

    frames: NDArray[np.uint8]
    timestamps: NDArray[np.float64]
    fps: float
    duration: float
    path: Path
    backend: str
    start: float
    end: float
    total: int

    def metadata(self) -> dict[str, Any]:
        """What transformers' processors take: `processor(videos=[clip.frames], video_metadata=[clip.metadata()],
        do_sample_frames=False, ...)`.

        They compute timestamps as frames_indices / fps, so `frames_indices` are integers at a constant frame rate, and
        fractions at a variable one. `total_num_frames` and `duration` are the stretch's: Qwen2.5-VL takes the sampling rate
        from the share of it that was sampled.
        """
        exact = self.timestamps * self.fps
        whole = np.rint(exact)
        constant = bool(np.abs(exact - whole).max() < 0.05)
        return {"total_num_frames": self.total, "fps": self.fps, "duration": self.end - self.start,
                "frames_indices": whole.astype(int).tolist() if constant else exact.tolist(),
                "height": self.frames.shape[1], "width": self.frames.shape[2], "video_backend": self.backend}


def read(path: str | os.PathLike[str], frames: int | None = None, fps: float | None = None, start: float | None = None,
         end: float | None = None, backend: str = "auto", size: tuple[int, int] | int | None = None) -> Clip:
    """Frames of the stretch from `start` to `end` (seconds; a frame is in it if it appears there, `end` itself is outside).

    frames   how many, evenly spaced over the frames of the stretch, the first and the last among them (a single one is the
             middle one). No frame comes twice: a stretch with fewer gives all it has. Default: 32
    fps      or how many per second: what is on the screen at start, start + 1/fps, ...; above the file's rate each frame once
    end      beyond the end of the video means to its end
    backend  "auto", "decord" or "pyav", see the module
    size     (height, width), or the shorter side, of the upright frames; they are resized (bicubic) as they are decoded

    Memory: the T * H * W * 3 bytes of the result and the decoder's few frames, however long the file is.

    Raises VideoError for everything that is wrong with the file or that it does not have, in particular if frames that are
    asked for cannot be decoded, and ImportError if no backend is installed.
    """
    _check_arguments(frames, fps, start, end, size)
    file = _check_path(path)
    movie, errors = _inspect(file), []
    for name, module in _installed(backend).items():
        try:
            return _read(file, BACKENDS[name][1](file, movie, module), name, frames, fps, start or 0.0, end, size)
        except (Doubt, Undecodable) as e:
            errors.append(e)                                            # the next one may do better
    hint = ""
    if name != "pyav" and (isinstance(errors[-1], Undecodable) or errors[-1].elsewhere):
        hint = "; PyAV may read it: " + ("pass backend='pyav'" if _module("av") else "pip install av")
    raise VideoError(f"{file} {errors[-1]}{hint}") from errors[-1]


def _read(file: Path, opened: Backend, name: str, frames: int | None, fps: float | None, start: float, end: float | None,
          size: tuple[int, int] | int | None) -> Clip:
    index = opened.index
    try:
        low, high = _stretch(file, index, start, end)
        until = min(end or index.duration, index.duration)
        positions = pick(index.seconds, low, high, frames, fps, start, until)
        pictures = _fill(opened, positions, size)
    finally:
        opened.close()
    return Clip(frames=pictures, timestamps=index.seconds[positions], fps=index.fps, duration=index.duration, path=file,
                backend=name, start=start, end=until, total=high - low)


def _fill(opened: Backend, positions: Positions, size: tuple[int, int] | int | None) -> NDArray[np.uint8]:
    """(T, H, W, 3), filled as frames come."""
    out: NDArray[np.uint8] | None = None
    count = 0
    for count, frame in enumerate(opened.frames(positions, size), start=1):
        if out is None:
            out = np.empty((len(positions), *frame.shape), dtype=np.uint8)
        out[count - 1] = frame
    if out is None or count < len(positions):
        raise Undecodable(opened.index, int(positions[count]), "the decoder leaves it out")
    return out


def pick(seconds: NDArray[np.float64], low: int, high: int, frames: int | None, fps: float | None, start: float,
         until: float) -> Positions:
    """Positions, ascending and without repeats, among low ... high - 1 of frames that appear at `seconds` (N,)."""
    n = high - low
    if fps is None:
        t = min(frames or DEFAULT_FRAMES, n)
        return low + (np.array([n // 2]) if t == 1 else (2 * np.arange(t) * (n - 1) + t - 1) // (2 * (t - 1)))  # rounded
    appear = seconds[low:high] - SLACK
    vanish = np.append(appear[1:], until - SLACK)
    next_time = start + np.ceil((appear - start) * fps) / fps           # the first time to look at from then on
    shown = next_time < vanish
    shown[0] = True                                                     # what is on the screen at `start`, or comes next
    return low + np.flatnonzero(shown)


# what is asked for -------------------------------------------------------------------------------------------------------

def _check_arguments(frames: int | None, fps: float | None, start: float | None, end: float | None,
                     size: tuple[int, int] | int | None) -> None:
    if frames is not None and fps is not None:
        raise VideoError(f"frames={frames!r} and fps={fps!r}: pass one of them")
    if frames is not None and not _count(frames):
        raise VideoError(f"frames={frames!r}: pass a count, an int of at least 1")
    for name, value, wanted in (("fps", fps, "a number above 0"), ("start", start, "seconds, 0 or more"),
                                ("end", end, "seconds above 0")):
        if value is not None and not (_number(value) and (value > 0 or (value == 0 and name == "start"))):
            raise VideoError(f"{name}={value!r}: pass {wanted}")
    if end is not None and (start or 0.0) >= end:
        raise VideoError(f"start={start} is not before end={end}; both are seconds")
    if size is not None and not (_count(size) or (isinstance(size, tuple) and len(size) == 2 and all(map(_count, size)))):
        raise VideoError(f"size={size!r}: pass (height, width) or the shorter side, in pixels")


def _count(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 1)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool) and math.isfinite(value)


def _check_path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise VideoError(f"path={path!r:.80}: pass the path of a video file; a {type(path).__name__} is none")
    if "://" in str(path):
        raise VideoError(f"{path} is an address: download it and pass the path of the file")
    file = Path(path)
    try:
        if file.is_dir():
            raise VideoError(f"{file} is a directory: pass the path of a video file in it")
        if not file.is_file():
            raise VideoError(f"{file} is not a file" if file.exists() else f"{file} does not exist (looked in {Path.cwd()})")
        with file.open("rb"):
            pass
        if file.stat().st_size == 0:
            raise VideoError(f"{file} is empty (0 bytes)")
    except OSError as e:
        raise VideoError(f"{file} cannot be opened: {e.strerror or e}") from e
    except ValueError as e:
        raise e if isinstance(e, VideoError) else VideoError(f"path={path!r:.80}: {e}") from e      # a null byte
    return file.absolute()


def _inspect(file: Path) -> iso.Movie | None:
    try:
        movie = iso.inspect(file)
    except ValueError as e:
        raise VideoError(f"{file} is damaged: {e}") from e
    if movie is not None and not movie.indexed and not movie.fragmented:
        lost = f"it ends {movie.missing:,} bytes early" if movie.missing else "it may still be being written"
        raise VideoError(f"{file} has no index (moov box), so no frame of it can be found; {lost}. Get the whole file")
    return movie


# who reads it ------------------------------------------------------------------------------------------------------------

def _installed(backend: str) -> dict[str, Any]:
    """name -> module of the backends to try, in order."""
    if backend != "auto" and backend not in BACKENDS:
        raise VideoError(f"backend={backend!r}: known are auto, {', '.join(BACKENDS)}")
    names = list(BACKENDS) if backend == "auto" else [backend]
    installed = {name: module for name in names if (module := _module(BACKENDS[name][0])) is not None}
    if not installed:
        packages = " or ".join(BACKENDS[name][0].replace("decord", "decord2") for name in names)
        raise ImportError(f"reading videos needs {packages}: pip install 'mmcompress[video]'")
    return installed


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name != name:
            raise
        return None


# what the file has -------------------------------------------------------------------------------------------------------

def _stretch(file: Path, index: Index, start: float, end: float | None) -> tuple[int, int]:
    """(low, high): the frames low ... high - 1 appear from `start` until before `end`."""
    duration = index.duration
    if start >= duration:
        raise VideoError(f"start={start}: {file} lasts {duration:.3f} s; pass less than that")
    if index.cut and (end is None or end > index.end + SLACK):
        until, known = math.floor(1000 * index.end) / 1000, f"of {duration:.3f} " if duration > index.end else ""
        raise VideoError(f"{file} is cut off or damaged: only {until} {known}s can be decoded; "
                         + (f"pass end={until}" if start < until else f"nothing from start={start} on"))
    for since, until in index.holes:
        if start < until - SLACK and (end is None or end > since + SLACK):
            raise VideoError(f"{file} is damaged: no frame from {since:.3f} to {until:.3f} s is left; pass end={since:.3f} or "
                             f"start={until:.3f}")
    low = int(np.searchsorted(index.seconds, start - SLACK))
    high = len(index.seconds) if end is None else int(np.searchsorted(index.seconds, end - SLACK))
    if low >= high:
        near = index.seconds[max(0, min(low, len(index.seconds)) - 1)]
        raise VideoError(f"no frame of {file} appears from {start} to {end or duration} s; the one before is of {near:.3f} s")
    return low, high

