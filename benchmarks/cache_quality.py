"""What each cache method costs in quality, at equal bytes: text after a compressed context, and keys planted in it.

    python benchmarks/cache_quality.py --model smollm2 --texts essays --out out/cache_quality.csv --plot out/cache_quality.png
    python benchmarks/cache_quality.py --out out/cache_quality.csv --plot ...               # table and picture of what is there
    python benchmarks/cache_quality.py --model smollm2 --texts essays --check               # the short cut against the real way

Tasks. `text`: bits a character of what follows a context in its own essay. `asked`: lines such as "The pass key of Harold is
48213." lie in a context, none in its last tokens (those that a sliding window holds, or 64), and the prompt ends by asking for
one of them, so methods that look at the last queries know what is asked. `second turn`: the same, but the context is compressed
before the question comes. Of an answer: whether greedy decoding gives all digits, and a digit's mean log-probability in nats.

A prompt's own attention does not depend on the plan, so a prompt is read once; then each plan compresses what every layer held
(`SlotLayer.settle` itself, on a fresh cache) and the continuation is run. Budgets are shares of the bytes that a bfloat16 stock
cache holds of the same tokens: keys and values of slots that there are, floats counted as 2 bytes whatever this run computes
in; columns, validity and masses are in `notes_bytes`. Layers with sliding windows are left alone, and counted on neither side.
Rows are written as they come, and a second run goes on where the first stopped. `*.summary.csv`: means and paired differences,
95 %, percentile bootstrap over contexts.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from common import positive, versions
from torch import Tensor
from tqdm import tqdm

from mmcompress.cache import (
    EMS,
    H2O,
    CachePlan,
    CacheView,
    Chain,
    CompressedCache,
    KeyDiff,
    KNorm,
    KVMerger,
    MiKV,
    MiniCache,
    Random,
    RazorAttention,
    Recent,
    SlotLayer,
    Slots,
    SnapKV,
    StreamingLLM,
    attach,
    find_retrieval_heads,
    scores,
)
from mmcompress.ops import kv_scores

BUDGETS = (0.5, 0.25, 0.125)
FULL = "full cache"
KEY = ("model", "task", "length", "item", "method", "budget")
MEASURES = ("bits_per_char", "exact", "logprob")
COLUMNS = (*KEY, *MEASURES, "kv_share", "kv_bytes", "notes_bytes", "stock_bytes", "seconds")
NAMES = ("Harold", "Alice", "Victor", "Martha", "Oscar", "Julia", "Simon", "Clara", "Edwin", "Norma", "Felix", "Irene")
PLANTED = " The pass key of {0} is {1}. Remember it: the pass key of {0} is {1}."
ASKED = "\n\nThe pass key of {} is"
Plan = CachePlan | Chain


@dataclass(frozen=True)
class Facts:
    """What budgets are worked out from: the model's compressed layers of all its layers, their key heads, a head's channels."""

    model: Any
    layers: int
    depth: int
    heads: int
    dim: int

    @classmethod
    def of(cls, model: Any) -> Facts:
        config = model.config.get_text_config(decoder=True)
        layers = len(CompressedCache(config).slot_layers)
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(model, layers, config.num_hidden_layers, layers * config.num_key_value_heads, dim)

    def stored(self, bits: int) -> float:
        """Share of 16 bits that a number in few bits takes, with float16 scale and offset for half a head's channels."""
        return (bits + 32 / (self.dim / 2)) / 16

    @cached_property
    def _found(self) -> dict[tuple[float, float], tuple[tuple[int, int], ...]]:
        return {}

    def retrieval(self, induction: float, echo: float) -> tuple[tuple[int, int], ...]:
        """Retrieval heads by a probe of 500 random tokens four times."""
        if (induction, echo) not in self._found:
            self._found[induction, echo] = find_retrieval_heads(self.model, induction, echo, period=500)
        return self._found[induction, echo]


def razor(budget: float, facts: Facts) -> Plan | None:
    """Retrieval heads whole, as many as the paper's but by induction no more than half of the budget; the others the rest."""
    for echo in (0.01, 0.0):
        heads = facts.retrieval(min(0.14, budget / 2), echo)
        left = budget * facts.heads - len(heads)
        if left > 0:
            return RazorAttention(keep=left / (facts.heads - len(heads)), recent=0, retrieval=heads)
    return None


def mikv(budget: float, facts: Facts, bits: int) -> Plan | None:
    """All tokens stay, as many of them exact as the budget pays for."""
    low = facts.stored(bits)
    return MiKV(high=(budget - low) / (1 - low), bits=bits) if budget >= low else None


def evict_and_round(budget: float, facts: Facts) -> Plan | None:
    """SnapKV's choice, a fifth of it exact, the rest in two bits."""
    keep = budget / (0.2 + 0.8 * facts.stored(2))
    return Chain((SnapKV(keep=keep), MiKV(high=0.2, bits=2))) if keep < 1 else None


def minicache(budget: float, facts: Facts) -> Plan | None:
    """Directions in four bits, for as many pairs of layers, from the top, as the budget asks for."""
    pair = 0.05 + 0.95 * (facts.stored(4) / 2 + 1 / facts.dim)
    pairs = int(np.ceil((1 - budget) * facts.depth / 2 / (1 - pair)))
    if facts.layers < facts.depth or 2 * pairs > facts.depth:
        return None
    return MiniCache(start=facts.depth - 2 * pairs, bits=4)


# a method: (share of the bytes, or a number of slots, Facts) -> its plan; None where it cannot be held in so little
METHODS: dict[str, Callable[[Any, Facts], Plan | None]] = {
    "Random": lambda b, _: Random(keep=b),
    "Recent": lambda b, _: Recent(keep=b),
    "StreamingLLM": lambda b, _: StreamingLLM(keep=b),
    "H2O": lambda b, _: H2O(keep=b),
    "H2O, 4 sinks": lambda b, _: H2O(keep=b, sinks=4),
    "SnapKV": lambda b, _: SnapKV(keep=b),
    "KNorm": lambda b, _: KNorm(keep=b),
    "KeyDiff": lambda b, _: KeyDiff(keep=b),
    "RazorAttention": razor,
    "EMS": lambda b, _: EMS(keep=b),
    "KVMerger": lambda b, _: KVMerger(keep=b),
    "KVMerger, mass": lambda b, _: KVMerger(keep=b, mass=True),
    "KVMerger, distance": lambda b, _: KVMerger(keep=b, sigma="distance"),
    "KVMerger, distance, mass": lambda b, _: KVMerger(keep=b, sigma="distance", mass=True),
    "MiKV int2": lambda b, facts: mikv(b, facts, 2),
    "MiKV int4": lambda b, facts: mikv(b, facts, 4),
    "SnapKV + MiKV int2": evict_and_round,
    "MiniCache int4": minicache,
}
SLOTS = {256: ("EMS", "SnapKV")}                                                # absolute budgets, and whose
CLAIMS = (                                                                      # (method, against, at these budgets)
    *((name, "H2O", ("50 %",)) for name in METHODS if name.startswith("KVMerger")),
    ("RazorAttention", "StreamingLLM", ("50 %", "25 %", "12.5 %")),
    *((name, other, ("50 %", "25 %", "12.5 %")) for name in ("MiKV int2", "MiKV int4", "SnapKV + MiKV int2")
      for other in ("H2O", "SnapKV")),
    ("MiniCache int4", "StreamingLLM", ("50 %", "25 %")),
    ("EMS", "SnapKV", ("256 slots",)),
)


class Setting(NamedTuple):
    method: str
    budget: str
    plan: Plan


class Item(NamedTuple):
    """One prompt, compressed once it is read, and what follows: its last `scored` tokens count."""
    task: str
    length: int
    name: str
    prompt: list[int]
    fed: list[int]
    scored: int
    chars: int = 0                                                              # of text


@dataclass(frozen=True)
class Whole(CachePlan):
    """Keeps everything, and notes what each layer was shown."""

    views: dict[int, CacheView] = field(default_factory=dict)

    def scores(self, x: CacheView) -> Tensor:
        raise AssertionError("nothing is scored")

    def __call__(self, x: CacheView) -> Slots:
        self.views[x.layer] = x
        return x.slots


class Prompt(NamedTuple):
    """A prompt that has been read: what each compressed layer was shown, and the other layers."""
    views: dict[int, CacheView]
    layers: list[Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a text model with its tokenizer; none: table and picture alone")
    parser.add_argument("--texts", type=Path, nargs="+", help="text files, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("out/cache_quality.csv"), help="a row a prompt and setting")
    parser.add_argument("--plot", type=Path, help="picture: quality against bytes; with several models, of the last one")
    parser.add_argument("--methods", nargs="*", metavar="METHOD", default=list(METHODS),
                        help="default: all; none: the full cache alone")
    parser.add_argument("--lengths", type=positive, nargs="*", default=[1024, 2048, 4096], help="contexts of `text`, tokens")
    parser.add_argument("--continuation", type=positive, default=128, help="tokens of text that follow")
    parser.add_argument("--text-items", type=positive, default=16, help="contexts of each length")
    parser.add_argument("--key-length", type=positive, default=1024, help="context of planted keys, tokens")
    parser.add_argument("--key-items", type=int, default=48, help="contexts with planted keys, for each of the two tasks")
    parser.add_argument("--planted", type=positive, default=4, help="keys in a context")
    parser.add_argument("--minutes", type=float, help="begin no prompt after so many; prompts of all tasks are interleaved")
    parser.add_argument("--check", action="store_true", help="compare every setting with the real way on one prompt, no more")
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.methods) - set(METHODS)):
        parser.error(f"no method {unknown[0]!r}; known: {'; '.join(METHODS)}")
    if options.model is not None:
        if options.texts is None:
            parser.error("--model needs --texts")
        _run(options)
    if options.check:
        return
    summary = summarise(read(options.out))
    with options.out.with_suffix(".summary.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(summary[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in summary)
    print(markdown(summary))
    if options.plot is not None:
        picture(summary, options.plot)
    print(options.out, options.out.with_suffix(".summary.csv"), options.plot or "", sep="\n")


def _run(options: Any) -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()                            # essays are longer than a tokenizer's limit
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    texts = read_texts(options.texts, tokenizer)
    window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    lists = [text_items(texts, tokenizer, n, options.continuation, options.text_items) for n in options.lengths]
    if options.key_items:
        lists += key_items(texts, tokenizer, options.key_length, options.key_items, options.planted, max(64, window or 0))
    everything = settings(Facts.of(model), options.methods)
    if options.check:
        check(model, [items[0] for items in lists], everything)
        return
    run(model, options.model.name, interleave(lists), everything, options.out, options.minutes)


def settings(facts: Facts, methods: Sequence[str]) -> list[Setting]:
    """All methods at all budgets, the full cache first."""
    out = [Setting(FULL, FULL, Recent(keep=1.0))]
    for name in methods:
        plans = [(f"{100 * b:g} %", METHODS[name](b, facts)) for b in BUDGETS]
        plans += [(f"{n} slots", METHODS[name](n, facts)) for n, whose in SLOTS.items() if name in whose]
        out += [Setting(name, budget, plan) for budget, plan in plans if plan is not None]
    return out


def read_texts(paths: Sequence[Path], tokenizer: Any) -> dict[str, list[int]]:
    """Tokens of every file, by name, longest first; what a tokenizer puts in front of a text is left out."""
    files = [file for path in paths for file in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    ids = {file.stem: tokenizer(file.read_text(), add_special_tokens=False).input_ids for file in files}
    return dict(sorted(ids.items(), key=lambda item: -len(item[1])))


def windows(texts: dict[str, list[int]], length: int, seed: int = 0) -> list[tuple[str, list[int]]]:
    """Stretches of so many tokens of one text each, none overlapping, shuffled."""
    found = [(f"{name}@{at}", ids[at:at + length]) for name, ids in texts.items()
             for at in range(0, len(ids) - length + 1, length)]
    random.Random(seed).shuffle(found)
    return found


def text_items(texts: dict[str, list[int]], tokenizer: Any, length: int, continuation: int, count: int) -> list[Item]:
    """The first token that follows is predicted by the prompt, whatever the plan, so it does not count."""
    front = tokenizer("").input_ids
    found = windows(texts, length - len(front) + continuation)[:count]
    if len(found) < count:
        print(f"text, {length} tokens: {len(found)} contexts in these texts, not {count}", file=sys.stderr)
    return [Item("text", length, name, front + ids[:-continuation], ids[-continuation:], continuation - 1,
                 len(tokenizer.decode(ids[1 - continuation:]))) for name, ids in found]


def key_items(texts: dict[str, list[int]], tokenizer: Any, length: int, count: int, planted: int,
              last: int) -> list[list[Item]]:
    """`asked` and `second turn` over the same contexts. last: tokens at the end of a context where no key lies"""
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    front, asked, second = tokenizer("").input_ids, [], []
    for i, (name, essay) in enumerate(itertools.islice(windows(texts, length), count)):
        rng = random.Random(f"keys/{i}")
        names = rng.sample(NAMES, planted)
        keys = ["".join(rng.choices("0123456789", k=5)) for _ in names]
        lines = [encode(PLANTED.format(*pair)) for pair in zip(names, keys)]
        room = length - len(front) - sum(map(len, lines))
        places = sorted(rng.sample(range(room - last), planted))
        context = list(front)
        for start, stop, line in zip([0, *places], [*places, room], [*lines, []]):
            context += essay[start:stop] + line
        which = rng.randrange(planted)
        question, answer = encode(ASKED.format(names[which])), encode(f" {keys[which]}")
        if tokenizer.decode(answer[:1]).strip():
            raise SystemExit(f"{tokenizer.name_or_path} joins a space and a digit in one token: the prompt itself would "
                             f"predict some of the answer")
        asked.append(Item("asked", length, name, context + question, answer, len(answer) - 1))
        second.append(Item("second turn", length, name, context, question + answer, len(answer) - 1))
    return [asked, second]


def interleave(lists: Sequence[Sequence[Item]]) -> list[Item]:
    """All lists at the pace that ends them together."""
    placed = [((i + 0.5) / len(items), k, item) for k, items in enumerate(lists) for i, item in enumerate(items)]
    return [item for _, _, item in sorted(placed, key=lambda p: p[:2])]


def run(model: Any, name: str, items: Sequence[Item], everything: Sequence[Setting], out: Path, minutes: float | None) -> None:
    """Measure what the file does not hold yet, and add it row by row."""
    mend(out)
    done = {tuple(row[k] for k in KEY) for row in read(out)}
    key = lambda item, s: (name, item.task, str(item.length), item.name, s.method, s.budget)  # noqa: E731
    out.parent.mkdir(parents=True, exist_ok=True)
    header = not out.exists() or not out.stat().st_size
    stop, same = time.monotonic() + 60 * (minutes or float("inf")), versions(torch.device("cpu"), torch.float32)
    with out.open("a", newline="") as file, tqdm(total=len(items) * len(everything), disable=None) as bar:
        writer = csv.DictWriter(file, fieldnames=[*COLUMNS, *same])
        if header:
            writer.writeheader()
        for item in items:
            left = [s for s in everything if key(item, s) not in done]
            bar.update(len(everything) - len(left))
            if not left:
                continue
            if time.monotonic() > stop:
                print(f"{minutes:g} minutes are over; the same command goes on", file=sys.stderr)
                return
            bar.set_description(f"{item.task} {item.length}")
            with remembered():
                prompt = prefill(model, item.prompt)
                for setting in left:
                    row = dict(zip(KEY, key(item, setting))) | measure(model, prompt, item, setting.plan) | same
                    writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
                    file.flush()
                    bar.update()


@torch.no_grad()
def prefill(model: Any, ids: list[int]) -> Prompt:
    probe = Whole()
    with attach(model, probe) as attached:
        cache = attached.cache()
        model(input_ids=torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
    return Prompt(probe.views, list(cache.layers))


def compressed(attached: Any, prompt: Prompt) -> CompressedCache:
    """The cache as it would be after the prompt: each layer takes in what it was given and settles, without the attention."""
    cache = attached.cache()
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, SlotLayer):
            cache.layers[i] = copy(prompt.layers[i])                            # its tensors are replaced, never written to
            continue
        x = prompt.views[i]
        layer.update(x.keys, x.values)
        layer.hidden = x.hidden
        layer.note(x.sight, x.positions, len(x.keys), x.keys.device)
        layer.settle(x.queries.flatten(1, 2), x.sight, x.scaling, x.softcap)
    return cache


@contextmanager
def remembered() -> Iterator[None]:
    """A prompt's column sums, which many plans ask for, reckoned once a layer, and in tiles that fit a core's cache."""
    known: dict[int, Tensor] = {}
    stock = scores.column_sums

    def column_sums(x: CacheView, *args: Any) -> Tensor:
        if not x.intact or x.slots.count != x.queries.shape[3]:
            return stock(x, *args)
        if x.layer not in known:
            known[x.layer] = stock(x, *args)
        return known[x.layer]

    users = [m for name, m in sys.modules.items() if name.startswith("mmcompress.cache.") and hasattr(m, "column_sums")]
    with mock.patch.object(kv_scores, "ROWS", 128):
        patches = [mock.patch.object(m, "column_sums", column_sums) for m in users]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


@torch.no_grad()
def measure(model: Any, prompt: Prompt, item: Item, plan: Plan) -> dict[str, Any]:
    """The measures and bytes of one prompt and plan."""
    start = time.perf_counter()
    with attach(model, plan) as attached:
        cache = compressed(attached, prompt)
        kv, notes, stock = held(cache)
        logits = _follow(model, cache, item)
    seconds = time.perf_counter() - start
    told = -F.cross_entropy(logits, torch.tensor(item.fed[-item.scored:]), reduction="none")
    row: dict[str, Any] = {"kv_share": kv / stock, "kv_bytes": kv, "notes_bytes": notes, "stock_bytes": stock,
                           "seconds": seconds}
    if item.chars:
        return row | {"bits_per_char": float(-told.sum()) / np.log(2) / item.chars}
    exact = bool((logits.argmax(-1) == torch.tensor(item.fed[-item.scored:])).all())
    return row | {"exact": int(exact), "logprob": float(told.mean())}


def _follow(model: Any, cache: CompressedCache, item: Item) -> Tensor:
    """Logits of the tokens that count, the ones before them given: greedy decoding says them all if each is the largest."""
    out = model(input_ids=torch.tensor([item.fed[:-1]]), past_key_values=cache, logits_to_keep=item.scored)
    logits: Tensor = out.logits[0].float()
    return logits


def held(cache: CompressedCache) -> tuple[int, int, int]:
    """Bytes of keys and values, floats as bfloat16; of what is noted about slots; and of the stock cache's keys and values.

    Of slots that there are, in exact parts: a head that holds fewer than its layer's longest is not charged for the difference.
    """
    stores: dict[int, int] = {}
    kv = notes = stock = 0
    for layer in cache.slot_layers:
        if layer.whole:
            whole = 2 * (layer.keys.numel() + layer.values.numel())
            kv, stock = kv + whole, stock + whole
            continue
        stock += 2 * layer.stock_nbytes // layer.dtype.itemsize
        for part in layer.parts:
            count = int(part.valid.sum())
            notes += count * (5 + 4 * (part.bias is not None) + 4 * (part.evidence is not None))
            for x in (part.keys, part.values):
                if isinstance(x, Tensor):
                    kv += 2 * count * x.shape[-1]
                else:                                                           # once where two layers hold the same memory
                    stores |= {t.data_ptr(): t.numel() * min(2, t.element_size()) for t in x.tensors()}
    return kv + sum(stores.values()), notes, stock


@torch.no_grad()
def check(model: Any, items: Sequence[Item], everything: Sequence[Setting], within: float = 1e-4) -> float:
    """The greatest difference of logits from the model that compresses as it reads; SystemExit above `within`."""
    worst = 0.0
    for item, setting in tqdm([(i, s) for i in items for s in everything], desc="check", disable=None):
        with remembered(), attach(model, setting.plan) as attached:
            cache = attached.cache()
            model(input_ids=torch.tensor([item.prompt]), past_key_values=cache, logits_to_keep=1)
            bytes_real, real = held(cache), _follow(model, cache, item)
        with remembered():
            prompt = prefill(model, item.prompt)
            with attach(model, setting.plan) as attached:
                cache = compressed(attached, prompt)
                bytes_ours, ours = held(cache), _follow(model, cache, item)
        apart = float((real - ours).abs().max())
        if apart > within or bytes_real != bytes_ours:
            raise SystemExit(f"{item.task}, {setting.method} {setting.budget}: logits are {apart:.2g} from the real way's, "
                             f"bytes {bytes_ours} and {bytes_real}")
        worst = max(worst, apart)
    print(f"{len(everything)} settings on {len(items)} prompts: logits within {worst:.2g} of the real way's, bytes equal")
    return worst


def read(path: Path) -> list[dict[str, str]]:
    """Rows of an earlier run, or of one that goes on; without a last one that is not complete."""
    text = path.read_text() if path.exists() else ""
    return list(csv.DictReader(text[:text.rfind("\n") + 1].splitlines()))


def mend(path: Path) -> None:
    """Take a last row that was cut short out of the file."""
    if path.exists() and not (text := path.read_text()).endswith("\n"):
        path.write_text(text[:text.rfind("\n") + 1])


def summarise(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Of each measure and setting: its mean, and the paired difference from the full cache; then those of CLAIMS."""
    values: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    for row in rows:
        for measure in (m for m in MEASURES if row[m]):
            found = values.setdefault((row["model"], row["task"], row["length"], measure, row["method"], row["budget"]), {})
            found[row["item"]] = {"value": float(row[measure]), "kv": float(row["kv_share"]),
                                  "notes": int(row["notes_bytes"]) / int(row["stock_bytes"])}
    last = {k: rows[-1][k] for k in versions(torch.device("cpu"), torch.float32)} if rows else {}
    out = []
    for key in values:
        out.append(_compared(values, key, (*key[:4], FULL, FULL)) | last)
    for key in values:
        for method, other, budgets in CLAIMS:
            if key[4] == method and key[5] in budgets and (*key[:4], other, key[5]) in values:
                out.append(_compared(values, key, (*key[:4], other, key[5])) | last)
    return out


def _compared(values: dict[tuple[str, ...], dict[str, dict[str, float]]], key: tuple[str, ...],
              other: tuple[str, ...]) -> dict[str, Any]:
    ours, theirs = values[key], values.get(other, {})
    both = [item for item in ours if item in theirs]
    mean, low, high = interval([of["value"] for of in ours.values()])
    apart, apart_low, apart_high = interval([ours[item]["value"] - theirs[item]["value"] for item in both])
    shares = {f"{name}_share": float(np.mean([of[name] for of in ours.values()])) for name in ("kv", "notes")}
    return dict(zip(("model", "task", "length", "measure", "method", "budget"), key)) | shares | {
        "n": len(ours), "mean": mean, "low": low, "high": high, "against": other[4], "pairs": len(both),
        "difference": apart, "difference_low": apart_low, "difference_high": apart_high}


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """Mean and 95 % of it, contexts drawn anew."""
    if not values:
        return float("nan"), float("nan"), float("nan")
    drawn = np.random.default_rng(0).choice(np.asarray(values), (draws, len(values))).mean(1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(np.mean(values)), float(low), float(high)


def markdown(summary: Sequence[dict[str, Any]]) -> str:
    """One table: a row a task, method and budget; then the paired differences of CLAIMS."""
    head = "| model | task | tokens | method | budget | keys + values | notes | n | measure | mean | - full cache (95 %) |"
    lines = [head, "|---" * head.count(" | ") + "|---|"]
    for r in (r for r in summary if r["against"] == FULL):
        lines.append(f"| {r['model']} | {r['task']} | {r['length']} | {r['method']} | {r['budget']} | "
                     f"{100 * r['kv_share']:.1f} % | {100 * r['notes_share']:.1f} % | {r['n']} | {r['measure']} | "
                     f"{r['mean']:.3f} | {_difference(r)} |")
    head = "| model | task | tokens | measure | budget | method | against | n | difference (95 %) |"
    lines += ["", head, "|---" * head.count(" | ") + "|---|"]
    for r in (r for r in summary if r["against"] != FULL):
        lines.append(f"| {r['model']} | {r['task']} | {r['length']} | {r['measure']} | {r['budget']} | {r['method']} | "
                     f"{r['against']} | {r['pairs']} | {_difference(r)} |")
    return "\n".join(lines)


def _difference(r: dict[str, Any]) -> str:
    if r["method"] == FULL:
        return ""
    return f"{r['difference']:+.3f} ({r['difference_low']:+.3f} to {r['difference_high']:+.3f})"


def picture(summary: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel a task and measure: quality against the bytes of keys and values."""
    from mmcompress.viz.figure import new_figure, save

    summary = [r for r in summary if r["against"] == FULL and r["model"] == summary[-1]["model"]]
    panels = list(dict.fromkeys((r["task"], r["length"], r["measure"]) for r in summary))
    methods = list(dict.fromkeys(r["method"] for r in summary if r["method"] != FULL))
    wide = min(4, len(panels) + 1)
    high = -(-(len(panels) + 1) // wide)
    figure = new_figure(4.3 * wide, 3.7 * high)
    axes = figure.subplots(high, wide, squeeze=False).flatten()
    for ax, panel in zip(axes, panels):
        _panel(ax, [r for r in summary if (r["task"], r["length"], r["measure"]) == panel], methods)
    for ax in axes[len(panels):]:
        ax.set_axis_off()
    handles: dict[str, Any] = {}
    for ax in axes[:len(panels)]:
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels())}
    axes[len(panels)].legend(handles.values(), handles.keys(), loc="center", frameon=False, fontsize=8.5)
    figure.tight_layout()
    save(figure, path)


def _panel(ax: Any, rows: Sequence[dict[str, Any]], methods: Sequence[str]) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    from mmcompress.viz.figure import INK, quiet
    from mmcompress.viz.pareto import COLORS, MARKERS

    titles = {"bits_per_char": "bits a character", "exact": "exact answers", "logprob": "log-probability of a digit"}
    for i, method in enumerate(methods):
        own = sorted((r for r in rows if r["method"] == method), key=lambda r: r["kv_share"])
        ax.plot([r["kv_share"] for r in own], [r["mean"] for r in own], label=method, color=COLORS[i % len(COLORS)],
                marker=MARKERS[i % len(MARKERS)], linestyle="-" if i < len(COLORS) else (0, (4, 2)), markersize=5,
                linewidth=1.4, markeredgecolor="white", markeredgewidth=0.6)
    for full in (r for r in rows if r["method"] == FULL):
        ax.axhline(full["mean"], color=INK, linestyle=(0, (1, 2)), linewidth=1.2, label=FULL)
    first = rows[0]
    ax.set_title(f"{first['task']}, {first['length']} tokens: {titles[first['measure']]} (n = {max(r['n'] for r in rows)})",
                 fontsize=9, color=INK, loc="left")
    ax.set_xscale("log")
    ax.set_xticks([*BUDGETS], [f"{100 * b:g} %" for b in BUDGETS])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    if first["measure"] == "exact":
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    if first["measure"] == "bits_per_char":
        ax.invert_yaxis()                                                       # better is up in every panel
    quiet(ax)


if __name__ == "__main__":
    main()
