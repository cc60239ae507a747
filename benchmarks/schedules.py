"""LLaVolta's claim: training with staged compression takes less time and ends at the same accuracy.

    python benchmarks/schedules.py                              # configs/pico-small.yaml, about 20 minutes a seed and core
    python benchmarks/schedules.py --recipe configs/pico.yaml   # the embedded model itself, on a GPU

Runs of equal data, seeds and steps, one after the other: plain, the four stages, heavy and light. For each: seconds of
training (evaluation not counted), processor seconds (fair on a shared CPU), image tokens and floating-point operations
of the language model, and the accuracy with all tokens at the end on held-out scenes, pooled over the seeds. Paper: 16 %
less time at equal accuracy with four stages. `--resume` goes on where a killed benchmark stopped. Writes CSV and PNG.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmcompress.eval.stats import wilson
from mmcompress.train.loop import train
from mmcompress.train.recipe import Recipe
from mmcompress.train.record import read_log

SCHEDULES = {"plain": None, "four stages": "llavolta-4stage", "heavy": "llavolta-heavy", "light": "llavolta-light"}
COSTS = ("seconds", "cpu_seconds", "image_tokens", "flops")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("configs/pico-small.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--schedules", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    parser.add_argument("--set", dest="changes", action="append", default=[], help="key=value of the recipe; repeatable")
    parser.add_argument("--out", type=Path, default=Path("out/schedules"))
    parser.add_argument("--resume", action="store_true", help="keep what --out holds already")
    options = parser.parse_args(argv)
    rows = [run(options, seed, name) for seed in options.seeds for name in options.schedules]
    write(rows, options.out / "schedules.csv")
    plot({name: read_log(folder(options, options.seeds[0], name) / "log.jsonl") for name in options.schedules},
         options.out / "schedules.png")
    Console(width=120).print(table(rows, options.schedules))
    print(options.out / "schedules.csv", options.out / "schedules.png", sep="\n")


def folder(options: argparse.Namespace, seed: int, name: str) -> Path:
    return options.out / f"{name.replace(' ', '-')}-{seed}"


def run(options: argparse.Namespace, seed: int, name: str) -> dict[str, Any]:
    """Train once; one row of the CSV."""
    schedule = "null" if SCHEDULES[name] is None else SCHEDULES[name]
    recipe = Recipe.load(options.recipe, [*options.changes, f"seed={seed}", f"schedule={schedule}"])
    done = train(recipe, folder(options, seed, name), resume=options.resume)
    [found] = [row for row in done["eval"] if row["kind"] == "all"]
    return {"schedule": name, "seed": seed, "steps": done["steps"], **{cost: done[cost] for cost in COSTS},
            "hits": found["hits"], "n": found["n"], "accuracy": found["accuracy"], "low": found["low"], "high": found["high"],
            "recipe": options.recipe.name, "device": device(), "torch": version("torch"),
            "transformers": version("transformers"), "mmcompress": version("mmcompress")}


def device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader()
        out.writerows(rows)


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Loss and accuracy of the first seed against time and steps: the processor's time on a CPU, which neighbours share."""
    from mmcompress.train.plots import plot_training
    from mmcompress.viz.figure import save

    save(plot_training(runs, "cpu_seconds" if device().startswith("cpu") else "seconds"), path)


def table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    """Costs relative to plain training of the same seeds, and accuracy over all seeds with 95 % intervals."""
    out = Table("schedule", "seconds", "time", "cpu time", "image tokens", "FLOPs", "accuracy, %", "95 % interval", "n")
    total = {name: {cost: sum(r[cost] for r in rows if r["schedule"] == name) for cost in COSTS} for name in names}
    base = total.get("plain")
    for name in names:
        mine = [r for r in rows if r["schedule"] == name]
        hits, n = sum(r["hits"] for r in mine), sum(r["n"] for r in mine)
        low, high = wilson(hits, n)
        saved = ["" if base is None else f"{100 * (total[name][c] / base[c] - 1):+.0f} %" for c in COSTS]
        out.add_row(name, f"{total[name]['seconds'] / len(mine):.0f}", *saved, f"{100 * hits / n:.1f}",
                    f"{100 * low:.1f}-{100 * high:.1f}", str(n))
    return out


if __name__ == "__main__":
    main()
