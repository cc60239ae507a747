"""Reducers of clips against their authors' public code: the same cells, and the same values where they are merged.

    python benchmarks/video_parity.py --authors DIR --out benchmarks/results/video_parity.csv --cases cases.csv

DIR holds your own checkouts of the authors' repositories, of which nothing is copied here: VidCom2, DyCoke, FastVID, HoliTom;
a method without its folder is left out. The functions that reduce a clip are compiled out of their files, since the modules
themselves import a transformers of 2024. Both sides get the same random clips on the CPU in float32: places that move, flicker
and cuts; `parity/video_<method>.py` says which sizes and how it is called.

A line per method, over all sizes, shares and seeds. identical: clips of which the same set of cells is kept (or stands for
the merged tokens). tied: those that differ only by cells whose scores, computed in float64, lie within 1e-6 of each other, so
that float32 decides which comes first (for VidCom2 also by how a frame's budget that ends in a half is rounded). another: the
rest; with one the script exits 1. difference: largest absolute difference of the tokens' values, over the identical ones.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import positive, print_table, versions, write_csv
from tqdm import tqdm

METHODS = {"vidcom2": "VidCom2", "dycoke": "DyCoke", "fastvid": "FastVID", "holitom": "HoliTom"}     # -> folder of the checkout
COLUMNS = ("method", "cases", "identical", "tied", "another", "difference", "authors_commit")


def commit(checkout: Path) -> str:
    """The commit of a checkout, "" if git does not know it."""
    if not (checkout / ".git").exists():
        return ""
    done = subprocess.run(["git", "-C", str(checkout), "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per method. A case has `method`, `identical`, and perhaps `tied`, `difference` and what it was."""
    out = []
    for method in dict.fromkeys(row["method"] for row in rows):
        of = [row for row in rows if row["method"] == method]
        identical = sum(bool(row["identical"]) for row in of)
        tied = sum(bool(row.get("tied")) and not row["identical"] for row in of)
        differences = [row["difference"] for row in of if row["identical"] and row.get("difference") is not None]
        out.append({"method": method, "cases": len(of), "identical": identical, "tied": tied,
                    "another": len(of) - identical - tied, "difference": max(differences, default=None)})
    return out


def aligned(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same columns for every method's cases."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", type=Path, metavar="DIR", required=True, help="folder of your checkouts")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=positive, default=10, help="random clips per size and share")
    parser.add_argument("--out", type=Path, help="write a line per method to this CSV file")
    parser.add_argument("--cases", type=Path, help="write every case to this CSV file")
    args = parser.parse_args(argv)

    found: list[tuple[str, Callable[[Path, int], list[dict[str, Any]]]]] = []
    for name in args.methods:
        if not (args.authors / METHODS[name]).is_dir():
            print(f"{name}: no checkout at {args.authors / METHODS[name]}, left out", file=sys.stderr)
        elif find_spec(f"parity.video_{name}") is None:
            print(f"{name}: no benchmarks/parity/video_{name}.py, left out", file=sys.stderr)
        else:
            found.append((name, import_module(f"parity.video_{name}").cases))
    if not found:
        parser.error(f"--authors {args.authors}: holds none of {', '.join(METHODS[name] for name in args.methods)}")

    about = versions(torch.device("cpu"), torch.float32)
    summary: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for name, cases in tqdm(found, desc="parity", unit="method"):
        made = cases(args.authors, args.seeds)
        rows += made
        summary += [{**line, "authors_commit": commit(args.authors / METHODS[name]), **about} for line in summarize(made)]
    print_table(f"ours and the authors' code\n{', '.join(f'{k} {v}' for k, v in about.items())}", summary, COLUMNS)
    for row in rows:
        if not row["identical"] and not row.get("tied"):
            print("another:", ", ".join(f"{k}={v}" for k, v in row.items()))
    if args.out is not None:
        write_csv(args.out, summary)
    if args.cases is not None:
        write_csv(args.cases, aligned(rows))
    return int(any(line["another"] for line in summary))


if __name__ == "__main__":
    sys.exit(main())
