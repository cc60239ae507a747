"""The middle of the way: every item's features through its reducer, those of equal layout and budget together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .adapters import Adapter, Encoded
from .budget import keep_count
from .config import WrapConfig
from .ops.redundancy import distinct_tokens
from .ops.segments import divide
from .prompt import NOUNS, Found
from .tokens import Reduction, Tokens

Reduced = tuple[Tensor, Tensor, Tensor, "Tensor | None"]        # one item's tokens, index, source, mass
Question = tuple[Tensor, Tensor]                                # (items, Q, D) and (items, Q) bool


def check_features(encoded: Mapping[str, Encoded], found: Sequence[Found]) -> list[Tensor]:
    """The features (N_i, D) of every item; raises where they do not fit its layout."""
    out = []
    at = dict.fromkeys(encoded, 0)
    for item in found:
        number = at[item.modality]
        features = encoded[item.modality].features[number]
        at[item.modality] += 1
        if len(features) != item.layout.tokens and not encoded[item.modality].reductions:
            raise ValueError(f"{NOUNS[item.modality][0]} {number} has {len(features)} features where its layout has "
                             f"{item.layout.tokens} tokens; pixels and sizes must come from one processor call")
        out.append(features)
    return out


def reducers_of(config: WrapConfig, found: Sequence[Found], features: Sequence[Tensor]) -> list[Any]:
    """The reducer of each item; with a joint budget each keeps its share of it. One host synchronisation then."""
    reducers = [config.reducers[item.modality] for item in found]
    if config.budget is None or not found:
        return reducers
    worth = torch.stack([distinct_tokens(f[None])[0] for f in features]).cpu()
    out = list(reducers)
    for row in sorted({item.row for item in found}):
        here = [i for i, item in enumerate(found) if item.row == row]
        tokens = [found[i].layout.tokens for i in here]
        fixed = [found[i].modality not in config.before for i in here]                  # paid whole
        least = [n if whole else replace(out[i], keep=config.floor).count(found[i].layout)
                 for i, n, whole in zip(here, tokens, fixed)]
        total = keep_count(sum(tokens), config.budget)
        if (short := sum(least) - total) > 0:
            raise ValueError(f"budget={config.budget} gives prompt {row} {total} tokens, {short} fewer than its items cost at "
                             f"least (floor={config.floor} of each that has a reducer, all of the others); raise budget or "
                             f"lower floor")
        room = torch.tensor([[n - m for n, m in zip(tokens, least)]])
        more = divide(worth[here][None], room, total - sum(least), int(room.max()) or 1)[0].tolist()
        for i, m, extra, whole in zip(here, least, more, fixed):
            if not whole:
                out[i] = replace(out[i], keep=m + extra)
    return out


def reduce_items(adapter: Adapter, encoded: Mapping[str, Encoded], found: Sequence[Found], features: Sequence[Tensor],
                 reducers: Sequence[Any], question: Question | None) -> list[Reduced]:
    """Reduce items of one modality, layout and count together."""
    out: list[Reduced | None] = [None] * len(found)
    groups: dict[Any, list[int]] = {}
    for i, (item, reducer) in enumerate(zip(found, reducers)):
        groups.setdefault((item.modality, item.layout, reducer.count(item.layout)), []).append(i)
    for (modality, layout, k), items in groups.items():
        reducer, held = reducers[items[0]], encoded[modality]
        same = [i for i, item in enumerate(found) if item.modality == modality]
        numbers = [same.index(i) for i in items]
        if held.reductions:                                     # inside the encoder already
            for i, number in zip(items, numbers):
                out[i] = _item(held.reductions[number], 0)
            continue
        asked, mask = (None, None) if question is None else (q[items] for q in question)
        x = Tokens(features=torch.stack([features[i] for i in items]), layout=layout, question=asked, question_mask=mask,
                   vision=held.state([found[i].layout for i in same], numbers))
        if getattr(reducer, "reads_spectrogram", False) and k < layout.tokens:
            x = replace(x, mel=held.spectrogram(numbers))
        if getattr(reducer, "reads_first_layer", False) and k < layout.tokens and not adapter.seq2seq:
            x = replace(x, weights=adapter.first_layer())
        reduction = reducer(x)
        _check(reduction, reducer, x)
        for j, i in enumerate(items):
            out[i] = _item(reduction, j)
    return [r for r in out if r is not None]


def _check(reduction: Reduction, reducer: Any, x: Tokens) -> None:
    want = (len(x.features), reducer.count(x.layout))
    if tuple(reduction.index.shape) != want or tuple(reduction.tokens.shape[:2]) != want:
        raise ValueError(f"{type(reducer).__name__} returned {tuple(reduction.tokens.shape[:2])} tokens where count() "
                         f"promised {want}; fix the reducer")


def _item(reduction: Reduction, j: int) -> Reduced:
    tokens, index, source = reduction.tokens[j], reduction.index[j], reduction.source[j]
    mass = None if reduction.mass is None else reduction.mass[j]
    if reduction.valid is not None:                             # the count depends on the data: one host synchronisation
        valid = reduction.valid[j]
        tokens, index, mass = tokens[valid], index[valid], None if mass is None else mass[valid]
    return tokens, index, source, mass
