"""The way of the data: encode -> reduce -> pack -> a shorter prompt. One direction, no module touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from .adapters import Adapter, Encoded
from .config import Positions, WrapConfig
from .layers.base import Step
from .layers.plan import LayerPlan, Span, plan_layers
from .layers.run import LayerItem, State, take
from .layout import ImageLayout, SequenceLayout
from .prompt import PromptMap, as_mask, find_placeholders, padding_side, plan
from .report import Stopwatch
from .tokens import KeepAll, Reduction, Tokens


@dataclass(frozen=True, eq=False)
class Item:
    """One reduced picture: where it stood and which of its tokens went where. Holds no features."""

    modality: str
    row: int                    # its prompt in the batch
    layout: Any
    index: Tensor               # (K,) int64
    source: Tensor              # (N,) int64
    mass: Tensor | None         # (K,)
    layers: list[LayerItem] = field(default_factory=list)       # what was left of it from some decoder layers on

    @property
    def before(self) -> int:
        return self.layout.tokens

    @property
    def after(self) -> int:
        return len(self.index)

    def at(self, layer: int) -> Item | LayerItem:
        """What a decoder layer, counted from 0, saw of it."""
        seen = [x for x in self.layers if x.layer <= layer]
        return seen[-1] if seen else self


@dataclass(eq=False)
class Run:
    """One call's inputs, reduced: what the stock model takes, and the record of what was done."""

    rows: int                               # prompts
    columns: int                            # length of the caller's prompts
    inputs: dict[str, Any] = field(default_factory=dict)
    prompt: PromptMap | None = None         # None: no column was dropped before the language model
    layers: LayerPlan | None = None         # None: none is dropped inside it
    vision: State | None = None             # captured vision layers, for reducers inside the language model
    items: list[Item] = field(default_factory=list)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def columns_by_layer(self, depth: int) -> list[int]:
        """Columns that each of `depth` decoder layers sees."""
        entering = self.columns if self.prompt is None else self.prompt.reduced
        stages = [] if self.layers is None else self.layers.stages
        return [([entering] + [s.columns for s in stages if s.step.layer <= layer])[-1] for layer in range(depth)]

    def tokens_by_layer(self, depth: int) -> list[int]:
        """Tokens of all pictures that each of `depth` decoder layers sees."""
        now = [item.after for item in self.items]
        out = [sum(now)] * depth
        for stage in [] if self.layers is None else self.layers.stages:
            for group in stage.groups:
                for i in group.items:
                    now[i] = group.count
            out[stage.step.layer:] = [sum(now)] * (depth - stage.step.layer)
        return out

    def final(self, input_ids: Tensor) -> PromptMap | None:
        """How the caller's columns lie in the logits; None if all of them are there."""
        if self.layers is None:
            return self.prompt
        column = self.layers.final
        return PromptMap(input_ids, column if self.prompt is None else take(self.prompt.column, column))


def reduce_inputs(adapter: Adapter, inputs: Mapping[str, Any], config: WrapConfig,
                  side: Literal["left", "right"] | None = None, encoded: Encoded | None = None) -> Run:
    """Encode and reduce the pictures of a call, and shorten its prompt to match.

    inputs   what the processor returned, with labels or position_ids (B, L) if wanted
    side     where prompts of unequal length are padded; None: as the caller's mask is
    encoded  what `adapter.encode` made of these inputs, with the layers the reducer captures; None: encode them now
    """
    input_ids = inputs.get("input_ids")
    if input_ids is None:
        raise ValueError("input_ids are needed to find the pictures' placeholders; inputs_embeds alone do not tell them")
    mask = as_mask(inputs)
    layouts = adapter.layouts(inputs)
    reducer = config.image or KeepAll()
    steps = config.steps(adapter.depth)
    host_ids, host_mask = input_ids.cpu(), None if mask is None else mask.cpu()     # before the tower is launched
    spans = find_placeholders(host_ids, adapter.image_token_id, [layout.tokens for layout in layouts])
    run = Run(rows=len(input_ids), columns=input_ids.shape[1], stopwatch=Stopwatch(input_ids.device))

    def shorten(counts: list[int]) -> None:
        on = side or padding_side(host_mask)
        run.prompt = plan(input_ids, host_ids, host_mask, spans, counts, on)
        if steps:
            run.layers = _plan_layers(steps, run.prompt, host_ids, host_mask, spans, layouts, counts, on, inputs.get("labels"),
                                      input_ids.device)

    counts_need_data = getattr(reducer, "count_is_bound", False)
    question = None
    with run.stopwatch.stage("plan"):
        if not counts_need_data:                                # everything the host has to do is done before the tower runs
            shorten([reducer.count(layout) for layout in layouts])
        if getattr(reducer, "reads_question", False):
            question = _questions(adapter, host_ids, host_mask, spans)
    with run.stopwatch.stage("encode"):
        if encoded is None:
            encoded = adapter.encode(inputs, config.captures(adapter.depth))
        if any(getattr(step.reducer, "captures", ()) for step in steps):
            run.vision = partial(encoded.state, layouts)
    with run.stopwatch.stage("reduce"):
        reduced = _reduce(adapter, encoded, layouts, reducer, question)
    with run.stopwatch.stage("pack"):
        run.items = [Item("image", row, layout, index, source, mass)
                     for (row, _), layout, (_, index, source, mass) in zip(spans, layouts, reduced)]
        if counts_need_data:
            shorten([item.after for item in run.items])
        run.inputs = {k: v for k, v in inputs.items() if k not in adapter.encoder_inputs}
        run.inputs.update(_shortened(run, inputs, mask, spans, config.positions))
        if inputs.get("labels") is not None and (final := run.final(input_ids)) is not None:
            run.inputs["labels"] = final.select(inputs["labels"], -100)
        rows: dict[int, list[Tensor]] = {}
        for (row, _), (tokens, *_rest) in zip(spans, reduced):
            rows.setdefault(row, []).append(tokens)
        # one tensor a prompt: transformers then repeats the right features for beams and num_return_sequences
        run.inputs["mm_encoder_outputs"] = adapter.outputs([torch.cat(t) if len(t) > 1 else t[0] for t in rows.values()])
    return run


def _plan_layers(steps: Sequence[Step], prompt: PromptMap | None, ids: Tensor, mask: Tensor | None,
                 spans: Sequence[tuple[int, Tensor]], layouts: Sequence[Any], counts: Sequence[int],
                 side: Literal["left", "right"], labels: Tensor | None, device: torch.device) -> LayerPlan | None:
    """Plan the layer reducers on the prompt that enters the language model."""
    labels = None if labels is None else labels.cpu()
    if prompt is None:
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        starts = [int(columns[0]) for _, columns in spans]
    else:
        valid = prompt.column >= 0
        labels = None if labels is None else prompt.select(labels, -100)
        starts = [int((prompt.column[row] == columns[0]).nonzero()[0]) for row, columns in spans]
    entering = [layout if k == layout.tokens else SequenceLayout(k, k) for layout, k in zip(layouts, counts)]
    found = [Span(row, start, layout) for (row, _), start, layout in zip(spans, starts, entering)]
    return plan_layers(steps, valid, found, side, labels, device)


Reduced = tuple[Tensor, Tensor, Tensor, "Tensor | None"]        # one picture's tokens, index, source, mass


def _reduce(adapter: Adapter, encoded: Any, layouts: Sequence[ImageLayout], reducer: Any,
            question: tuple[Tensor, Tensor] | None) -> list[Reduced]:
    """Reduce pictures of equal layout together."""
    groups: dict[ImageLayout, list[int]] = {}
    for i, (features, layout) in enumerate(zip(encoded.features, layouts)):
        if len(features) != layout.tokens:
            raise ValueError(f"picture {i} has {len(features)} features where its layout has {layout.tokens} tokens; "
                             f"pixel_values and image_sizes must come from one processor call")
        groups.setdefault(layout, []).append(i)
    out: list[Reduced | None] = [None] * len(layouts)
    for layout, items in groups.items():
        features = torch.stack([encoded.features[i] for i in items])
        asked = (None, None) if question is None else tuple(q[items] for q in question)
        x = Tokens(features=features, layout=layout, vision=encoded.state(layouts, items),
                   question=asked[0], question_mask=asked[1])
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


def _shortened(run: Run, inputs: Mapping[str, Any], mask: Tensor | None, spans: Sequence[tuple[int, Tensor]],
               positions: Positions | None) -> dict[str, Any]:
    """input_ids, attention_mask, labels and position_ids of the shorter prompt; nothing where no column was dropped."""
    if run.prompt is None:
        return {}
    ids, prompt = inputs["input_ids"], run.prompt
    out: dict[str, Any] = {"input_ids": prompt.select(ids, 0)}
    if mask is not None or prompt.is_padded or positions == "original":
        full = torch.ones_like(ids) if mask is None else mask
        out["attention_mask"] = prompt.select(full, 0)
    if inputs.get("token_type_ids") is not None:
        out["token_type_ids"] = prompt.select(inputs["token_type_ids"], 0)
    given = inputs.get("position_ids")
    if given is not None or positions == "original":
        if given is None:
            given = (torch.ones_like(ids) if mask is None else mask).long().cumsum(1).sub(1).clamp_min(0)
        out["position_ids"] = _original_positions(prompt, given.expand_as(ids), spans, run.items)
    return out


def _original_positions(prompt: PromptMap, position_ids: Tensor, spans: Sequence[tuple[int, Tensor]],
                        items: Sequence[Item]) -> Tensor:
    """Each kept token's position in the full prompt. -> (B, L')"""
    out = prompt.select(position_ids, 0)
    for (row, columns), item in zip(spans, items):
        first = int((prompt.column[row] == columns[0]).nonzero()[0])            # a picture's kept placeholders stand together
        out[row, first:first + item.after] = position_ids[row, columns.to(out.device)[item.index]]
    return out


def _questions(adapter: Adapter, ids: Tensor, mask: Tensor | None, spans: Sequence[tuple[int, Tensor]]
               ) -> tuple[Tensor, Tensor]:
    """Input embeddings of the text that follows each picture in its prompt. -> (items, Q, D), (items, Q) bool"""
    texts = []
    for row, columns in spans:
        after = ids[row, int(columns[-1]) + 1:]
        real = after != adapter.image_token_id
        if mask is not None:
            real &= mask[row, int(columns[-1]) + 1:].bool()
        texts.append(after[real])
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True) if texts else ids[:0]
    lengths = torch.tensor([len(t) for t in texts])
    device = adapter.model.get_input_embeddings().weight.device
    embedded = adapter.model.get_input_embeddings()(padded.to(device))
    return embedded.detach(), (torch.arange(padded.shape[1]) < lengths[:, None]).to(device)
