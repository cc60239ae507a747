"""Evaluation of a run: exact answers of the uncompressed model on held-out scenes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..eval.stats import wilson
from .data import WORLDS, Batches, question_kind
from .model import Learner


@torch.no_grad()
def ask(learner: Learner, batches: Batches, numbers: Iterable[int]) -> list[tuple[str, bool]]:
    """(kind of question, answered exactly) of every prompt of some batches.

    Teacher-forced: a hit if every token of the answer, the end included, is the arg max; greedy generation gives
    exactly this answer if and only if that holds. The model is left in training mode.
    """
    model, recipe = learner.model, learner.recipe
    device, world = model.device, WORLDS[recipe.data.world]
    out: list[tuple[str, bool]] = []
    model.eval()
    try:
        for number in numbers:
            batch = batches[number].to(device)
            inputs = learner.inputs(batch)
            labels = inputs.pop("labels")
            first = int((labels != -100).any(0).nonzero()[0, 0])        # logits of the column before it and later
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                logits = model(**inputs, logits_to_keep=labels.shape[1] - first + 1, use_cache=False).logits
            wanted = labels[:, first:]
            right = ((logits[:, :-1].argmax(-1) == wanted) | (wanted == -100)).all(1).tolist()
            out += [(question_kind(q, world), hit) for q, hit in zip(batch.questions, right)]
    finally:
        model.train()
    return out


def summarize(outcomes: list[tuple[str, bool]]) -> list[dict[str, Any]]:
    """Hits, n and the 95 % interval of all questions, then of each kind."""
    rows = []
    for kind in ["all", *sorted({k for k, _ in outcomes})]:
        hits = [hit for k, hit in outcomes if kind in ("all", k)]
        low, high = wilson(sum(hits), len(hits))
        rows.append({"kind": kind, "n": len(hits), "hits": sum(hits), "accuracy": sum(hits) / len(hits),
                     "low": low, "high": high})
    return rows
