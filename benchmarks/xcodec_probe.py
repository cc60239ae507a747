"""The claim of X-Codec in small: with semantics in front of the books, the first book says which phones are spoken.

    mmcompress train configs/xcodec-tiny.yaml --out semantic
    mmcompress train configs/xcodec-tiny.yaml --out plain --set semantic=false --set weights.semantic=0
    python benchmarks/xcodec_probe.py semantic/model plain/model --out out/xcodec_probe.csv

    python benchmarks/speech.py make corpus; python benchmarks/phones.py corpus          # recorded speech, aligned
    ... --set data.files='[corpus]' --set ...; python benchmarks/xcodec_probe.py ... --corpus corpus

A linear probe (multinomial logistic regression) reads the codes of a frame and of two frames on either side, one-hot, and says
the phone at the middle of the frame (39 of ARPAbet; pauses are not asked about). The digits' probe reads how often each code
occurs in each third of a spoken digit. It learns from other sounds than it is tested on, and for --corpus from those that the
codecs learned from, too. `teacher` (what the semantic path is given, not quantised) and `majority` stand beside it. Intervals:
95 %, percentile bootstrap over sounds; the difference to the last codec is paired. Writes CSV, and PNG beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import positive, print_table, versions, write_csv
from torch import Tensor
from tqdm import tqdm
from transformers import XcodecModel

from mmcompress.audio import load, tokenize
from mmcompress.audio.speech import PHONEMES, draw
from mmcompress.train.codec.segments import held_out

RATE, FRAME, AROUND, THIRDS = 16_000, 0.02, 2, 3
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLUMNS = ("codec", "task", "reads", "sounds", "n", "accuracy", "low", "high", "difference", "difference_low",
           "difference_high")


class Item(NamedTuple):
    """A sound and what is said in it."""
    samples: Tensor
    spans: list[tuple[str, float, float]]           # label, seconds


class Rows(NamedTuple):
    """What a probe learns from or is asked: `x` (M, ...) features, `y` (M) classes, `sound` (M) which it is of."""
    x: Tensor
    y: Tensor
    sound: Tensor


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders of X-Codecs of one teacher; the last is compared with")
    parser.add_argument("--corpus", type=Path, help="recorded speech with phones.json instead of synthesised")
    parser.add_argument("--learn", type=positive, default=600, help="synthesised sounds to learn from, of each task")
    parser.add_argument("--test", type=positive, default=300, help="and to be tested on")
    parser.add_argument("--books", type=positive, nargs="+", default=(1, 8))
    parser.add_argument("--out", type=Path, default=Path("out/xcodec_probe.csv"))
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for task, learn, test in _tasks(options):
        right: dict[str, Tensor] = {}
        for folder in reversed(options.models):
            name = folder.parent.name if folder.name == "model" else folder.name
            model = XcodecModel.from_pretrained(folder).eval()
            for reads, found in _probes(model, task, learn, test, options.books, first=folder == options.models[0]):
                label = reads if reads in ("teacher", "majority") else name
                rows.append(_row(label, task, reads, found, right.get(reads)))
                right.setdefault(reads, found[0])
                print_table(f"{task}", rows[-1:], COLUMNS)
    write_csv(options.out, [row | versions(torch.device("cpu"), torch.float32) for row in rows])
    _picture(rows, options.out.with_suffix(".png"))
    print(options.out, options.out.with_suffix(".png"), sep="\n")


def _tasks(options: Any) -> Iterator[tuple[str, list[Item], list[Item]]]:
    if options.corpus is not None:
        said = json.loads((options.corpus / "phones.json").read_text())
        parts: tuple[list[Item], list[Item]] = ([], [])
        for name, spans in said.items():
            parts[held_out(name)].append(Item(load(options.corpus / name, RATE).samples, [tuple(s) for s in spans]))
        yield "phones, recorded", *parts
        return
    for task, kind in (("phones, synthesised", "sentence"), ("digits, synthesised", "digit")):
        yield task, *([_drawn(f"probe {part}/{i}", kind) for i in tqdm(range(count), desc=f"{kind}s", disable=None)]
                      for part, count in (("learn", options.learn), ("test", options.test)))


def _drawn(seed: str, kind: str) -> Item:
    said = draw(seed, kind)
    return Item(said.sound.samples, [(s.label, s.start, s.end) for s in (said.words if kind == "digit" else said.phones)])


def _probes(model: Any, task: str, learn: list[Item], test: list[Item], books: Sequence[int],
            first: bool) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """(what the probe reads, (right (M) bool, sound (M))) of every reading."""
    rows = _digits if task.startswith("digits") else _phones
    codes = [_codes(model, items) for items in (learn, test)]
    size = model.config.codebook_size
    for n in books:
        a, b = ([_one_hot(c[:n], size) for c in part] for part in codes)
        yield f"{n} book{'s' * (n > 1)}", probe(rows(a, learn), rows(b, test))
    if first:
        a, b = ([_teacher(model, item.samples) for item in items] for items in (learn, test))
        yield "teacher", probe(rows(a, learn), rows(b, test))
        train, asked = rows(a, learn), rows(b, test)
        yield "majority", (asked.y == train.y.mode().values, asked.sound)


def _codes(model: Any, items: list[Item]) -> list[Tensor]:
    """(n_q, T) of each sound"""
    return [tokenize(model, item.samples, sample_rate=RATE).codes[0] for item in tqdm(items, desc="codes", disable=None)]


def _one_hot(codes: Tensor, size: int) -> Tensor:
    """(n_q, T) -> (T, n_q * size) sparse in all but name"""
    return F.one_hot(codes, size).transpose(0, 1).flatten(1).half()


@torch.no_grad()
def _teacher(model: Any, samples: Tensor) -> Tensor:
    """(T, Ds), each dimension of the sound's mean 0 and deviation 1"""
    whole = F.pad(samples, (0, -len(samples) % 320))[None, None]
    x = model._extract_semantic_features(whole)[0]
    return ((x - x.mean(0)) / x.std(0).clamp_min(1e-3)).half()


def _phones(features: list[Tensor], items: list[Item]) -> Rows:
    """A row a frame whose middle lies in a phone: the features of it and of AROUND frames on either side."""
    x, y, sound = [], [], []
    for i, (f, item) in enumerate(zip(features, items)):
        label = torch.full((len(f),), -1)
        for name, start, end in item.spans:
            if name in PHONEMES:
                label[max(0, round(start / FRAME)):max(0, round(end / FRAME))] = PHONEMES.index(name)
        near = F.pad(f.T, (AROUND, AROUND)).T.unfold(0, 2 * AROUND + 1, 1).flatten(1)           # (T, D * 5)
        x.append(near[label >= 0])
        y.append(label[label >= 0])
        sound.append(torch.full((int((label >= 0).sum()),), i))
    return Rows(torch.cat(x), torch.cat(y), torch.cat(sound))


def _digits(features: list[Tensor], items: list[Item]) -> Rows:
    """A row a spoken digit: the mean features of each third of it."""
    x, y, sound = [], [], []
    for i, (f, item) in enumerate(zip(features, items)):
        for name, start, end in item.spans:
            cut = f[round(start / FRAME):round(end / FRAME)].float()
            x.append(torch.cat([part.mean(0) for part in cut.tensor_split(THIRDS)]).half())
            y.append(DIGITS.index(name))
            sound.append(i)
    return Rows(torch.stack(x), torch.tensor(y), torch.tensor(sound))


def probe(learn: Rows, test: Rows, decay: float = 1e-4, rounds: int = 15, batch: int = 512) -> tuple[Tensor, Tensor]:
    """Logistic regression by AdamW, the rate falling to 0. -> (right (M) bool, sound (M)) of `test`"""
    torch.manual_seed(0)
    classes = int(max(learn.y.max(), test.y.max())) + 1
    linear = torch.nn.Linear(learn.x.shape[1], classes)
    torch.nn.init.zeros_(linear.weight)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=3e-3, weight_decay=decay)
    steps = max(600, rounds * -(-len(learn.y) // batch))
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc="probe", leave=False, disable=None):
        rows = torch.randint(len(learn.y), (batch,))
        loss = F.cross_entropy(linear(learn.x[rows].float()), learn.y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fall.step()
    with torch.no_grad():
        said = torch.cat([linear(x.float()).argmax(1) for x in test.x.split(4096)])
    return said == test.y, test.sound


def _row(codec: str, task: str, reads: str, found: tuple[Tensor, Tensor], other: Tensor | None) -> dict[str, Any]:
    right, sound = found
    low, high = _interval(right.float(), sound)
    row = {"codec": codec, "task": task, "reads": reads, "sounds": len(sound.unique()), "n": len(right),
           "accuracy": float(right.float().mean()), "low": low, "high": high,
           "difference": None, "difference_low": None, "difference_high": None}
    if other is not None:
        gain = right.float() - other.float()
        row["difference"] = float(gain.mean())
        row["difference_low"], row["difference_high"] = _interval(gain, sound)
    return row


def _interval(values: Tensor, sound: Tensor, draws: int = 2000) -> tuple[float, float]:
    """95 % of the mean, sounds drawn anew."""
    count = int(sound.max()) + 1
    sums = torch.zeros(count).index_add_(0, sound, values).numpy()
    sizes = torch.bincount(sound, minlength=count).numpy()
    kept = np.flatnonzero(sizes)
    drawn = np.random.default_rng(0).choice(kept, (draws, len(kept)))
    low, high = np.percentile(sums[drawn].sum(1) / sizes[drawn].sum(1), (2.5, 97.5))
    return float(low), float(high)


def _picture(rows: list[dict[str, Any]], path: Path) -> None:
    from mmcompress.viz.figure import INK, new_figure, quiet, save
    from mmcompress.viz.pareto import COLORS

    tasks = list(dict.fromkeys(r["task"] for r in rows))
    figure = new_figure(5.2 * len(tasks), 3.8)
    for ax, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        here = sorted((r for r in rows if r["task"] == task), key=_order)
        names = [r["codec"] if r["codec"] == r["reads"] else f"{r['codec']}, {r['reads']}" for r in here]
        at = list(range(len(here)))
        ax.barh(at, [r["accuracy"] for r in here], height=0.65,
                color=[COLORS[1] if r["reads"] == "1 book" else "#b9c2cc" for r in here],
                xerr=[[r["accuracy"] - r["low"] for r in here], [r["high"] - r["accuracy"] for r in here]], ecolor=INK,
                capsize=3)
        ax.set_yticks(at, names)
        ax.set_xlim(0, 1)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        ax.set_title(f"{task} (n = {here[0]['n']:,})", fontsize=10.5, color=INK, loc="left")
        quiet(ax)
    figure.tight_layout()
    save(figure, path)


def _order(row: dict[str, Any]) -> tuple[bool, bool, float]:
    return row["reads"] != "majority", row["reads"] == "teacher", row["accuracy"]


if __name__ == "__main__":
    main()
