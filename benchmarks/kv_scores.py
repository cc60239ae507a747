"""Scores of cached keys beside one attention forward (SDPA) of the same shape: time, ratio and peak memory, in one run.

    python benchmarks/kv_scores.py --out kv_scores.csv          # one GPU, the attention of an 8B model: 4k to 32k keys
    python benchmarks/kv_scores.py --tiny                       # the same code on any machine; its times mean little

Not measured on GPU yet: there are no results of it in `results/`. The claims to check at 32k are column sums under half of a
forward, with memory linear in the keys, and window sums under 1 % of prefill. Two passes over q k' cost about what a forward's
two products cost, so the first can hold only with the log-sum-exp that a flash forward leaves behind.

attention           SDPA, causal, grouped queries: the measure of the others
column sums         H2O's accumulated attention, log-sum-exp included
column sums, lse    the same, with the log-sum-exp of the forward given
window sums         SnapKV's: the last `--window` queries, pooled
keep a quarter      window sums, then topk and gathering of keys and values: all that a method adds to a layer
key norm, key diversity
ratio               time over attention's, of this run
peak                MiB allocated at most beyond the inputs (GPU only)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from common import clock, positive, print_table, write_csv
from kv_common import Call, about, arguments, peak_mib, title
from torch import Tensor
from tqdm import tqdm

from mmcompress.ops.kv_keys import key_diversity, key_norm, pool_scores
from mmcompress.ops.kv_scores import column_sums, row_lse

COLUMNS = ("score", "keys", "batch", "ms", "ratio", "peak_mib")

Row = dict[str, Any]


def cases(q: Tensor, k: Tensor, v: Tensor, window: int, kernel: Any) -> dict[str, Call]:
    """What is timed, attention first."""
    n = k.shape[2]
    lse = row_lse(q, k, kernel=kernel)

    def window_sums() -> Tensor:
        return pool_scores(column_sums(q[:, :, -window:], k, heads="mean", kernel=kernel))

    def keep_a_quarter() -> tuple[Tensor, Tensor]:
        index = window_sums().topk(max(1, n // 4), dim=-1).indices.sort(-1).values[..., None].expand(-1, -1, -1, k.shape[3])
        return k.gather(2, index), v.gather(2, index)

    return {"attention": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            "column sums": lambda: column_sums(q, k, kernel=kernel),
            "column sums, lse": lambda: column_sums(q, k, lse=lse, kernel=kernel),
            "window sums": window_sums,
            "keep a quarter": keep_a_quarter,
            "key norm": lambda: key_norm(k, kernel=kernel),
            "key diversity": lambda: key_diversity(k, kernel=kernel)}


def measure(n: int, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """All scores at n keys, each beside this run's attention."""
    g = torch.Generator(device).manual_seed(n)
    q, k, v = (torch.randn(args.batch, h, n, args.width, generator=g, device=device, dtype=dtype)
               for h in (args.heads, args.kv_heads, args.kv_heads))
    rows: list[Row] = []
    for name, call in cases(q, k, v, min(args.window, n), args.kernel).items():
        ms = clock(call, device, args.repeats)
        rows.append({"score": name, "keys": n, "batch": args.batch, "heads": args.heads, "kv_heads": args.kv_heads,
                     "width": args.width, "window": args.window, "ms": ms, "ratio": ms / (rows[0]["ms"] if rows else ms),
                     "peak_mib": peak_mib(call, device), "n": args.repeats})
    return rows


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--keys", type=positive, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--window", type=positive, default=64)
    parser.add_argument("--tiny", action="store_true", help="a few keys and channels, float32, two repeats")
    args = parser.parse_args(argv)
    if args.tiny:
        args.keys, args.heads, args.kv_heads, args.width, args.window = [65, 130], 4, 2, 16, 8
        args.dtype, args.repeats = "float32", 2
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    who = about(device, dtype, args.kernel)
    rows = [row for n in tqdm(args.keys, unit="size") for row in measure(n, args, device, dtype)]
    print_table(title(who, args.repeats), rows, COLUMNS)
    if args.out is not None:
        write_csv(args.out, [{**row, **who} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
