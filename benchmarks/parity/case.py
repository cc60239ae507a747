"""A case of layer_parity.py, and the sizes that both sides share. Needs torch alone: the worker's interpreter is old."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

LAYERS, WIDTH, VOCAB, TOKENS = 12, 128, 200, 576
IMAGE, IMAGE_THERE = VOCAB - 1, -200
STEPS = 8                                                           # of greedy decoding
TIED, CLOSE = 1e-5, 1e-4

Call = dict[str, Any]       # what goes to the worker: tensors, numbers and strings
Answer = dict[str, Any]     # what either side makes of it
Known = Callable[[Answer, Answer, dict[str, Tensor]], str]


@dataclass(frozen=True)
class Case:
    """A batch of prompts and what is asked of both sides.

    rows      a random number of tokens -> for each prompt the lengths of its runs of text; a picture stands between two
    stages    where something is dropped: (layer, share kept), or (layer, stride) of LLaVolta
    answers   for each prompt the slices of its columns that are answers; empty: no labels
    twin      the first prompt comes a second time, but for its last token
    exact     LLaVolta's positions averaged in float32
    once      nothing in it is random: one seed is enough
    compare   prompts that must agree
    cause     of a known difference; then `fails` is in the error that theirs raises, or `known` (theirs, ours, inputs)
              returns evidence that it is this difference, "" if it is not
    """

    method: str
    name: str
    rows: Callable[[Callable[[], int]], list[list[int]]]
    attention: str = "sdpa"
    do: str = "forward"                     # or "generate", or "train", or "stages" (of LLaVolta's training)
    cache: bool = True
    heads: int = 4                          # of keys and values
    stages: tuple[tuple[int, float], ...] = ()
    answers: tuple[tuple[slice, ...], ...] = ()
    twin: bool = False
    exact: bool = False
    once: bool = False
    compare: tuple[int, ...] = (0, 1)
    cause: str = ""
    fails: str = ""
    known: Known | None = None

    @property
    def key(self) -> str:
        return f"{self.method}: {self.name}"


ANSWERS = (slice(-10, -6), slice(-3, None))                         # of a prompt in training


def largest(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())
