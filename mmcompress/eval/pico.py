"""How much of pico's accuracy survives a reducer, on freshly drawn scenes.

Every method sees the same questions and the same encoded pictures; only what happens after the projector differs.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters import Encoded, adapter_for
from ..calls import through_layers
from ..compat import base_of
from ..config import WrapConfig
from ..image import Uniform
from ..pico import prompt, scenes
from ..tokens import KeepAll
from ..wrap import Wrapped
from .stats import wilson

ALL_TOKENS = "all tokens"
CANVASES = ((168, 336), (336, 168), (336, 336), (168, 504), (504, 168))         # height x width in pixels
WEIGHTS = (1, 1, 5, 1, 1)
ODD = 0.1                                                                       # share of pictures of other sizes


@dataclass(frozen=True, eq=False)
class Question:
    """A picture or clip, something to ask about it and the one right answer."""

    image: Any                  # PIL; a clip's frames (T, H, W, 3) uint8
    kind: str                   # "cards" or "receipt"; of a clip "order", "count" or "change"
    question: str
    answer: str
    size: tuple[int, ...]       # height, width in pixels; of a clip frames, height, width


@dataclass(frozen=True)
class Row:
    """Accuracy of one method at one budget on one kind of question, with its 95 % interval."""

    method: str
    keep: float | int           # as asked; NaN if the reducer has no such field
    kind: str                   # "all", "cards", "receipt"; of clips "all", "change", "count", "order"
    n: int
    hits: int
    accuracy: float
    low: float
    high: float
    tokens_before: float        # of a picture or clip, mean over the questions, newlines included
    tokens_after: float         # mean over decoder layers too, where some read fewer than others
    positions: str = "closed"   # where the language model saw the kept tokens
    right: tuple[bool, ...] = field(default=(), repr=False)     # question by question, the same order for every method

    def to_dict(self) -> dict[str, Any]:
        """The row without its single outcomes, as CSV and JSON hold it."""
        return {k: None if v != v else v for k, v in vars(self).items() if k != "right"}


def questions(n: int, seed: str = "eval") -> list[Question]:
    """n questions about n scenes; question i depends on `seed` and i alone."""
    return [_question(random.Random(f"{seed}/{i}")) for i in range(n)]


def _question(rng: random.Random) -> Question:
    size = _odd_size(rng) if rng.random() < ODD else rng.choices(CANVASES, WEIGHTS)[0]
    kind, image, objects = scenes.scene(rng, *size)
    [(question, answer)] = scenes.questions(rng, kind, objects, 1)
    return Question(image, kind, question, answer, size)


def _odd_size(rng: random.Random) -> tuple[int, int]:
    """Any size of which the processor makes text neither much smaller nor much larger, as in pico's training."""
    from transformers.image_processing_utils import select_best_resolution

    while True:
        height, width = rng.randint(140, 540), rng.randint(140, 540)
        canvas = select_best_resolution((height, width), [list(c) for c in CANVASES])
        if 0.75 <= min(canvas[0] / height, canvas[1] / width) <= 1.5:
            return height, width


@torch.inference_mode()
def evaluate(model: Any, processor: Any, reducers: Mapping[str, Any], n: int, seed: str = "eval", batch: int = 16,
             progress: bool = True) -> list[Row]:
    """Exact match of whole answers under each reducer. -> one Row per reducer and kind, in the order of `reducers`.

    The answer is teacher-forced: one forward over prompt, answer and end of sequence, a hit if every one of the answer's
    tokens, the end included, is the arg max. Greedy generation gives exactly this answer if and only if that holds.

    reducers   label -> image or layer reducer, WrapConfig (to combine, to choose positions), or None for all tokens. What
               precedes an "@" in a label is the row's method. A reducer with a field `seed` gets another seed for every
               batch of questions.
    batch      questions encoded together; they show pictures of one size
    progress   a bar on stderr if that is a terminal
    """
    model = base_of(model)
    adapter = adapter_for(model)
    configs = {label: _config(r) for label, r in reducers.items()}
    layers = sorted({layer for config in configs.values() for layer in config.captures(adapter.depth)})
    return measure(model, configs, _batches(questions(_checked(n), seed), batch), n, partial(_inputs, processor),
                   lambda inputs: adapter.encode(inputs, layers), progress)


def _checked(n: int) -> int:
    if n < 1:
        raise ValueError(f"n={n}: ask at least one question")
    return n


@torch.inference_mode()
def measure(model: Any, configs: Mapping[str, WrapConfig], batches: Iterable[Sequence[Question]], n: int,
            inputs_of: Callable[[Sequence[Question]], Any], encode: Callable[[Any], Any], progress: bool) -> list[Row]:
    """Exact match of whole answers, as `evaluate` says. -> one Row per configuration and kind

    batches     n questions in all; those of a batch show pictures or clips of one size
    inputs_of   a batch of questions -> what the processor makes of them, with labels (B, L)
    encode      such inputs -> what `Wrapped.start` takes as `encoded`; called once a batch, for all configurations
    """
    from tqdm import tqdm

    counts = {label: _Counts() for label in configs}
    with tqdm(total=n, unit="question", disable=None if progress else True) as bar, \
            Wrapped(model, WrapConfig(image=KeepAll())) as handle:
        for number, some in enumerate(batches):
            inputs = inputs_of(some).to(model.device, model.dtype)
            encoded = encode(inputs)
            for label, config in configs.items():
                handle.configure(_reseeded(config, number))
                counts[label].add(some, *_hits(handle, inputs, encoded))
            bar.update(len(some))
    return [row for label, config in configs.items()
            for row in counts[label].rows(label.partition("@")[0], _keep_of(config), config.positions)]


def _reseeded(config: WrapConfig, number: int) -> WrapConfig:
    """The configuration for one batch: a reducer with a field `seed` gets the batch's number."""
    slots = {slot: getattr(config, slot) for slot in ("image", "video")}
    return replace(config, **{slot: replace(r, seed=number) for slot, r in slots.items() if hasattr(r, "seed")})


def _config(reducer: Any) -> WrapConfig:
    if isinstance(reducer, WrapConfig):
        return reducer
    if reducer is not None and callable(getattr(reducer, "steps", None)):
        return WrapConfig(layers=(reducer,))
    return WrapConfig(image=Uniform(keep=1.0) if reducer is None else reducer)


def _keep_of(config: WrapConfig) -> float | int:
    """The budget in a row's column `keep`: the first reducer's that has one."""
    return next((r.keep for r in (config.image, config.video, *config.layers) if hasattr(r, "keep")), math.nan)


def _batches(asked: Sequence[Question], batch: int) -> Iterator[list[Question]]:
    """Questions about pictures of one size, at most `batch` at a time."""
    for _, group in groupby(sorted(asked, key=lambda q: q.size), key=lambda q: q.size):
        same = list(group)
        yield from (same[i:i + batch] for i in range(0, len(same), batch))


def _inputs(processor: Any, some: Sequence[Question], videos: bool = False) -> Any:
    """What the processor makes of prompts with their answers, padded on the right; labels (B, L) are -100 outside answers.

    videos   the questions are about clips
    """
    answers = [f" {q.answer}</s>" for q in some]
    text = [prompt(q.question, images=not videos, videos=videos) + a for q, a in zip(some, answers)]
    shown = [q.image for q in some]
    inputs = processor(text=text, padding=True, padding_side="right", return_tensors="pt",
                       **({"videos": shown} if videos else {"images": shown}))
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    for row, (answer, mask) in enumerate(zip(answers, inputs["attention_mask"])):
        end = int(mask.sum())
        wanted = torch.tensor(processor.tokenizer(answer, add_special_tokens=False)["input_ids"])
        if not torch.equal(ids[row, end - len(wanted):end], wanted):
            raise ValueError(f"the tokenizer joins prompt and answer {answer!r}; this evaluation is for pico's")
        labels[row, end - len(wanted):end] = wanted
    inputs["labels"] = labels
    return inputs


def _hits(handle: Wrapped, inputs: Any, encoded: Mapping[str, Encoded] | Encoded) -> tuple[Tensor, list[int], list[float]]:
    """Which answers are right (B,) bool on the host, and tokens before and after (mean over layers) per picture."""
    run = handle.start(inputs, side="right", encoded=encoded)
    labels = run.inputs.pop("labels")
    first = int((labels != -100).any(0).nonzero()[0, 0])                    # logits of the column before it and later
    call = {**run.inputs, "logits_to_keep": labels.shape[1] - first + 1, "use_cache": False}
    logits = through_layers(handle, call, run).logits
    wanted = labels[:, first:]
    right = (logits[:, :-1].argmax(-1) == wanted) | (wanted == -100)        # (B, columns of answers)
    depth = handle.adapter.depth
    after = [sum(i.at(layer).after for layer in range(depth)) / depth for i in run.items]
    return right.all(1).cpu(), [i.before for i in run.items], after


class _Counts:
    """Hits and tokens of one method, question by question."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool, int, float]] = []

    def add(self, some: Sequence[Question], right: Tensor, before: list[int], after: list[float]) -> None:
        self.seen += zip((q.kind for q in some), right.tolist(), before, after)

    def rows(self, method: str, keep: float | int, positions: Any) -> list[Row]:
        """One row a kind; a kind that never came up has none."""
        out = []
        for kind in ("all", *sorted({s[0] for s in self.seen})):
            seen = [s for s in self.seen if kind in ("all", s[0])]
            n, hits = len(seen), sum(s[1] for s in seen)
            low, high = wilson(hits, n)
            before, after = sum(s[2] for s in seen) / n, sum(s[3] for s in seen) / n
            out.append(Row(method, keep, kind, n, hits, hits / n, low, high, before, after, positions,
                           tuple(s[1] for s in seen)))
        return out


def write_csv(rows: Sequence[Row], path: str | Path, device: str, seed: str = "eval") -> None:
    """Rows as CSV, each with what it was measured on."""
    where = {"seed": seed, "device": device, **{name: version(name) for name in ("torch", "transformers", "mmcompress")}}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        out = csv.DictWriter(file, [f.name for f in fields(Row) if f.name != "right"] + list(where))
        out.writeheader()
        out.writerows({**row.to_dict(), **where} for row in rows)
