"""FastAdaSP's merging against its authors' public code: the same tokens from the same keys, weights and hidden states.

    python benchmarks/fastadasp_parity.py --authors DIR --out benchmarks/results/fastadasp_parity.csv

DIR is your own checkout of the authors' repository (yichen14/FastAdaSP), of which nothing is copied here: the function
`QWenBlock.merge_hidden_states` is compiled out of Qwen-Audio/modeling_qwen.py and called on random tensors, float32, on a CPU.
They remove floor(N r) tokens, so ours are given that count. A line for each of their two kinds of mean; difference: the largest
absolute difference of a token. The script exits 1 where shapes differ or a difference passes 1e-5.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import positive, print_table, versions, write_csv
from torch import Tensor
from video_parity import commit

from mmcompress.audio.fastadasp import join_neighbours, likeness

FILE = "Qwen-Audio/modeling_qwen.py"
SHAPES = ((1, 2, 8), (3, 41, 16), (2, 200, 64), (1, 750, 128))          # recordings, tokens, width
RATES = (0.0, 0.1, 0.29, 0.5, 0.75, 0.9, 0.97)                          # removed
COLUMNS = ("mean", "cases", "difference", "authors_commit")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=positive, default=10)
    parser.add_argument("--out", type=Path, default=Path("out/fastadasp_parity.csv"))
    options = parser.parse_args(argv)
    theirs = authors_function(options.authors / FILE)
    rows = [{"mean": kind, "cases": len(found), "difference": max(found), "authors_commit": commit(options.authors)}
            for kind in ("weighted", "plain") if (found := differences(theirs, kind, options.seeds))]
    write_csv(options.out, [{**row, **versions(torch.device("cpu"), torch.float32)} for row in rows])
    print_table("FastAdaSP's merging beside its authors'", rows, COLUMNS)
    print(options.out)
    return int(any(row["difference"] > 1e-5 for row in rows))


def authors_function(file: Path) -> Callable[..., Tensor]:
    """Their `merge_hidden_states(self, hidden, similarity, method, ratio, weight)`; it prints, and writes into its weights."""
    if not file.is_file():
        raise SystemExit(f"no {file}: pass --authors your checkout of the authors' repository")
    [block] = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef) and n.name == "QWenBlock"]
    body = [n for n in block.body if isinstance(n, ast.FunctionDef) and n.name == "merge_hidden_states"]
    names: dict[str, Any] = {"torch": torch, "F": F}
    exec(compile(ast.Module(body=body, type_ignores=[]), str(file), "exec"), names)
    return names["merge_hidden_states"]


def differences(theirs: Callable[..., Tensor], kind: str, seeds: int) -> list[float]:
    """The largest difference of each case."""
    out = []
    for seed in range(seeds):
        g = torch.Generator().manual_seed(seed)
        for batch, n, width in SHAPES:
            for rate in RATES:
                hidden, keys = torch.randn(batch, n, width, generator=g), torch.randn(batch, n, 16, generator=g)
                weight = torch.rand(batch, n, generator=g) * 5 + 0.01 if kind == "weighted" else torch.ones(batch, n)
                similar = F.cosine_similarity(keys[:, :-1], keys[:, 1:], dim=2)
                with contextlib.redirect_stdout(io.StringIO()):
                    method, given = ("merge_weighted", weight.clone()) if kind == "weighted" else ("merge_ave", None)
                    wanted = theirs(None, hidden.clone(), similar, method, rate, given)
                got = join_neighbours(hidden, likeness(keys), weight, n - int(n * rate)).tokens
                if got.shape != wanted.shape:
                    raise SystemExit(f"{tuple(hidden.shape)} at rate {rate}: theirs leaves {tuple(wanted.shape)}, ours "
                                     f"{tuple(got.shape)}")
                out.append(float((got - wanted).abs().max()))
    return out


if __name__ == "__main__":
    sys.exit(main())
