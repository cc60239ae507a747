"""The consistency loss's claim: fine-tuned with it, a model loses less when tokens go.

    mmcompress train configs/pico-consistency.yaml --set init=FOLDER --out out/consistency      # FOLDER: the weights before
    python benchmarks/consistency.py --before FOLDER --after out/consistency/model              # or --after pico

Both models answer the same questions with all tokens and under some reducers; the paired difference tells them apart.
pico's weights of mmcompress 0.2.0 were made so from those of 0.1.0, which `git log -- mmcompress/pico/weights` finds.
Writes CSV.
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

from mmcompress.checkpoint import device_name, load
from mmcompress.config import WrapConfig
from mmcompress.eval import ALL_TOKENS, evaluate, paired
from mmcompress.image import AveragePool, GlobalCom2, GlobalRank
from mmcompress.layers import FastV

CASES: dict[str, Any] = {
    ALL_TOKENS: None,
    **{f"GlobalRank({keep})": GlobalRank(keep=keep) for keep in (0.1, 0.25, 0.5)},
    "GlobalRank(0.1), closed": WrapConfig(image=GlobalRank(keep=0.1), positions="closed"),
    "GlobalCom2(0.1)": GlobalCom2(keep=0.1),
    "GlobalCom2(0.1), original": WrapConfig(image=GlobalCom2(keep=0.1), positions="original"),
    "AveragePool(0.25)": AveragePool(keep=0.25),
    "FastV(2, 0.25)": FastV(2, 0.25),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="folder of the weights it started from")
    parser.add_argument("--after", default="pico", help="folder of the fine-tuned weights, or 'pico'")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", default="eval")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=Path("out/consistency.csv"))
    options = parser.parse_args(argv)
    rows = measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader()
        out.writerows(rows)
    table = Table("reducer", "questions", "n", "before", "after", "difference, points")
    for r in rows:
        table.add_row(r["reducer"], r["kind"], str(r["n"]), f"{100 * r['before']:.1f}", f"{100 * r['after']:.1f}",
                      f"{100 * r['difference']:+.1f} ± {100 * r['half_interval']:.1f}")
    Console(width=120).print(table)
    print(options.out)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a case and kind of question."""
    found, where = [], ""
    for model in (options.before, options.after):
        loaded, processor = load(model, options.device, options.dtype, "sdpa")
        where = f"{device_name(loaded)}"
        cases = {name: CASES[name] for name in options.cases}
        found.append(evaluate(loaded, processor, cases, options.n, options.seed))
    kinds = len(found[0]) // len(options.cases)
    rows = []
    for i, (before, after) in enumerate(zip(*found)):
        difference, half = paired(after.right, before.right)
        rows.append({"reducer": options.cases[i // kinds], "kind": before.kind, "n": before.n, "before": before.accuracy,
                     "after": after.accuracy, "difference": difference, "half_interval": half, "seed": options.seed,
                     "device": where, **{name: version(name) for name in ("torch", "transformers", "mmcompress")}})
    return rows


if __name__ == "__main__":
    main()
