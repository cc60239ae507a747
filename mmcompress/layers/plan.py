"""What a call's layer reducers will do, planned on the host from the prompt's structure before anything runs.

Counts come from layouts alone, so the length of every row at every layer, its padding and the places of its text are
known in advance; only which of a picture's tokens stay is decided by data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..layout import SequenceLayout
from ..prompt import close_up
from .base import Step, works_on


@dataclass(frozen=True)
class Span:
    """An item's tokens in a row of the prompt that enters the language model: `layout.tokens` columns from `start`."""

    row: int
    start: int
    layout: Any
    modality: str = "image"


@dataclass(frozen=True, eq=False)
class Group:
    """Pictures of equal layout that one stage reduces together."""

    layout: Any
    count: int                  # k
    items: list[int]            # numbers of the pictures, in placeholder order
    row: Tensor                 # (n, 1) int64
    before: Tensor              # (n, N) int64: columns of their tokens among those that reach the layer
    after: Tensor               # (n, k) int64: columns of what stays

    def repeat(self, times: int) -> Group:
        """Rows repeated `times` each, as beams are."""
        copy = torch.arange(times, device=self.row.device).repeat(len(self.row))[:, None]
        row = self.row.repeat_interleave(times, 0) * times + copy
        return replace(self, items=[i for i in self.items for _ in range(times)], row=row,
                       before=self.before.repeat_interleave(times, 0), after=self.after.repeat_interleave(times, 0))


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of one call.

    `column` (B, L') int64: for each column from this layer on, the column it has among those that reach the layer, -1 padding;
    pictures' columns are those of their first tokens until data decides. `queries` (B, Q) int64: the querying tokens'
    columns among those that reach the layer, -1 padding. `prompt` (B, L) bool: which columns that reach the layer are tokens of
    the prompt and not of its answers, whose attention received is counted.
    """

    step: Step
    column: Tensor
    full: bool                  # no column is padding
    queries: Tensor
    prompt: Tensor
    groups: list[Group]

    @property
    def columns(self) -> int:
        return self.column.shape[1]

    def repeat(self, times: int) -> Stage:
        return replace(self, column=self.column.repeat_interleave(times, 0), queries=self.queries.repeat_interleave(times, 0),
                       prompt=self.prompt.repeat_interleave(times, 0), groups=[g.repeat(times) for g in self.groups])

    def extend(self, before: int, columns: int) -> Stage:
        """With `columns` more text columns at the right end of prompts that were `before` columns long when they reached it."""
        more = torch.arange(before, before + columns, device=self.column.device).expand(len(self.column), -1)
        return replace(self, column=torch.cat([self.column, more], 1),
                       prompt=torch.nn.functional.pad(self.prompt, (0, columns), value=False))


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """All stages of one call that drop anything, by layer. `final` (B, L') int64 on the host: which column of the prompt
    that enters the language model each of its last hidden states has, -1 padding."""

    rows: int
    columns: int                # of the prompt that enters the language model
    stages: list[Stage]
    final: Tensor

    def repeat(self, times: int) -> LayerPlan:
        if times == 1:
            return self
        return LayerPlan(self.rows * times, self.columns, [s.repeat(times) for s in self.stages],
                         self.final.repeat_interleave(times, 0))

    def extend(self, columns: int) -> LayerPlan:
        """The plan of the same prompts with `columns` generated tokens behind them, where no cache holds the prompts."""
        if columns == 0:
            return self
        stages, before = [], self.columns
        for stage in self.stages:
            stages.append(stage.extend(before, columns))
            before = stage.columns
        more = torch.arange(self.columns, self.columns + columns).expand(self.rows, -1)
        return LayerPlan(self.rows, self.columns + columns, stages, torch.cat([self.final, more], 1))


def plan_layers(steps: Sequence[Step], valid: Tensor, spans: Sequence[Span], side: Literal["left", "right"],
                labels: Tensor | None, device: torch.device) -> LayerPlan | None:
    """Plan the steps for prompts whose columns are real where `valid` (B, L) bool; None if nothing goes.

    labels  (B, L) of the same prompts on the host, -100 outside answers: the querying tokens are then those before
            each answer, and attention received is that of tokens outside answers; None: the last token of each prompt, and
            that of all of them
    """
    queries, prompt = _queries(valid, labels), _outside_answers(valid, labels)
    live = torch.arange(valid.shape[1]).expand(len(valid), -1).masked_fill(~valid, -1)      # (B, L): prompt column of each
    starts, layouts = [s.start for s in spans], [s.layout for s in spans]
    rows = [s.row for s in spans]
    stages: list[Stage] = []
    for step in steps:
        counts = [step.reducer.count(layout) if works_on(step.reducer, span.modality) else layout.tokens
                  for span, layout in zip(spans, layouts)]
        if all(k == layout.tokens for k, layout in zip(counts, layouts)):
            continue
        stays = live >= 0
        for row, start, layout, k in zip(rows, starts, layouts, counts):
            stays[row, start + k:start + layout.tokens] = False
        column = close_up(stays, side)                                                      # (B, L')
        place = _inverse(column, live.shape[1])                                             # (B, L): where each column goes
        after = [int(place[row, start]) for row, start in zip(rows, starts)]
        groups = _groups(layouts, counts, rows, starts, after, device)
        stages.append(Stage(step, column.to(device), bool((column >= 0).all()), queries.to(device), prompt.to(device),
                            groups))
        queries = torch.where(queries < 0, -1, place.gather(1, queries.clamp_min(0)))
        live = live.gather(1, column.clamp_min(0)).masked_fill(column < 0, -1)
        prompt = prompt.gather(1, column.clamp_min(0)) & (column >= 0)
        starts = after
        layouts = [layout if k == layout.tokens else SequenceLayout(k, layout.entered) for layout, k in zip(layouts, counts)]
    return LayerPlan(len(valid), valid.shape[1], stages, live) if stages else None


def _queries(valid: Tensor, labels: Tensor | None) -> Tensor:
    """Columns of each row's querying tokens, padded with -1. -> (B, Q) int64, at least one a row that has any token."""
    columns = torch.arange(valid.shape[1])
    last = torch.where(valid, columns, -1).max(1).values                                    # (B,)
    if labels is None:
        return last[:, None]
    answer = (labels != -100) & valid
    before = torch.zeros_like(answer)
    before[:, :-1] = answer[:, 1:] & ~answer[:, :-1] & valid[:, :-1]                        # the token before an answer begins
    none = ~before.any(1)
    before[none.nonzero()[:, 0], last[none].clamp_min(0)] = True
    return close_up(before, "right")


def _outside_answers(valid: Tensor, labels: Tensor | None) -> Tensor:
    """Which columns are a prompt's tokens and none of its answers', or all its tokens where nothing else is. (B, L) bool"""
    if labels is None:
        return valid
    outside = valid & (labels == -100)
    return torch.where(outside.any(1, keepdim=True), outside, valid)


def _inverse(column: Tensor, length: int) -> Tensor:
    """Where each of `length` columns went. column (B, L') -> (B, length) int64, -1 where it is gone."""
    place = torch.full((len(column), length + 1), -1, dtype=torch.int64)
    to = torch.where(column < 0, length, column)
    return place.scatter(1, to, torch.arange(column.shape[1]).expand_as(column))[:, :length]


def _groups(layouts: Sequence[Any], counts: Sequence[int], rows: Sequence[int], before: Sequence[int], after: Sequence[int],
            device: torch.device) -> list[Group]:
    """Pictures that lose tokens, those of equal layout together."""
    of: dict[Any, list[int]] = {}
    for i, (layout, k) in enumerate(zip(layouts, counts)):
        if k < layout.tokens:
            of.setdefault(layout, []).append(i)
    out = []
    for layout, items in of.items():
        pick = lambda values: torch.tensor([values[i] for i in items])[:, None]  # noqa: B023, E731
        k = counts[items[0]]
        out.append(Group(layout, k, items, pick(rows).to(device), (pick(before) + torch.arange(layout.tokens)).to(device),
                         (pick(after) + torch.arange(k)).to(device)))
    return out
