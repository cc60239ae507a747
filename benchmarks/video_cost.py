"""What reducing a clip costs: time and peak memory against its frames, and against the prefill it saves.

    python benchmarks/video_cost.py --out video_cost.csv --plot video_cost.png      # 8 to 512 frames of 14 x 14 tokens
    python benchmarks/video_cost.py --prefill 64 --out video_prefill.csv            # one GPU: beside the 7B shape's prefill
    python benchmarks/video_cost.py --prefill 16 --small --device cpu               # the same with the 0.5B shape

Clips are random: half of the cells hold still but for noise, half change from frame to frame. Times are medians of
`--repeats` calls after one of warm-up, features ready on the device. Peak memory is what a call adds to the features: on a GPU
from the allocator, on a CPU the growth of the process's resident peak, each case in a process of its own. Linear growth is
checked by the exponent of a straight line through the logarithms of frames and time (1 is linear; from 64 frames on).

With `--prefill F`: the language model (7B: Mistral-7B's shape; --small: Qwen2-0.5B's) reads F x 196 tokens and then what is
left of them; `cost` is the reducer's time as a share of the difference.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import clock, peak_rss, positive, print_table, synchronize, versions, write_csv
from torch import Tensor
from tqdm import tqdm

from mmcompress.registry import available, reducer_class
from mmcompress.tokens import LayerState, Tokens, VideoLayout

FRAMES, GRID = (8, 16, 32, 64, 128, 256, 512), (14, 14)
Row = dict[str, Any]


def clip(frames: int, width: int, device: torch.device, dtype: torch.dtype) -> Tokens:
    """One clip (1, frames * 196, width) whose left half holds still, with a vision layer to read attention from."""
    layout = VideoLayout(frames, GRID)
    g = torch.Generator().manual_seed(0)
    still = torch.randn(1, 1, layout.cells, width, generator=g, dtype=torch.float32)
    features = torch.empty(1, frames, layout.cells, width, dtype=dtype, device=device)
    moves = (torch.arange(layout.cells) % GRID[1] >= GRID[1] // 2)[:, None]
    for t in range(frames):                                                 # frame by frame: half a gigabyte of noise at 512
        noise = torch.randn(1, layout.cells, width, generator=g)
        features[:, t] = torch.where(moves, noise, still[:, 0] + 0.05 * noise).to(device, dtype)
    heads = torch.randn(1, frames, layout.cells + 1, 2, 8, generator=g).to(device, dtype)
    return Tokens(features.flatten(1, 2), layout, {-1: LayerState(heads[:, :, 0], heads)})


def one_case(method: str, frames: int, keep: float, width: int, device: torch.device, dtype: torch.dtype, repeats: int) -> Row:
    """Time and peak memory of one method on one clip."""
    x, reducer = clip(frames, width, device, dtype), reducer_class("video", method)(keep=keep)
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else peak_rss()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    out = reducer(x)
    synchronize(device)
    after = torch.cuda.max_memory_allocated(device) if cuda else peak_rss()
    ms = clock(lambda: reducer(x), device, repeats, warm_up=1)
    return {"method": method, "frames": frames, "keep": keep, "tokens": x.layout.tokens, "kept": out.tokens.shape[1],
            "width": width, "ms": ms, "peak_mib": (after - before) / 2**20, "n": repeats}


def apart(args: argparse.Namespace, method: str, frames: int) -> Row:
    """The same in a process of its own, so that the peak is this case's."""
    command = [sys.executable, __file__, "--case", method, "--frames", str(frames), "--keep", str(args.keep), "--width",
               str(args.width), "--device", args.device, "--dtype", args.dtype, "--repeats", str(args.repeats)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def exponents(rows: Sequence[Row], least: int = 64) -> list[Row]:
    """Slope of log(ms) over log(frames) from `least` frames on, and of the memory."""
    out = []
    for method in dict.fromkeys(r["method"] for r in rows):
        seen = [r for r in rows if r["method"] == method and r["frames"] >= least]
        if len(seen) > 1:
            out.append({"method": method, "time": _slope(seen, "ms"), "memory": _slope(seen, "peak_mib"),
                        "us_per_frame": 1000 * seen[-1]["ms"] / seen[-1]["frames"]})
    return out


def _slope(rows: Sequence[Row], name: str) -> float | None:
    points = [(math.log(r["frames"]), math.log(r[name])) for r in rows if r[name] > 0]
    if len(points) < 2:
        return None
    mx, my = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    return sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)


def draw(rows: Sequence[Row], path: Path, device: str) -> None:
    """Time and memory against frames, one line a method."""
    from mmcompress.viz.figure import INK, new_figure, quiet, save
    from mmcompress.viz.pareto import COLORS, MARKERS

    fig = new_figure(10.5, 4.2)
    panels = fig.subplots(1, 2)
    for ax, name, title in zip(panels, ("ms", "peak_mib"), ("milliseconds a clip", "MiB beside the features, at most")):
        for i, method in enumerate(dict.fromkeys(r["method"] for r in rows)):
            seen = [r for r in rows if r["method"] == method and r[name] > 0]
            ax.plot([r["frames"] for r in seen], [r[name] for r in seen], color=COLORS[i % len(COLORS)],
                    marker=MARKERS[i % len(MARKERS)], markersize=4.5, linewidth=1.4, label=method)
        ax.set(xscale="log", yscale="log" if any(r[name] > 0 for r in rows) else "linear")
        ax.set_xticks(sorted({r["frames"] for r in rows}), [str(f) for f in sorted({r["frames"] for r in rows})])
        ax.minorticks_off()
        ax.set_title(title, loc="left", fontsize=10.5, color=INK)
        ax.set_xlabel("frames of 196 tokens", fontsize=9, color=INK)
        quiet(ax)
    least, most = (min(r["frames"] for r in rows), max(r["frames"] for r in rows))
    start = min(r["ms"] for r in rows if r["frames"] == most) * least / most
    panels[0].plot([least, most], [start, start * most / least], color=INK, linestyle=":", linewidth=1, label="linear")
    fig.tight_layout(rect=(0, 0, 0.83, 0.96))
    fig.legend(*panels[0].get_legend_handles_labels(), loc="center right", frameon=False, fontsize=9)
    fig.text(0.01, 0.985, f"width {rows[0]['width']}, keep {rows[0]['keep']}, {device}", fontsize=8.5, color=INK, va="top")
    save(fig, path)


# beside the prefill that is saved -------------------------------------------------------------------------------------


def language_model(small: bool, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import MistralConfig, MistralModel, Qwen2Config, Qwen2Model

    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if small:
                return Qwen2Model(Qwen2Config(hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                                              num_attention_heads=14, num_key_value_heads=2, vocab_size=1024)).eval()
            return MistralModel(MistralConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                              num_attention_heads=32, num_key_value_heads=8, vocab_size=1024,
                                              max_position_embeddings=131072, sliding_window=None)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def prefill(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Row]:
    model = language_model(args.small, device, dtype)
    x = clip(args.prefill, model.config.hidden_size, device, dtype)
    times: dict[int, float] = {}

    def reads(tokens: Tensor) -> float:
        n = tokens.shape[1]
        if n not in times:
            times[n] = clock(lambda: model(inputs_embeds=tokens, use_cache=True), device, args.repeats, warm_up=1)
        return times[n]

    rows = []
    for method in tqdm(args.method, unit="method"):
        reducer = reducer_class("video", method)(keep=args.keep)
        ms = clock(lambda: reducer(x), device, max(args.repeats, 5))  # noqa: B023
        kept = reducer(x).tokens
        saved = reads(x.features) - reads(kept)
        rows.append({"method": method, "frames": args.prefill, "keep": args.keep, "tokens": x.layout.tokens,
                     "kept": kept.shape[1], "reduce_ms": ms, "prefill_ms": reads(x.features), "prefill_kept_ms": reads(kept),
                     "cost": ms / saved, "n": args.repeats, "shape": "0.5B" if args.small else "7B"})
    return rows


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=positive, nargs="+", default=list(FRAMES))
    parser.add_argument("--method", choices=sorted(available("video")), nargs="+", default=list(available("video")))
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--width", type=positive, default=896, help="features' width; 7B models have 4096 or 3584")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--prefill", type=positive, metavar="FRAMES", help="compare with the prefill that is saved")
    parser.add_argument("--small", action="store_true", help="with --prefill: the 0.5B shape")
    parser.add_argument("--out", type=Path, help="write the rows to this CSV file")
    parser.add_argument("--plot", type=Path, help="write the picture here")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if args.case:
        print(json.dumps(one_case(args.case, args.frames[0], args.keep, args.width, device, dtype, args.repeats)))
        return 0
    about = versions(device, dtype)
    title = ", ".join(f"{k} {v}" if k not in ("device", "dtype") else str(v) for k, v in about.items())
    if args.prefill:
        rows = prefill(args, device, dtype)
        print_table(f"reducing beside the prefill it saves, medians of {args.repeats}\n{title}", rows, list(rows[0])[:-1])
    else:
        cases = [(m, f) for m in args.method for f in args.frames]
        rows = [apart(args, m, f) for m, f in tqdm(cases, unit="case")]
        print_table(f"medians of {args.repeats}\n{title}", rows, ("method", "frames", "kept", "ms", "peak_mib"))
        if growth := exponents(rows):
            print_table("growth with frames: exponents, 1 is linear", growth, list(growth[0]))
        if args.plot is not None:
            draw(rows, args.plot, about["device"])
    if args.out is not None:
        write_csv(args.out, [{**row, **about} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
