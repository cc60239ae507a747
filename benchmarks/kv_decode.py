"""One decode step's attention to a cache in tiers, beside SDPA and beside the time that reading the bytes alone takes.

    python benchmarks/kv_decode.py --out kv_decode.csv          # one GPU, the attention of an 8B model
    python benchmarks/kv_decode.py --tiny                       # the same code on any machine; its times mean little

Not measured on GPU yet: there are no results of it in `results/`. The claim to check is int4 at 70 % or more of the floor. On a
GPU every call runs as a CUDA graph, so the host's time is left out.

sdpa            torch's attention over the same slots in `--dtype`, grouped queries
exact           ours in `--dtype`; ragged: the same with lengths from a tenth of the slots to all
int8 .. int2    all slots in few bits, groups of half a head's channels, scales and zeros in float16 (MiKV)
kivi2           2 bits, keys by channel in groups of 32 tokens, values by token in groups of 32 channels (KIVI)
mikv            a fifth of the slots exact, the rest in 2 bits with balanced keys: two tiers
mib             bytes that must be read: keys, values, scales, zeros, lengths
floor           milliseconds to read them at the speed of a large copy, measured in the same run
floor/ms        1 is the floor itself
sdpa/ms         how much faster than SDPA over all slots
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from common import clock, positive, print_table, write_csv
from kv_common import about, arguments, graphed, title
from torch import Tensor
from tqdm import tqdm

from mmcompress.ops.kv_decode import Slots, decode_attention
from mmcompress.ops.kv_quant import balancer, quantize

COLUMNS = ("cache", "batch", "slots", "mib", "ms", "floor", "floor/ms", "sdpa/ms")

Row = dict[str, Any]


def caches(q: Tensor, k: Tensor, v: Tensor, kernel: Any) -> dict[str, tuple[Slots, ...]]:
    """The same keys and values, held in every way."""
    n, d = k.shape[2:]
    few = {f"int{bits}": (Slots(quantize(k, bits, kernel=kernel), quantize(v, bits, kernel=kernel)),) for bits in (8, 4, 2)}
    lengths = torch.linspace(n / 10, n, k.shape[0] * k.shape[1], device=k.device).view(k.shape[:2]).int().clamp_min(1)
    kivi = Slots(quantize(k, 2, "channel", 32, kernel=kernel), quantize(v, 2, group=min(32, d), kernel=kernel))
    old, b = n - n // 5, balancer(q, k)
    low = Slots(quantize(k[:, :, :old] * b.to(k.dtype), 2, kernel=kernel), quantize(v[:, :, :old], 2, kernel=kernel), balance=b)
    return {"exact": (Slots(k, v),), "ragged": (Slots(k, v, lengths),), **few, "kivi2": (kivi,),
            "mikv": (low, Slots(k[:, :, old:], v[:, :, old:]))}


def bytes_read(tiers: tuple[Slots, ...]) -> int:
    """Bytes of the slots that exist."""
    total = 0
    for tier in tiers:
        size = tier.k.nbytes + tier.v.nbytes
        if tier.lengths is not None:
            slots = tier.k.shape[0] * tier.k.shape[1] * tier.k.shape[2]
            size = size * int(tier.lengths.sum()) // slots + tier.lengths.nbytes
        total += size + (0 if tier.balance is None else tier.balance.nbytes)
    return total


def copy_speed(device: torch.device, repeats: int, size: int) -> float:
    """Bytes read and written a millisecond by a copy of `size` bytes."""
    x = torch.ones(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * size / clock(lambda: y.copy_(x), device, repeats)


def measure(batch: int, n: int, args: argparse.Namespace, device: torch.device, dtype: torch.dtype, speed: float) -> list[Row]:
    """Every way of holding n slots."""
    g = torch.Generator(device).manual_seed(n)
    q, k, v = (torch.randn(batch, h, s, args.width, generator=g, device=device, dtype=dtype)
               for h, s in ((args.heads, 1), (args.kv_heads, n), (args.kv_heads, n)))
    calls: dict[str, tuple[Any, int]] = {
        "sdpa": (lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), k.nbytes + v.nbytes)}
    for name, tiers in caches(q, k, v, args.kernel).items():
        calls[name] = (lambda tiers=tiers: decode_attention(q, *tiers, kernel=args.kernel), bytes_read(tiers))
    rows: list[Row] = []
    for name, (call, size) in calls.items():
        ms, floor = clock(graphed(call, device), device, args.repeats), size / speed
        rows.append({"cache": name, "batch": batch, "slots": n, "heads": args.heads, "kv_heads": args.kv_heads,
                     "width": args.width, "mib": size / 2**20, "ms": ms, "floor": floor, "floor/ms": floor / ms,
                     "sdpa/ms": (rows[0]["ms"] if rows else ms) / ms, "n": args.repeats})
    return rows


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--slots", type=positive, nargs="+", default=[4096, 32768], help="multiples of 32")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 16])
    parser.add_argument("--tiny", action="store_true", help="a few slots and channels, float32, two repeats")
    args = parser.parse_args(argv)
    if args.tiny:
        args.slots, args.batch, args.heads, args.kv_heads, args.width = [160], [1, 2], 4, 2, 16
        args.dtype, args.repeats = "float32", 2
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    who = about(device, dtype, args.kernel)
    speed = copy_speed(device, args.repeats, 2**20 if args.tiny else 2**30)
    sizes = [(batch, n) for batch in args.batch for n in args.slots]
    rows = [row for batch, n in tqdm(sizes, unit="size") for row in measure(batch, n, args, device, dtype, speed)]
    print_table(f"{title(who, args.repeats)}, copy {speed / 1e6:.4g} GB/s", rows, COLUMNS)
    if args.out is not None:
        write_csv(args.out, [{**row, "copy_gb_s": speed / 1e6, **who} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
