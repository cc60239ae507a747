"""The claim of pico's clips: the model answers, and it needs the frames in their order to do so.

    python benchmarks/clips.py --n 500

Clips as they are, then with frames replaced (first frame only, last only, both, shuffled, reversed, gray), then longer and
shorter ones, then pictures, on which the model it came from is the yardstick. All tokens, greedy exact match. Writes CSV.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmcompress import pico
from mmcompress.checkpoint import device_name
from mmcompress.eval import ALL_TOKENS, CONTROLS, Row, evaluate, evaluate_clips, write_csv

LENGTHS = (8, 24)                   # frames, beside the usual 16


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500, help="questions about clips as they are; the rest get two fifths")
    parser.add_argument("--seed", default="eval")
    parser.add_argument("--out", type=Path, default=Path("out/pico_clips.csv"))
    options = parser.parse_args(argv)
    model, processor = pico.load_video()
    rows = measure(model, processor, options.n, options.seed)
    write_csv(rows, options.out, device_name(model), options.seed)
    for r in rows:
        print(f"{r.method:22} {r.kind:8} {100 * r.accuracy:5.1f} ({100 * r.low:.1f}-{100 * r.high:.1f}), n = {r.n}")


def measure(model: Any, processor: Any, n: int, seed: str) -> list[Row]:
    few = max(1, 2 * n // 5)
    rows = evaluate_clips(model, processor, {ALL_TOKENS: None}, n, seed)
    for name, show in CONTROLS.items():
        rows += evaluate_clips(model, processor, {name: None}, few, seed, show=show)
    for frames in LENGTHS:
        rows += evaluate_clips(model, processor, {f"{frames} frames": None}, few, seed, frames=frames)
    for name, (loaded, its) in {"pictures": (model, processor), "pictures, pico": pico.load()}.items():
        rows += [replace(r, method=name) for r in evaluate(loaded, its, {ALL_TOKENS: None}, few, seed)]
    return rows


if __name__ == "__main__":
    main()
