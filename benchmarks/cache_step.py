"""A compressed cache in a whole model: what prefill pays for it, what a decoding step gains, and whether peak memory falls.

    python benchmarks/cache_step.py --compile --out cache_step.csv       # one H100: Llama-3.1-8B's shape, 32k, batch 1 and 16
    python benchmarks/cache_step.py --only prefill --out prefill.csv     # half of it; --batch 16: of the other half a part
    python benchmarks/cache_step.py --tiny                               # the same code on any machine; its times mean little

Not measured on GPU yet: there are no results of it in `results/`. The claims to check: to score, select, gather and store takes
under 1 % of prefill with SnapKV; a step near that of a stock model which was given the kept tokens alone; a peak that falls by
what the report says. Weights are random, made on the device. Decoding starts from a cache of random keys and values that went
through the plan layer by layer, so there is no prefill of sixteen prompts. Where memory does not suffice the model loses layers
before anything is allocated, for all rows of that batch, and `remark` says so. The CSV is written anew after every row.

prefill
chunk           tokens that come in at a time; none: all
score .. store  milliseconds of the stages, all layers, of ms; share: their sum over the stock prefill of the same chunks
ms/stock        the whole prefill over the stock one of the same chunks
peak, after     MiB allocated beyond the weights, at most and once the prompt is in (GPU only)
fell, said      how much lower the peak is than stock's, and what the report says: stock's bytes less `tally.peak`
after fell, after said    the same once the prompt is in: stock's bytes less `nbytes`

decode: one step as `generate` makes it, the choice of the token included
form            dynamic; static: a fixed room, with --compile under transformers' own torch.compile (reduce-overhead)
ideal           a stock cache of the same form which holds as many random tokens as the plan keeps; stock where it keeps all
kept            slots that the longest head has
stock/ms        stock of the same form over this; best/ms: the fastest of the stock caches, quantised ones included, over this
ideal/ms        1 is as fast as the ideal
mib, of stock   bytes of the cache, and over those of the stock dynamic cache
allocated       MiB that the filled cache takes from the allocator (GPU only)
floor           milliseconds to read weights (no input embedding) and cache once at the speed of a large copy, of this run
finite          whether a step's logits are
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import kv_common as kv
import torch
from common import clock, positive, print_table, write_csv
from kv_decode import copy_speed
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache, QuantizedCache, StaticCache

from mmcompress.budget import keep_count
from mmcompress.cache import (
    EMS,
    H2O,
    CachePlan,
    Chain,
    CompressedCache,
    KeyDiff,
    KNorm,
    KVMerger,
    MiKV,
    MiniCache,
    SnapKV,
    StreamingLLM,
    attach,
    chain,
)

STAGES = ("score", "select", "gather", "store")
PREFILL = ("case", "chunk", "batch", "layers", "ms", *STAGES, "share", "ms/stock", "peak", "after", "fell", "said",
           "after fell", "after said", "remark")
DECODE = ("case", "form", "batch", "layers", "kept", "ms", "stock/ms", "best/ms", "ideal/ms", "mib", "of stock", "allocated",
          "floor", "floor/ms", "remark")
COLUMNS = tuple(dict.fromkeys(("kind", *PREFILL[:2], "form", "batch", "context", "tokens", *PREFILL[3:-1], *DECODE[4:-1],
                               "finite", "n", "remark")))
WARM_UP, MIB = 3, 2**20

Plan = CachePlan | Chain
Row = dict[str, Any]

PLANS: dict[str, Plan] = {
    "SnapKV .25": SnapKV(keep=0.25),
    "StreamingLLM .25": StreamingLLM(keep=0.25),
    "KNorm .25": KNorm(keep=0.25),
    "KeyDiff .25": KeyDiff(keep=0.25),
    "H2O .25": H2O(keep=0.25),
    "MiKV int2": MiKV(bits=2, high=0),
    "MiKV int4": MiKV(bits=4, high=0),
    "MiKV int2, a fifth exact": MiKV(bits=2),
    "SnapKV .5, MiKV int4": chain([SnapKV(keep=0.5), MiKV(bits=4, high=0)]),
    "EMS .25": EMS(keep=0.25),
    "KVMerger .25": KVMerger(keep=0.25),
    "MiniCache": MiniCache()}
MERGING = ("EMS .25", "KVMerger .25", "MiniCache")
CHUNKED = ("SnapKV .25", "MiKV int4", "SnapKV .5, MiKV int4")
DECODED = ("SnapKV .25", "MiKV int2", "MiKV int4", "MiKV int2, a fifth exact", "SnapKV .5, MiKV int4")
STATIC = ("SnapKV .25", "MiKV int4")


class Absent(Exception):
    """What a row would measure is not there."""


@dataclass(frozen=True)
class Case:
    """A cache to decode from. make(model, tokens, batch, room) -> it, filled; tokens: what it, or its ideal, was given."""

    name: str
    form: str
    make: Callable[[Any, int, int, int], Any]
    tokens: int
    plan: Plan | None = None


def cut(model: Any, layers: int) -> None:
    """Drop the layers above."""
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers


def prefill(model: Any, ids: Tensor, cache: Any, chunk: int | None) -> Any:
    """As `generate` does it, whole or in chunks. -> the cache"""
    if chunk is not None and isinstance(cache, CompressedCache):
        cache.announce(torch.ones_like(ids))
    for part in ids.split(chunk or ids.shape[1], 1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def again(plan: Plan) -> Plan:
    """The plan for prompts that come in chunks."""
    return Chain(tuple(replace(p, again=True) for p in plan.plans)) if isinstance(plan, Chain) else replace(plan, again=True)


def measure_prefill(name: str, chunk: int | None, model: Any, ids: Tensor, repeats: int) -> Row:
    """One way of taking a prompt in, timed and then once more for its memory."""
    kv.clear()
    spans: list[dict[str, float]] = []

    def note(cache: Any) -> None:
        if isinstance(cache, CompressedCache):
            spans.append(cache.tally.stopwatch.milliseconds())

    plan = None if name == "stock" else PLANS[name] if chunk is None else again(PLANS[name])
    with nullcontext() if plan is None else attach(model, plan) as handle:
        def call() -> Any:
            return prefill(model, ids, DynamicCache(config=model.config) if handle is None else handle.cache(), chunk)

        ms = clock(call, ids.device, repeats, 1, note)
        peak, after, cache = kv.peak_and_after(call, ids.device)
    row: Row = {"ms": ms, "peak": mib(peak), "after": mib(after)}
    if plan is not None:
        row |= {stage: statistics.median(span.get(stage, 0.0) for span in spans) for stage in STAGES}
        row |= {"said": (cache.stock_nbytes - cache.tally.peak) / MIB, "after said": (cache.stock_nbytes - cache.nbytes) / MIB}
    return row | {"mib": (kv.held_bytes(cache) if plan is None else cache.nbytes) / MIB}


def mib(size: int | None) -> float | None:
    return None if size is None else size / MIB


def static_form(cache: CompressedCache, room: int) -> Any:
    """Ours with a fixed room for what is to come, where this version has that; the cache gives its memory to it."""
    try:
        from mmcompress.cache.static import freeze
    except ImportError:
        raise Absent("not in this version of mmcompress") from None
    return freeze(cache, room, take=True)


def cases(context: int) -> list[Case]:
    """What is decoded from, stock first."""
    kept = sorted({tokens_of(PLANS[name], context) for name in DECODED} - {context})

    def dynamic(model: Any, n: int, batch: int, room: int) -> Any:
        return kv.fill_stock(DynamicCache(config=model.config), model, n, batch)

    def static(model: Any, n: int, batch: int, room: int) -> Any:
        return kv.fill_stock(StaticCache(model.config, max_cache_len=n + room), model, n, batch)

    def quantised(backend: str, bits: int | None = None) -> Case:
        def make(model: Any, n: int, batch: int, room: int) -> Any:
            return kv.fill_stock(QuantizedCache(backend, model.config, nbits=bits), model, n, batch)

        return Case(f"stock {backend}" if bits is None else f"stock {backend} int{bits}", "dynamic", make, context)

    def ours(name: str, form: str) -> Case:
        plan = PLANS[name]

        def make(model: Any, n: int, batch: int, room: int) -> Any:
            cache = kv.fill_ours(plan, model, context, batch)
            return cache if form == "dynamic" else static_form(cache, room)
        return Case(name, form, make, tokens_of(plan, context), plan)

    small = [tokens_of(PLANS[name], context) for name in STATIC]
    return [Case("stock", "dynamic", dynamic, context), Case("stock", "static", static, context),
            quantised("quanto", 4), quantised("hqq", 4), quantised("fp8"),
            *(Case("ideal", "dynamic", dynamic, n) for n in kept), *(ours(name, "dynamic") for name in DECODED),
            *(Case("ideal", "static", static, n) for n in kept if n in small), *(ours(name, "static") for name in STATIC)]


def tokens_of(plan: Plan, context: int) -> int:
    """How many tokens of a prompt it keeps."""
    keeps = [p.keep for p in (plan.plans if isinstance(plan, Chain) else (plan,))]
    return min(keep_count(context, keep) for keep in keeps if isinstance(keep, (int, float)))


class Steps:
    """Greedy decoding from a filled cache, a call a step, as `generate` does it."""

    def __init__(self, model: Any, cache: Any, batch: int, seen: int, room: int, compiled: bool) -> None:
        self.model, self.cache, self.seen = model, cache, seen
        self.mask = torch.ones(batch, seen + room, dtype=torch.long, device=model.device)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self.forward = model.get_compiled_call(None) if compiled else model.__call__

    def logits(self) -> Tensor:
        """(B, V) of one step more."""
        self.seen += 1
        inputs = self.model.prepare_inputs_for_generation(self.token, next_sequence_length=1, past_key_values=self.cache,
                                                          attention_mask=self.mask[:, :self.seen], use_cache=True)
        out: Tensor = self.forward(**inputs, return_dict=True).logits[:, -1]
        return out

    def __call__(self) -> Tensor:
        self.token = self.logits().argmax(-1, keepdim=True)
        return self.token


def measure_decode(case: Case, model: Any, batch: int, args: argparse.Namespace, speed: float) -> Row:
    """One cache: filled, then a few steps from it."""
    device, room, compiled = model.device, WARM_UP + args.repeats + 1, args.compile and case.form == "static"
    torch._dynamo.reset()                   # the last row's graphs hold memory
    vars(model).pop("_compiled_call", None)
    kv.clear()
    with nullcontext() if case.plan is None else attach(model, case.plan):
        _, taken, cache = kv.peak_and_after(lambda: case.make(model, case.tokens, batch, room), device)
        size, seen, kept = kv.held_bytes(cache), case.tokens, case.tokens
        if case.plan is not None:
            size, seen, kept = cache.nbytes, args.context, max(cache.lengths) - (room if case.form == "static" else 0)
        steps = Steps(model, cache, batch, seen, room, compiled)
        ms = clock(steps, device, args.repeats, WARM_UP)
        finite = bool(steps.logits().isfinite().all())
    floor = (kv.weight_bytes(model.config, model.config.num_hidden_layers, model.dtype.itemsize, read=True) + size) / speed
    return {"kept": kept, "ms": ms, "mib": size / MIB, "allocated": mib(taken), "floor": floor, "floor/ms": floor / ms,
            "finite": finite}


def attempt(call: Callable[[], Row]) -> Row:
    """A row, or why there is none: one that fails costs the others nothing."""
    try:
        return call()
    except ImportError:
        return {"remark": "not installed"}
    except Absent as error:
        return {"remark": str(error)}
    except Exception as error:
        return {"remark": f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}


def add_ratios(rows: Sequence[Row]) -> None:
    """What compares rows of one size, in place."""
    for row in rows:
        peers = [r for r in rows if all(r[c] == row[c] for c in ("kind", "batch", "layers"))]
        if row["ms"] is None:
            continue
        if row["kind"] == "prefill":
            _beside_prefill(row, next((r for r in peers if r["case"] == "stock" and r["chunk"] == row["chunk"]), row))
        else:
            _beside_decode(row, peers)


def _beside_prefill(row: Row, stock: Row) -> None:
    if stock["ms"] is None:
        return
    row["ms/stock"], row["of stock"] = row["ms"] / stock["ms"], row["mib"] / stock["mib"]
    if row["score"] is not None:
        row["share"] = sum(row[stage] for stage in STAGES) / stock["ms"]
    for fell, held in (("fell", "peak"), ("after fell", "after")):
        if row[held] is not None and row is not stock:
            row[fell] = stock[held] - row[held]


def _beside_decode(row: Row, peers: Sequence[Row]) -> None:
    done = [r for r in peers if r["ms"] is not None]
    stock = {r["form"]: r for r in done if r["case"] == "stock"}
    best = [r["ms"] for r in done if r["case"].startswith("stock")]
    if row["form"] in stock:
        row["stock/ms"] = stock[row["form"]]["ms"] / row["ms"]
    row["best/ms"] = min(best) / row["ms"] if best else None
    if "dynamic" in stock:
        row["of stock"] = row["mib"] / stock["dynamic"]["mib"]
    given = (r for r in done if r["form"] == row["form"] and r["case"] in ("ideal", "stock"))
    ideal = next((r for r in given if r["tokens"] == row["tokens"]), None)
    row["ideal/ms"] = ideal["ms"] / row["ms"] if ideal is not None else None


def prefill_batch(config: LlamaConfig, tokens: int, asked: int, itemsize: int, free: int | None) -> tuple[int, str]:
    """The batch that fits, 0: none, and what there is to say about it."""
    batch = asked
    while free is not None and batch and kv.prefill_need(config, tokens, batch, itemsize) > free:
        batch -= 1
    said = f"batch {asked} needs {kv.prefill_need(config, tokens, asked, itemsize) / 1e9:.1f} GB of {(free or 0) / 1e9:.1f}"
    return batch, "" if batch == asked else said


class Table:
    """Rows as they come, each in the CSV as soon as it is there."""

    def __init__(self, args: argparse.Namespace, total: int, who: Row) -> None:
        self.args, self.who, self.rows = args, who, list[Row]()
        self.bar = tqdm(total=total, unit="row")

    def add(self, call: Callable[[], Row], remark: str = "", **what: Any) -> None:
        """Measure one."""
        self.bar.set_description(f"{what['kind']} {what['case']}, batch {what['batch']}")
        row = dict.fromkeys(COLUMNS) | what | {"context": self.args.context} | attempt(call)
        row["remark"] = "; ".join(x for x in (remark, row["remark"]) if x)
        self.rows.append(row)
        add_ratios(self.rows)
        if self.args.out is not None:
            write_csv(self.args.out, [{**r, **self.who} for r in self.rows])
        self.bar.update()


def run_prefill(table: Table, model: Any, args: argparse.Namespace, free: int | None) -> None:
    """All ways of taking the prompt in, those in chunks last."""
    batch, remark = prefill_batch(model.config, args.context, args.prefill_batch, model.dtype.itemsize, free)
    g = torch.Generator(model.device).manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, args.context), generator=g, device=model.device)
    for name, chunk in prefills(args):
        def call(name: str = name, chunk: int | None = chunk) -> Row:
            if not batch:
                raise Absent("does not fit")
            return measure_prefill(name, chunk, model, ids, args.prefill_repeats)

        table.add(call, remark, kind="prefill", case=name, chunk=chunk, batch=batch, layers=model.config.num_hidden_layers,
                  n=args.prefill_repeats)


def prefills(args: argparse.Namespace) -> list[tuple[str, int | None]]:
    whole = ["stock", *(name for name in PLANS if args.merging or name not in MERGING)]
    return [*((name, None) for name in whole), *((name, args.chunk) for name in ("stock", *CHUNKED))]


def run_decode(table: Table, model: Any, batch: int, args: argparse.Namespace, free: int | None, speed: float) -> None:
    """All caches of one batch; before it the model loses the layers for which there is no memory."""
    config, size = model.config, model.dtype.itemsize
    fits = config.num_hidden_layers if free is None else kv.depth_that_fits(config, args.context, batch, size, free)
    if 0 < fits < config.num_hidden_layers:
        cut(model, fits)
    remark = "" if config.num_hidden_layers == args.layers else (
        f"{config.num_hidden_layers} of {args.layers} layers: all need "
        f"{kv.need(config, args.layers, args.context, batch, size) / 1e9:.1f} GB of {(free or 0) / 1e9:.1f}")
    for case in cases(args.context):
        def call(case: Case = case) -> Row:
            if not fits:
                raise Absent(f"one layer needs {kv.need(config, 1, args.context, batch, size) / 1e9:.1f} GB")
            return measure_decode(case, model, batch, args, speed)

        form = "static, compiled" if args.compile and case.form == "static" else case.form
        table.add(call, remark, kind="decode", case=case.name, form=form, batch=batch, layers=config.num_hidden_layers,
                  tokens=case.tokens, n=args.repeats)


def options() -> argparse.ArgumentParser:
    parser = kv.run_arguments(__doc__, repeats=20)
    parser.add_argument("--context", type=positive, default=32768)
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 16], help="of decoding, in rising order")
    parser.add_argument("--layers", type=positive, default=32)
    parser.add_argument("--prefill-batch", type=positive, default=1)
    parser.add_argument("--prefill-repeats", type=positive, default=3)
    parser.add_argument("--chunk", type=positive, default=4096, help="of the prefills in chunks")
    parser.add_argument("--merging", action="store_true", help="prefill with EMS, KVMerger and MiniCache too")
    parser.add_argument("--only", choices=("prefill", "decode"))
    parser.add_argument("--compile", action="store_true", help="static caches under torch.compile: a minute or two each")
    parser.add_argument("--tiny", action="store_true", help="two layers, 160 tokens, float32, two repeats")
    return parser


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    args = options().parse_args(argv)
    if args.tiny:
        args.context, args.batch, args.layers, args.chunk, args.merging = 160, [1, 2], 2, 64, True
        args.dtype, args.repeats, args.prefill_repeats = "float32", 2, 2
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    who, free = kv.about(device, dtype, "auto"), kv.free_bytes(device)
    speed = copy_speed(device, args.repeats, MIB if args.tiny else kv.GIB)
    model = kv.build_llama(kv.llama(args.layers, args.tiny), device, dtype)
    counts = {"prefill": len(prefills(args)), "decode": len(args.batch) * len(cases(args.context))}
    table = Table(args, sum(n for kind, n in counts.items() if args.only in (None, kind)), {"copy_gb_s": speed / 1e6, **who})
    if args.only != "decode":
        run_prefill(table, model, args, free)
    if args.only != "prefill":
        for batch in sorted(args.batch):
            run_decode(table, model, batch, args, free, speed)
    table.bar.close()
    for kind, columns, n in (("prefill", PREFILL, args.prefill_repeats), ("decode", DECODE, args.repeats)):
        if rows := [row for row in table.rows if row["kind"] == kind]:
            print_table(f"{kv.title(who, n)}, copy {speed / 1e6:.4g} GB/s\n{kind} at {args.context} tokens", rows, columns)
    return int(any("failed:" in row["remark"] for row in table.rows))


if __name__ == "__main__":
    sys.exit(main())
