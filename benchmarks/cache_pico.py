"""What a smaller key-value cache costs a model that really reads pictures: pico's exact answers, budget by budget.

    python benchmarks/cache_pico.py --out out/cache_pico.csv            # two settings, 100 pictures of 4 questions each
    python benchmarks/cache_pico.py --pictures 8 --batch 8 --keep 0.1   # a look at it

pico (`mmcompress.pico`) is a trained LLaVA-NeXT of 11 M parameters: 8 decoder layers, 4 query heads on 2 key heads of 64
channels. A picture of 336 x 336 pixels is 744 tokens: thumbnail 144, crops 576, newlines 24. Pictures are drawn freshly.

A layer is compressed after its attention over the prompt has run, so a prompt's own first answer token never sees what was
dropped. Hence two settings, each with the same questions:

blind  a conversation: the first turn is the prompt up to the picture (5 tokens of text), the cache is compressed, and each
       question comes in a turn of its own against that one cache, which is cropped back in between
aware  the question stands in the prompt; all of it but its last token comes first and the cache is compressed, so plans saw the
       question; the last token and the answer are a second call, which reads what is left. The question's own tokens read the
       picture in full, and those that stay carry what they found: part of the work is done before anything is dropped

A plan is put to three budgets: `all` (keep=k), `modality` (keep={"image": k}, text stays whole), `text first` (keep=k,
text_prior=True). Rows with a reducer are compositions under one unit, `blind`: image tokens of the stock prompt. The reducer
alone keeps k; half way it keeps sqrt(k) and the plan brings its picture down to k; the plan alone is the row `modality`.
GlobalRank has a head start: pico's weights were finished with its 10, 25 and 50 % (mmcompress/pico/README.md).

accuracy    all tokens of the answer and the end of sequence are the arg max, teacher-forced: what greedy decoding would give
difference  to the full cache on the same questions, ± half a 95 % interval, questions of one picture taken together
slots       valid ones of every layer and head, a share of the stock cache's tokens
text        share of the prompt's text tokens that are among them
bytes       all the cache holds (columns, validity, masses, positions, tags too), a share of the stock cache's keys and values;
            exact keys and values counted in 16 bits on both sides, as pico's weights are, though this computes in float32
entering    tokens of a picture that the language model read

The picture is prefilled once for all plans: a recording plan keeps each layer's `CacheView`, and every plan is handed these, as
it would be by the cache (tests/test_cache_pico_benchmark.py: the same logits as `attach(model, plan)`, bit for bit).
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from common import positive, print_table, versions, write_csv
from torch import Tensor
from tqdm import tqdm

from mmcompress.cache import (
    EMS,
    H2O,
    CachePlan,
    CacheView,
    CompressedCache,
    KeyDiff,
    KNorm,
    KVMerger,
    MiKV,
    Random,
    SnapKV,
    StreamingLLM,
    attach,
)
from mmcompress.cache.parts import by_heads
from mmcompress.calls import through_layers
from mmcompress.config import WrapConfig
from mmcompress.eval import wilson
from mmcompress.image import GlobalCom2, GlobalRank
from mmcompress.pico import load, prompt, scenes
from mmcompress.tokens import KeepAll
from mmcompress.wrap import Wrapped

SIDE, KEEPS, WINDOW = 336, (0.5, 0.25, 0.1, 0.05), 8
HEAD = "<s>USER: <image>\n"
LOW = 0.19              # bytes of a token in 2 bits with its grids, a share of its 16 bits
HIGH = 0.2              # MiKV's share of exact tokens
COLUMNS = ("setting", "reducer", "method", "variant", "keep", "entering", "slots", "text", "bytes", "n", "accuracy",
           "difference", "half")
VARIANTS = ("all", "modality", "text first")


def mikv_of_bytes(k: float) -> tuple[float, float]:
    """What MiKV keeps, and the exact share of it, for the bytes of a share k of exact tokens."""
    return (1.0, (k - LOW) / (1 - LOW)) if k > LOW else (k / (HIGH + (1 - HIGH) * LOW), HIGH)


def plan_of(method: str, variant: str, k: float) -> CachePlan:
    """A method under a budget."""
    cls, options = METHODS[method], dict[str, Any]()
    if method in ("SnapKV", "EMS"):
        options["recent"] = WINDOW
    if cls is MiKV:
        k, options["high"] = (k, HIGH) if method == "MiKV" else mikv_of_bytes(k)
    return cls(keep={"image": k} if variant == "modality" else k, text_prior=variant == "text first", **options)


METHODS: dict[str, Any] = {"Random": Random, "StreamingLLM": StreamingLLM, "KNorm": KNorm, "KeyDiff": KeyDiff, "SnapKV": SnapKV,
                           "H2O": H2O, "EMS": EMS, "KVMerger": KVMerger, "MiKV": MiKV, "MiKV, equal bytes": MiKV}
REDUCERS = {"GlobalCom2": GlobalCom2, "GlobalRank": GlobalRank}
AFTER = ("KeyDiff", "H2O")              # plans that are tried after a reducer


@dataclass(frozen=True, eq=False)
class Case:
    """One row to be: a reducer or none, then a plan or none."""

    setting: str
    method: str
    variant: str
    keep: float
    plan: CachePlan | None = None
    reducer: str = ""
    entering: float = 1.0               # what the reducer keeps


def cases(setting: str, keeps: Sequence[float], methods: Sequence[str]) -> list[Case]:
    out = [Case(setting, "full", "all", 1.0)]
    out += [Case(setting, name, variant, k, plan_of(name, variant, k))
            for name in methods for variant in VARIANTS for k in keeps]
    if setting == "blind":
        for name in REDUCERS:
            for k in keeps:
                out.append(Case(setting, "full", "all", k, None, name, k))
                out += [Case(setting, m, "modality", k, plan_of(m, "modality", k), name, math.sqrt(k)) for m in AFTER
                        if m in methods]
    return out


# pictures and questions -------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Shown:
    """Pictures with the same number of questions each."""

    images: list[Any]
    asked: list[list[tuple[str, str]]]  # by picture: (question, answer)


def draw(start: int, stop: int, questions: int, seed: str) -> Shown:
    """Pictures start to stop - 1; each depends on `seed` and its number alone."""
    images, asked = [], []
    for i in range(start, stop):
        rng = random.Random(f"{seed}/{i}")
        kind, image, objects = scenes.scene(rng, SIDE, SIDE)
        images.append(image)
        asked.append(scenes.questions(rng, kind, objects, questions))
    return Shown(images, asked)


def tokens_of(processor: Any, texts: Sequence[str]) -> list[list[int]]:
    return [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def padded(rows: Sequence[Sequence[int]], side: str, fill: int) -> Tensor:
    width = max(map(len, rows))
    lack = [[fill] * (width - len(row)) for row in rows]
    return torch.tensor([[*pad, *row] if side == "left" else [*row, *pad] for pad, row in zip(lack, rows)])


# prefilling once, compressing often -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Record(CachePlan):
    """Keeps everything, and what every plan would see."""

    views: list[CacheView] = field(default_factory=list)
    accumulates: ClassVar[bool] = True

    def scores(self, x: CacheView) -> Tensor:
        raise NotImplementedError

    def __call__(self, x: CacheView) -> Any:
        self.views.append(x)
        return x.slots


@dataclass(frozen=True, eq=False)
class Prefilled:
    """A prompt in the cache, nothing compressed. mask (B, L); stock: tokens of the stock prompt, padding counted."""

    cache: CompressedCache
    views: list[CacheView]
    mask: Tensor
    stock: int


def prefill(handle: Wrapped, inputs: dict[str, Any], encoded: Any, reducer: Any = None) -> Prefilled:
    """Run a prompt with pictures, after a reducer or none, and tell the cache what it dropped."""
    handle.configure(WrapConfig(image=KeepAll() if reducer is None else reducer))
    run = handle.start(inputs, encoded=encoded)
    plan = Record()
    with attach(handle.model, plan) as attached:
        cache = attached.cache()
        counts = torch.zeros(len(inputs["input_ids"]), 4, dtype=torch.long)
        for item in run.items:
            counts[item.row, 1] += item.before - item.after
        cache.miss(counts)
        through_layers(handle, {**run.inputs, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}, run)
    ids = run.inputs["input_ids"]
    return Prefilled(cache, plan.views, run.inputs.get("attention_mask", torch.ones_like(ids)), inputs["input_ids"].shape[1])


def compressed(model: Any, held: Prefilled, plan: CachePlan | None) -> CompressedCache:
    """The cache that `attach(model, plan)` would have made of this prompt; None: nothing is dropped."""
    config = model.config.get_text_config(decoder=True)
    cache = CompressedCache(config, Random(keep=1.0) if plan is None else plan)
    line, known = cache.timeline, held.cache.timeline
    line.positions, line.tags = known.positions, known.tags
    for layer, x in zip(cache.slot_layers, held.views):
        layer.lazy_initialization(x.keys, x.values)
        layer.seen = layer.base = x.real.shape[1]
        bare = replace(x, slots=replace(x.slots, evidence=None))
        new = bare.slots if plan is None else plan(x if plan.accumulates else bare)
        if new in (x.slots, bare.slots):
            layer.keys, layer.values = x.keys, x.values
        else:
            layer.put(new)
            layer._forget_evidence()
    return cache


def ask(model: Any, cache: CompressedCache, mask: Tensor, ids: Tensor, wanted: Tensor) -> Tensor:
    """The logits of a further call where something is wanted, and the cache as it was before. -> (B, columns, V)

    ids (B, q) padded on the right; wanted (B, q): the next token of each, -100: none is wanted
    """
    first = int((wanted != -100).any(0).nonzero()[0, 0])
    positions = cache.timeline.positions[:, -1:] + 1 + torch.arange(ids.shape[1])
    out = model(input_ids=ids, attention_mask=torch.cat([mask, torch.ones_like(ids)], 1), position_ids=positions,
                past_key_values=cache, use_cache=True, logits_to_keep=ids.shape[1] - first)
    cache.crop(-ids.shape[1])
    return out.logits


def right(logits: Tensor, wanted: Tensor) -> Tensor:
    """Which rows' answers are all arg max. (B,) bool"""
    wanted = wanted[:, -logits.shape[1]:]
    return ((logits.argmax(-1) == wanted) | (wanted == -100)).all(1)


def answering(processor: Any, before: Sequence[Sequence[int]], answers: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Calls that end in an answer: ids (B, q) without its last token, and the token wanted after each (B, q)"""
    ends = tokens_of(processor, [f" {a}</s>" for a in answers])
    ids = padded([[*b, *e[:-1]] for b, e in zip(before, ends)], "right", 0)
    return ids, padded([[-100] * (len(b) - 1) + e for b, e in zip(before, ends)], "right", -100)


def questions_of(processor: Any, asked: Sequence[tuple[str, str]]) -> list[list[int]]:
    """What follows the picture in a prompt, up to the answer."""
    return tokens_of(processor, [prompt(q).removeprefix(HEAD) for q, _ in asked])


# measuring --------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Seen:
    """One case on some prompts: right (pictures, questions) bool, and shares of the stock cache."""

    right: Tensor
    slots: float
    text: float
    bytes: float
    entering: float


def look(cache: CompressedCache, held: Prefilled) -> tuple[float, float, float]:
    """Slots, text slots and bytes of a cache, as shares of what stock would hold."""
    tags, slots, text, nbytes, exact = held.views[0].tagged(), 0, 0, cache.nbytes, 0
    for layer in cache.slot_layers:
        parts = layer.parts or (layer.slots,)
        for part in (p for own in by_heads(parts).values() for p in own):
            valid = part.valid & held.views[0].real[:, None].expand(-1, part.valid.shape[1], -1).gather(2, part.column.long())
            is_text = tags[:, None].expand(-1, valid.shape[1], -1).gather(2, part.column.long()) == 0
            slots, text = slots + int(valid.sum()), text + int((valid & is_text).sum())
            exact += sum(x.numel() * x.element_size() for x in (part.keys, part.values) if isinstance(x, Tensor))
    x = held.views[0]
    heads = len(held.views) * x.keys.shape[1]
    stock = len(tags) * held.stock * heads * (x.keys.shape[-1] + x.values.shape[-1]) * 2
    whole = held.views[0].total.sum().item() * heads
    own = (x.real & (tags == 0)).sum().item() * heads
    return slots / whole, text / own, (nbytes - exact + exact // x.keys.element_size() * 2) / stock


def measure(handle: Wrapped, processor: Any, shown: Shown, wanted: Sequence[Case], number: int, rows: int,
            tick: Callable[[], Any]) -> Iterator[tuple[Case, Seen]]:
    """All cases on a few pictures. rows: prompts at a time where each question has its own"""
    model, adapter = handle.model, handle.adapter
    images = processor(images=shown.images, text=[HEAD] * len(shown.images), return_tensors="pt")
    encoded = adapter.encode(images, sorted({i for r in REDUCERS.values() for i in r.captures}))
    blind = [case for case in wanted if case.setting == "blind"]
    for name, share in dict.fromkeys((case.reducer, case.entering) for case in blind):
        reducer = REDUCERS[name](keep=share) if name else None
        held = prefill(handle, dict(images), encoded, reducer)
        left = handle.last[0].after
        turns = []
        for j in range(len(shown.asked[0])):
            asked = [one[j] for one in shown.asked]
            turns.append(answering(processor, questions_of(processor, asked), [a for _, a in asked]))
        for case in (c for c in blind if (c.reducer, c.entering) == (name, share)):
            with attached(model):
                cache = compressed(model, held, seeded(case.plan, number))
                shares = look(cache, held)
                hits = torch.stack([right(ask(model, cache, held.mask, *turn), turn[1]) for turn in turns], 1)
            yield case, Seen(hits, *shares, left)
            tick()
    aware = [case for case in wanted if case.setting == "aware"]
    each = max(1, rows // len(shown.asked[0]))
    for at in range(0, len(shown.images) if aware else 0, each):
        some = range(at, min(at + each, len(shown.images)))
        asked = [one for i in some for one in shown.asked[i]]
        source = [i for i in some for _ in shown.asked[i]]
        texts = questions_of(processor, asked)
        front = [images["input_ids"][0].tolist() + t[:-1] for t in texts]
        ids = padded(front, "left", 0)
        inputs = {"input_ids": ids, "attention_mask": padded([[1] * len(f) for f in front], "left", 0),
                  "pixel_values": images["pixel_values"][source], "image_sizes": images["image_sizes"][source]}
        held = prefill(handle, inputs, replace(encoded, features=[encoded.features[i] for i in source], vision={}))
        turn = answering(processor, [t[-1:] for t in texts], [a for _, a in asked])
        for case in aware:
            with attached(model):
                cache = compressed(model, held, seeded(case.plan, number + at))
                shares = look(cache, held)
                hits = right(ask(model, cache, held.mask, *turn), turn[1])
            yield case, Seen(hits.view(len(some), -1), *shares, handle.last[0].after)
            tick()


def attached(model: Any) -> Any:
    """Attention that looks at slots; the caches are made here."""
    return attach(model, Record())


def seeded(plan: CachePlan | None, number: int) -> CachePlan | None:
    return replace(plan, seed=number) if isinstance(plan, Random) else plan


def apart(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean of a - b and half its 95 % interval, with pictures as the units. a, b (pictures, questions) bool"""
    by_picture = (a.double() - b.double()).mean(1)
    return float(by_picture.mean()), float(1.96 * by_picture.std() / math.sqrt(len(by_picture)))


def row_of(case: Case, seen: Sequence[Seen], full: Sequence[Seen]) -> dict[str, Any]:
    hits, base = (torch.cat([s.right for s in some]) for some in (seen, full))
    weights = [len(s.right) for s in seen]
    mean = lambda name: sum(w * getattr(s, name) for w, s in zip(weights, seen)) / sum(weights)  # noqa: E731
    low, high = wilson(int(hits.sum()), hits.numel())
    difference, half = apart(hits, base) if len(hits) > 1 else (0.0, math.nan)
    return {"setting": case.setting, "reducer": case.reducer or None, "method": case.method, "variant": case.variant,
            "keep": case.keep, "entering": mean("entering"), "slots": mean("slots"), "text": mean("text"),
            "bytes": mean("bytes"), "n": hits.numel(), "pictures": len(hits), "accuracy": float(hits.double().mean()),
            "low": low, "high": high, "difference": difference, "half": half}


def one_turn_difference(handle: Wrapped, processor: Any, shown: Shown) -> float:
    """How far logits in two turns with the full cache are from the one prompt's, at most."""
    model, asked = handle.model, [one[0] for one in shown.asked]
    texts = [prompt(q) + f" {a}</s>" for q, a in asked]
    whole = processor(images=shown.images, text=texts, padding=True, padding_side="right", return_tensors="pt")
    head = processor(images=shown.images, text=[HEAD] * len(asked), return_tensors="pt")
    held = prefill(handle, dict(head), handle.adapter.encode(head))
    ids, wanted = answering(processor, questions_of(processor, asked), [a for _, a in asked])
    with handle.disable():
        stock = model(**whole).logits
    start = head["input_ids"].shape[1]
    if not torch.equal(whole["input_ids"][:, start:-1] * (ids != 0), ids):
        raise RuntimeError("the tokenizer joins picture and question; two turns are not the one prompt's tokens")
    with attached(model):
        logits = ask(model, compressed(model, held, None), held.mask, ids, wanted)
    there = wanted[:, -logits.shape[1]:] != -100
    return float((logits - stock[:, start:-1][:, -logits.shape[1]:])[there].abs().max())


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against bytes: by modality in both settings, the three budgets, the compositions."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(15, 8.5), layout="constrained")
    axes = fig.subplots(2, 2).flat

    def line(ax: Any, some: list[dict[str, Any]], label: str, **style: Any) -> None:
        some = sorted(some, key=lambda r: r["bytes"])
        ax.errorbar([r["bytes"] for r in some], [100 * r["accuracy"] for r in some], [100 * r["half"] for r in some],
                    label=label, marker="o", ms=3, lw=1.2, elinewidth=0.6, **style)

    def of(**want: Any) -> list[dict[str, Any]]:
        return [r for r in rows if all(r[k] == v for k, v in want.items())]

    for setting in ("blind", "aware"):
        if not of(setting=setting):
            continue
        ax = next(axes)
        for i, name in enumerate(METHODS):
            line(ax, of(setting=setting, method=name, variant="modality", reducer=None), name, color=f"C{i}")
        ax.set_title(f"{setting}: image budget, text whole")
        ax = next(axes)
        if setting == "blind":
            for i, name in enumerate(REDUCERS):
                line(ax, of(reducer=name, method="full"), f"{name} alone", color=f"C{i}")
                for method, mark in zip(AFTER, ("--", ":")):
                    line(ax, of(reducer=name, method=method), f"{name} half, {method} half", color=f"C{i}", ls=mark)
            for i, method in enumerate(AFTER):
                some = of(setting=setting, reducer=None, method=method, variant="modality")
                line(ax, some, f"{method} alone", color=f"C{i + 2}")
            ax.set_title("blind: reducer, cache, or half each")
        else:
            for i, name in enumerate(("KNorm", "KeyDiff", "SnapKV", "H2O")):
                for variant, mark in zip(VARIANTS, (":", "-", "--")):
                    line(ax, of(setting=setting, method=name, variant=variant), f"{name}, {variant}", color=f"C{i}", ls=mark)
            ax.set_title("aware: who pays for text")
    for ax in fig.axes:
        ax.set_xscale("log")
        ax.set_xticks([0.025, 0.05, 0.1, 0.25, 0.5], labels=[".025", ".05", ".1", ".25", ".5"])
        ax.set_xticks([], minor=True)
        ax.set(xlabel="bytes, share of the stock cache in 16 bits", ylabel="right answers, %", ylim=(0, 101))
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=7, ncols=2)
    fig.savefig(path, dpi=130)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=positive, default=100)
    parser.add_argument("--questions", type=positive, default=4, help="about each picture")
    parser.add_argument("--keep", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--settings", nargs="+", choices=("blind", "aware"), default=("blind", "aware"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=tuple(METHODS))
    parser.add_argument("--batch", type=positive, default=20, help="pictures, and prompts, at a time")
    parser.add_argument("--seed", default="cache")
    parser.add_argument("--out", type=Path, default=Path("out/cache_pico.csv"))
    args = parser.parse_args(argv)
    model, processor = load()
    wanted = [case for setting in args.settings for case in cases(setting, args.keep, args.methods)]
    seen: dict[Case, list[Seen]] = {case: [] for case in wanted}
    starts = range(0, args.pictures, args.batch)
    drawn = [draw(at, min(at + args.batch, args.pictures), args.questions, args.seed) for at in starts]
    each = max(1, args.batch // args.questions)
    steps = sum(sum(math.ceil(len(s.images) / each) if c.setting == "aware" else 1 for c in wanted) for s in drawn)
    about = {"seed": args.seed, **versions(torch.device("cpu"), torch.float32)}
    rows: list[dict[str, Any]] = []
    with Wrapped(model, WrapConfig(image=KeepAll())) as handle, tqdm(total=steps, unit="case", mininterval=5) as bar:
        gap = one_turn_difference(handle, processor, drawn[0])
        bar.write(f"two turns with the full cache differ from the one prompt by {gap:.1e} in logits", file=sys.stderr)
        if gap > 1e-4:
            raise RuntimeError(f"logits of two turns with the full cache differ by {gap:.1e}; they are the same tokens")
        for at, shown in zip(starts, drawn):
            for case, one in measure(handle, processor, shown, wanted, at, args.batch, bar.update):
                seen[case].append(one)
            full = {s: next(seen[c] for c in wanted if c.setting == s and c.method == "full" and not c.reducer)
                    for s in args.settings}
            rows = [row_of(case, some, full[case.setting]) for case, some in seen.items()]
            write_csv(args.out, [row | about for row in rows])
    print_table(f"pico, {SIDE} x {SIDE} pixels; difference to the full cache ± half a 95 % interval", rows, COLUMNS)
    picture(rows, args.out.with_suffix(".png"))
    print(args.out, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
