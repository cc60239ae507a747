"""Time to first token of LLaVA-NeXT-7B, stock and wrapped, stage by stage, next to the ideal.

    python benchmarks/ttft.py --out ttft.csv                # one GPU, the 7B shape with random weights
    python benchmarks/ttft.py --layers fastv,pyramid_drop   # reducers inside the language model as well
    python benchmarks/ttft.py --profile                     # does a reducer wait for the device? (exit 1 if it does)
    python benchmarks/ttft.py --small --device cpu          # the same code on any machine; its times mean little

Pictures are 672 x 672: five tiles, 2,928 packed tokens, with 64 tokens of text. All times are milliseconds, medians of
`--repeats` runs after two of warm-up.

plan, encode, reduce, pack, prefill     the report's stages. Stock: encode is get_image_features, prefill the language
                                        model on its ready features
ttft                            one whole forward from pixels to the logits of the first token, host included
decode                          one more token on the cache this left
ideal                           the stock encoder, then the language model alone on that many inputs_embeds
ideal/ttft                      1 means that reducing and packing cost nothing; the rest is their price
peak                            GiB allocated at most during the forward, weights included

Of a reducer inside the language model, `keep` and `tokens` are means over the layers. Its ideal is a chain of stock language
models, one for each run of layers that sees equally many columns: the stock module with these layers only (the same weights;
the final norm after the last layer only), called on the first columns of what the one before gave. Ranking and gathering
cost nothing there, so ideal/ttft says what they cost here, as part of prefill.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import build_model, clock, positive, print_table, versions, write_csv
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

import mmcompress
from mmcompress.adapters import adapter_for
from mmcompress.image import GlobalCom2, GlobalRank
from mmcompress.layers import FastV, PyramidDrop
from mmcompress.report import Report
from mmcompress.tokens import Tokens

METHODS = {"globalcom2": GlobalCom2, "global_rank": GlobalRank}
IN_LAYERS: dict[str, Callable[[int], Any]] = {      # of a language model's depth; their defaults where they fit into it
    "fastv": lambda depth: FastV(min(2, depth - 1), 0.5),
    "pyramid_drop": lambda depth: PyramidDrop.for_depth(depth) if depth >= 4 else PyramidDrop(((depth // 2, 0.5),)),
}
SIDE, TEXT = 672, 64                    # pixels of a picture; tokens of text in a prompt, <s> included
PICTURES = ("pixel_values", "image_sizes")
STAGES = ("plan", "encode", "reduce", "pack", "prefill")
COLUMNS = ("method", "keep", "batch", "tokens", *STAGES, "ttft", "decode", "ideal", "ideal/ttft", "stock/ttft", "peak")

Row = dict[str, Any]


def make_inputs(model: Any, batch: int) -> dict[str, Tensor]:
    """What the processor returns for `batch` prompts of one picture each, with random pixels and text."""
    layout = adapter_for(model).layout(SIDE, SIDE)
    place = model.config.image_token_id
    ids = torch.randint(3, place, (batch, TEXT), device=model.device)
    picture = torch.full((batch, layout.tokens), place, device=model.device)
    before = TEXT // 4
    ids = torch.cat([ids[:, :before], picture, ids[:, before:]], 1)
    side = model.config.vision_config.image_size
    pixels = torch.randn(batch, layout.tiles, 3, side, side, device=model.device, dtype=model.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels,
            "image_sizes": torch.tensor([[SIDE, SIDE]] * batch, device=model.device)}


def measure(call: Any, model: Any, repeats: int, after: Any = None) -> Row:
    """Time to first token of `call`, its peak memory, and a decode step on the cache it leaves."""
    device, cuda = model.device, model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    ttft = clock(call, device, repeats, after=after)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None
    out = call()
    step = {"input_ids": out.logits[:, -1].argmax(-1, keepdim=True), "past_key_values": out.past_key_values}
    return {"ttft": ttft, "decode": clock(lambda: model(**step), device, repeats), "peak": peak}


def measure_stock(model: Any, inputs: Row, repeats: int) -> Row:
    device = model.device
    pictures = {k: inputs[k] for k in PICTURES}
    encode = clock(lambda: model.model.get_image_features(**pictures), device, repeats)
    features = {"image": model.model.get_image_features(**pictures)}
    ready = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "mm_encoder_outputs": features}
    prefill = clock(lambda: model(**ready, logits_to_keep=1), device, repeats)
    return {**dict.fromkeys(STAGES), "encode": encode, "prefill": prefill,
            **measure(lambda: model(**inputs, logits_to_keep=1), model, repeats)}


def measure_wrapped(model: Any, inputs: Row, repeats: int, **reducers: Any) -> tuple[Row, Report]:
    """The same of a wrapped model with its stages, and the report of its last call."""
    reports: list[Report] = []
    with mmcompress.wrap(model, **reducers) as w:
        row = measure(lambda: w(**inputs, logits_to_keep=1), model, repeats, after=lambda out: reports.append(w.report))
    return {**{stage: statistics.median(r.milliseconds[stage] for r in reports) for stage in STAGES}, **row}, reports[-1]


def measure_ideal(model: Any, columns: Sequence[tuple[int, int]], inputs: Row, repeats: int) -> float:
    """The stock encoder, then the language model alone on that many columns: what a free reducer would take.

    columns  (layer, how many columns there are from it on), the first at layer 0
    """
    batch, width = len(inputs["input_ids"]), model.config.text_config.hidden_size
    embeds = torch.randn(batch, columns[0][1], width, device=model.device, dtype=model.dtype)
    pictures = {k: inputs[k] for k in PICTURES}
    language_model = model.model.language_model
    ends = [layer for layer, _ in columns[1:]] + [len(language_model.layers)]
    parts = [(some_layers(language_model, first, end), n) for (first, n), end in zip(columns, ends)]

    def first_token() -> Tensor:
        model.model.get_image_features(**pictures)
        hidden, caches = embeds, []
        for part, n in parts:
            out = part(inputs_embeds=hidden[:, :n], use_cache=True)
            hidden = out.last_hidden_state
            caches.append(out.past_key_values)                              # all of them live until the first token
        return model.lm_head(hidden[:, -1:])

    return clock(first_token, model.device, repeats)


def some_layers(language_model: Any, first: int, end: int) -> Any:
    """The stock language model with layers `first` to `end` only, shared with it; the final norm only after the last."""
    part = copy.copy(language_model)
    part._modules = dict(language_model._modules)
    part.layers = language_model.layers[first:end]
    if end < len(language_model.layers):
        part.norm = nn.Identity()
    return part


def run(model: Any, keeps: Sequence[float], batches: Sequence[int], methods: Sequence[str], layers: Sequence[str],
        repeats: int) -> list[Row]:
    """One row per (method, keep, batch), the stock model first for each batch, reducers inside the language model last."""
    rows = []
    with tqdm(total=len(batches) * (1 + len(keeps) * (1 + len(methods)) + len(layers)), unit="case") as bar:
        for batch in batches:
            inputs = make_inputs(model, batch)
            stock = measure_stock(model, inputs, repeats)
            full = adapter_for(model).layout(SIDE, SIDE)
            cases: list[Row] = [{"method": "stock", "keep": 1.0, "tokens": full.tokens, **stock}]
            bar.update()
            ideals = {}
            for keep in keeps:
                tokens = GlobalCom2(keep=keep).count(full)
                ideals[tokens] = measure_ideal(model, [(0, tokens + TEXT)], inputs, repeats)
                bar.update()
                for method in methods:
                    reducer = METHODS[method](keep=keep)
                    if reducer.count(full) != tokens:
                        raise ValueError(f"{reducer} keeps {reducer.count(full)} of {full.tokens} tokens, not {tokens}")
                    measured, _ = measure_wrapped(model, inputs, repeats, image=reducer)
                    cases.append({"method": method, "keep": keep, "tokens": tokens, **measured})
                    bar.update()
            if full.tokens not in ideals:
                ideals[full.tokens] = measure_ideal(model, [(0, full.tokens + TEXT)], inputs, repeats)
            for case in cases:
                case["ideal"] = ideals[case["tokens"]]
            for name in layers:
                cases.append(measure_in_layers(model, name, inputs, repeats))
                bar.update()
            rows += [{**case, "batch": batch, "ideal/ttft": case["ideal"] / case["ttft"],
                      "stock/ttft": stock["ttft"] / case["ttft"]} for case in cases]
    return rows


def measure_in_layers(model: Any, name: str, inputs: Row, repeats: int) -> Row:
    reducer = IN_LAYERS[name](len(model.model.language_model.layers))
    measured, report = measure_wrapped(model, inputs, repeats, layers=[reducer])
    columns = [(0, report.prompt_after), *((stage.layer, stage.columns) for stage in report.layers)]
    return {"method": name, "keep": report.tokens_mean / report.tokens_before,
            "tokens": round(report.tokens_mean / len(report.items)), **measured,
            "ideal": measure_ideal(model, columns, inputs, repeats)}


# does a reducer wait for the device? ----------------------------------------------------------------------------------

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")
HOST_READS = ("aten::_local_scalar_dense", "aten::nonzero")     # what a CPU run can tell: values read back by the host
HOST = torch.autograd.DeviceType.CPU


def count_waits(model: Any, reducer: Any, batch: int) -> dict[str, int]:
    """How often each kind of host synchronisation happens in one call of `reducer` on `batch` encoded pictures."""
    inputs, adapter = make_inputs(model, batch), adapter_for(model)
    layouts = adapter.layouts(inputs)
    encoded = adapter.encode(inputs, reducer.captures)
    x = Tokens(features=torch.stack(list(encoded.features)), layout=layouts[0],
               vision=encoded.state(layouts, range(batch)))
    reducer(x)                                                              # fills the cache of places
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")                             # raises where torch itself would wait
        try:
            reducer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler, record_function("the reducer"):
        reducer(x)
    events = profiler.events()
    if cuda and not any(e.device_type != HOST for e in events):
        raise RuntimeError("the profiler saw no kernel, so it would see no wait either; is another profiler attached?")
    return {name: _count(events, name) for name in (WAITS if cuda else HOST_READS)}


def _count(events: Any, name: str) -> int:
    """Host events within the reducer's span, so that the profiler's own final synchronisation stays out."""
    span = next(e.time_range for e in events if e.name == "the reducer" and e.device_type == HOST)
    hits = 0
    for e in (e for e in events if name in e.name):
        within = span.start <= e.time_range.start <= span.end
        hits += (within or e.device_type != HOST) and not _below(e, "aten::one_hot")    # it checks its range on CPUs only
    return hits


def _below(event: Any, name: str) -> bool:
    parent = event.cpu_parent
    while parent is not None and parent.name != name:
        parent = parent.cpu_parent
    return parent is not None


def run_profile(model: Any, keeps: Sequence[float], batches: Sequence[int], methods: Sequence[str]) -> list[Row]:
    cases = [(m, keep, batch) for m in methods for keep in keeps if keep < 1 for batch in batches]
    return [{"method": m, "keep": keep, "batch": batch, **count_waits(model, METHODS[m](keep=keep), batch)}
            for m, keep, batch in tqdm(cases, unit="case")]


def in_layers(text: str) -> list[str]:
    """An argparse type: names of reducers inside the language model, between commas."""
    names = [name for name in text.split(",") if name]
    if unknown := sorted(set(names) - set(IN_LAYERS)):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(IN_LAYERS)}")
    return names


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two layers of width 64, batches 1 and 2, 2 repeats")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16; small: float32")
    parser.add_argument("--repeats", type=positive, help="default: 11; small: 2")
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.1])
    parser.add_argument("--batch", type=positive, nargs="+", help="default: 1 8; small: 1 2")
    parser.add_argument("--method", choices=tuple(METHODS), nargs="*", default=list(METHODS))
    parser.add_argument("--layers", type=in_layers, default=[], metavar="NAME,NAME",
                        help=f"reducers inside the language model to measure as well: {', '.join(IN_LAYERS)}")
    parser.add_argument("--profile", action="store_true", help="count host synchronisations instead of timing")
    parser.add_argument("--out", type=Path, help="write the rows to this CSV file")
    args = parser.parse_args(argv)
    if args.profile and args.layers:
        parser.error("--profile counts the calls of reducers before the language model; leave out --layers")

    torch.manual_seed(0)
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = getattr(torch, args.dtype or ("float32" if args.small else "bfloat16"))
    repeats = args.repeats or (2 if args.small else 11)
    batches = args.batch or ([1, 2] if args.small else [1, 8])
    model = build_model(device, dtype, args.small)
    parameters = sum(p.numel() for p in model.parameters())
    about = {**versions(device, dtype), "parameters": parameters}
    title = ", ".join(f"{k} {v}" if k not in ("device", "dtype") else str(v) for k, v in about.items())
    if args.profile:
        rows = run_profile(model, args.keep, batches, args.method)
        names = WAITS if device.type == "cuda" else HOST_READS
        print_table(f"host synchronisations in one call of the reducer\n{title}", rows, ("method", "keep", "batch", *names))
    else:
        rows = run(model, args.keep, batches, args.method, args.layers, repeats)
        rows = [{**{c: row[c] for c in COLUMNS}, "n": repeats} for row in rows]
        print_table(f"milliseconds, median of {repeats}; peak in GiB\n{title}", rows, COLUMNS)
        names = ()
    if args.out is not None:
        write_csv(args.out, [{**row, **about} for row in rows])
    return int(any(row[name] for row in rows for name in names))


if __name__ == "__main__":
    sys.exit(main())
