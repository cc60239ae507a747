"""Reading frames of video files: milliseconds and memory under each backend, and whether they agree.

    python benchmarks/video_reading.py FOLDER --out benchmarks/results/video_reading.csv
    python benchmarks/video_reading.py FOLDER --minutes 1 --repeats 3        # a shorter synthetic file

FOLDER holds the mp4 files to read. A synthetic file (640 x 360, 25 frames a second, a keyframe every 250, moving gradients with
noise) is encoded in a temporary folder and read as well. Nothing is kept of it.

ms          median of `--repeats` reads after one of warm-up, opening and indexing included; cpu ms: of all threads together,
            which says more on a machine that has other work to do
peak MiB    of the synthetic file: what a read adds to the peak resident memory of a fresh process that read 2 frames before,
            which loads the library; the result itself is `result MiB`
difference  grey levels, the largest between decord's frames and PyAV's
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from common import positive, print_table, versions, write_csv
from tqdm import tqdm

from mmcompress.video.reading import Clip, read

BACKENDS = ("decord", "pyav")
COUNTS = (8, 64)
SYNTHETIC = "synthetic"
COLUMNS = ("file", "pixels", "seconds", "frames", "backend", "ms", "cpu ms", "peak MiB", "result MiB", "difference")
PEAK = """
import json, sys
from pathlib import Path
from mmcompress.video.reading import read
path, frames, backend = sys.argv[1:]
read(path, frames=2, end=1.0, backend=backend)
peak = lambda: int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])      # KiB
before = peak()
read(path, frames=int(frames), backend=backend)
print(json.dumps((peak() - before) / 1024))
"""


def synthetic(path: Path, minutes: float, width: int = 640, height: int = 360, rate: int = 25) -> Path:
    """A long clip of gradients that move under fixed noise."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 24, (height, width, 1))
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = 10 * rate
        loop = [np.stack([x * 230 / width, y * 230 / height, (x + 8 * k) % 230], -1) + noise for k in range(40)]
        pictures = [av.VideoFrame.from_ndarray(p.astype(np.uint8), format="rgb24").reformat(format="yuv420p") for p in loop]
        for i in tqdm(range(int(minutes * 60 * rate)), desc="encoding", unit="frame", mininterval=2):
            picture = pictures[i % 40]
            picture.pts, picture.time_base = i, Fraction(1, rate)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    return path


def measure(path: Path, frames: int, backend: str, repeats: int, memory: bool) -> tuple[dict[str, Any], Clip]:
    clip = read(path, frames=frames, backend=backend)
    times, work = [], []
    for _ in range(repeats):
        start, before = time.perf_counter(), time.process_time()
        read(path, frames=frames, backend=backend)
        times.append(1000 * (time.perf_counter() - start))
        work.append(1000 * (time.process_time() - before))
    height, width = clip.frames.shape[1:3]
    return {"file": path.name, "pixels": f"{width}x{height}", "seconds": round(clip.duration, 2), "frames": len(clip.frames),
            "backend": backend, "ms": statistics.median(times), "cpu ms": statistics.median(work),
            "peak MiB": peak(path, frames, backend) if memory else None, "result MiB": clip.frames.nbytes / 2**20}, clip


def peak(path: Path, frames: int, backend: str) -> float:
    """MiB."""
    command = [sys.executable, "-c", PEAK, str(path), str(frames), backend]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def run(files: Sequence[Path], repeats: int) -> list[dict[str, Any]]:
    rows = []
    for path, frames in tqdm([(p, n) for p in files for n in COUNTS], unit="case"):
        memory = path.name.startswith(SYNTHETIC)
        (a, one), (b, other) = (measure(path, frames, backend, repeats, memory) for backend in BACKENDS)
        difference = int(np.abs(one.frames.astype(np.int16) - other.frames).max())
        if not np.allclose(one.timestamps, other.timestamps, atol=1e-6):
            raise RuntimeError(f"the backends read different frames of {path}: {one.timestamps} and {other.timestamps}")
        rows += [{**row, "difference": difference} for row in (a, b)]
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="mp4 files of it are read")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the synthetic file; 0: none")
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--out", type=Path, help="write the rows to this CSV file")
    args = parser.parse_args(argv)
    files = sorted(args.folder.glob("*.mp4"))
    if not files and not args.minutes:
        parser.error(f"{args.folder} holds no mp4 file, and --minutes is 0: there is nothing to read")
    with tempfile.TemporaryDirectory() as folder:
        if args.minutes:
            files.append(synthetic(Path(folder) / f"{SYNTHETIC}_{args.minutes:g}_min.mp4", args.minutes))
        rows = run(files, args.repeats)
    about = versions(torch.device("cpu"), torch.uint8)
    about |= {name: importlib.metadata.version(name) for name in ("av", "decord2", "numpy")} | {"n": str(args.repeats)}
    print_table(f"milliseconds, median of {args.repeats}", rows, COLUMNS)
    if args.out is not None:
        write_csv(args.out, [{**row, **about} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
