"""The way of the data: encode -> reduce -> pack -> a shorter prompt. One direction, no module touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from .adapters import Adapter, Captures, Encoded
from .config import Positions, WrapConfig
from .errors import UnsupportedModelError
from .layers.base import Step
from .layers.plan import LayerPlan, Span, plan_layers
from .layers.run import LayerItem, State, take
from .layout import AudioLayout, SequenceLayout
from .prompt import Found, PromptMap, as_mask, padding_side, plan
from .reducing import check_features, reduce_items, reducers_of
from .report import Stopwatch
from .tokens import ImageReducer


@dataclass(frozen=True, eq=False)
class Item:
    """One reduced picture, clip or recording: where it stood and which of its tokens went where. Holds no features."""

    modality: str               # "image", "video" or "audio"
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

    @property
    def spans(self) -> Tensor:
        """Of a recording: when each kept token's sound begins and ends, merged tokens' included. (K, 2) float32 seconds

        On the host. Tokens that a reducer dropped belong to no span; those it merged or pooled to the one they went into.
        """
        if not isinstance(self.layout, AudioLayout):
            raise ValueError(f"an item of modality {self.modality!r} has no time spans; recordings have")
        source, places = self.source.cpu(), self.layout.places()
        at = torch.where(source < 0, self.after, source)
        fill = lambda value, x, how: torch.full((self.after + 1,), value).scatter_reduce(0, at, x, how)[:-1]  # noqa: E731
        return torch.stack([fill(torch.inf, places.start, "amin"), fill(-torch.inf, places.end, "amax")], 1)

    def at(self, layer: int) -> Item | LayerItem:
        """What a decoder layer, counted from 0, saw of it."""
        seen = [x for x in self.layers if x.layer <= layer]
        return seen[-1] if seen else self


class Items(list[Item]):
    """The items of a call, in order: pictures, then clips, then recordings."""

    @property
    def spans(self) -> list[Tensor]:
        """When each kept token of each recording sounds: (K, 2) float32 seconds per recording, see `Item.spans`."""
        return [item.spans for item in self if item.modality == "audio"]


@dataclass(eq=False)
class Run:
    """One call's inputs, reduced: what the stock model takes, and the record of what was done."""

    rows: int                               # prompts
    columns: int                            # length of the caller's prompts
    inputs: dict[str, Any] = field(default_factory=dict)        # `mm_encoder_outputs` as generate takes them
    prompt: PromptMap | None = None         # None: no column was dropped before the language model
    layers: LayerPlan | None = None         # None: none is dropped inside it
    vision: State | None = None             # captured vision layers, for reducers inside the language model
    items: Items = field(default_factory=Items)
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
                  side: Literal["left", "right"] | None = None, encoded: Mapping[str, Encoded] | Encoded | None = None) -> Run:
    """Encode and reduce the pictures, clips and recordings of a call, and shorten its prompt to match.

    inputs   what the processor returned, with labels or position_ids (B, L) if wanted
    side     where prompts of unequal length are padded; None: as the caller's mask is
    encoded  what `adapter.encode_all` made of these inputs (or `encode` of pictures alone), with the layers the reducers
             read; None: encode them now
    """
    input_ids = inputs.get("input_ids")
    if input_ids is None:
        raise ValueError("input_ids are needed to find the pictures' placeholders; inputs_embeds alone do not tell them")
    mask = as_mask(inputs)
    reducers = config.reducers
    steps = config.steps(adapter.depth)
    host_ids, host_mask = input_ids.cpu(), None if mask is None else mask.cpu()     # before the tower is launched
    found = adapter.find(inputs, host_ids)
    run = Run(rows=len(input_ids), columns=input_ids.shape[1], stopwatch=Stopwatch(input_ids.device))

    def shorten(kept: list[int | Tensor]) -> None:
        on = side or padding_side(host_mask)
        run.prompt = plan(input_ids, host_ids, host_mask, found, kept, on)
        if steps:
            run.layers = _plan_layers(steps, run.prompt, host_ids, host_mask, found, kept, on, inputs.get("labels"),
                                      input_ids.device)

    reduced_later = config.budget is not None or any(_needs_data(reducers[item.modality], item) for item in found)
    question = None
    with run.stopwatch.stage("plan"):
        if not reduced_later:                                   # everything the host has to do is done before the tower runs
            shorten([reducers[item.modality].count(item.layout) for item in found])
        if any(getattr(reducers[item.modality], "reads_question", False) for item in found):
            question = _questions(adapter, host_ids, host_mask, found)
        full = _full_positions(adapter, inputs, host_ids, host_mask) if adapter.mrope else None
    with run.stopwatch.stage("encode"):
        if isinstance(encoded, Encoded):
            encoded = {"image": encoded}
        elif encoded is None:
            encoded = adapter.encode_all(inputs, found, captures_of(config, adapter))
        if any(getattr(step.reducer, "captures", ()) for step in steps):
            run.vision = partial(_vision_state, encoded, found)
    with run.stopwatch.stage("reduce"):
        features = check_features(encoded, found)
        chosen = reducers_of(config, found, features)
        reduced = reduce_items(adapter, encoded, found, features, chosen, question)
    with run.stopwatch.stage("pack"):
        run.items = Items(Item(item.modality, item.row, item.layout, index, source, mass)
                          for item, (_, index, source, mass) in zip(found, reduced))
        if reduced_later:
            shorten([len(one.index) if item.together else one.index.cpu() for item, one in zip(found, run.items)])
        run.inputs = {k: v for k, v in inputs.items() if k not in adapter.dropped}
        if full is not None and run.prompt is None:             # nothing went: the stock model finds its own positions
            run.inputs = {k: v for k, v in inputs.items() if k not in adapter.raw_inputs}
        if full is not None and run.prompt is not None:
            tokens = input_ids.shape[1] if host_mask is None else host_mask.sum(1, keepdim=True)
            run.prompt = replace(run.prompt, rope_deltas=(full[1] - tokens).to(input_ids.device))
        run.inputs.update(_shortened(run, inputs, mask, found, config.positions, None if full is None else full[0]))
        if inputs.get("labels") is not None and (final := run.final(input_ids)) is not None:
            run.inputs["labels"] = final.select(inputs["labels"], -100)
        run.inputs["mm_encoder_outputs"] = adapter.outputs(
            [(item, tokens) for item, (tokens, *_rest) in zip(found, reduced)])
    return run


def captures_of(config: WrapConfig, adapter: Adapter) -> dict[str, Captures]:
    """What the reducers of a configuration read of the vision tower, by modality."""
    depth = adapter.depth
    merging = config.audio if getattr(config.audio, "in_encoder", False) else None
    return {modality: Captures(config.captures(depth, modality), config.receives(depth, modality),
                               merging if modality == "audio" else None) for modality in config.reducers}


def _needs_data(reducer: Any, item: Found) -> bool:
    """Whether which placeholders of an item stay is known with its data only."""
    if getattr(reducer, "count_is_bound", False):
        return True
    return not item.together and reducer.count(item.layout) < item.layout.tokens


def _vision_state(encoded: Mapping[str, Encoded], found: Sequence[Found], items: Sequence[int]) -> Any:
    """The captured vision layers of some items of equal layout, numbered among all items of the call."""
    modality = found[items[0]].modality
    same = [i for i, item in enumerate(found) if item.modality == modality]
    return encoded[modality].state([found[i].layout for i in same], [same.index(i) for i in items])


def _full_positions(adapter: Adapter, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rotary positions (3, B, L) of the full prompt and (B, 1) of what follows: the caller's or the model's. On the host."""
    given = inputs.get("position_ids")
    if given is None:
        return adapter.positions(inputs, ids, mask)
    if given.ndim != 3:
        raise ValueError(f"position_ids of shape {tuple(given.shape)}: this model's are (3, prompts, length)")
    given = given[-3:].cpu()
    return given, given.amax((0, 2))[:, None] + 1


def _plan_layers(steps: Sequence[Step], prompt: PromptMap | None, ids: Tensor, mask: Tensor | None, found: Sequence[Found],
                 kept: Sequence[int | Tensor], side: Literal["left", "right"], labels: Tensor | None, device: torch.device
                 ) -> LayerPlan | None:
    """Plan the layer reducers on the prompt that enters the language model."""
    if any(not item.together for item in found):
        raise UnsupportedModelError("layers=[...] on a clip whose frames stand between text (InternVL): its tokens are no run "
                                    "of columns; reduce it by video=... alone")
    others = {"video": "a clip", "audio": "a recording"}
    for held in (item.modality for item in found if item.modality in others):
        if any(isinstance(step.reducer, ImageReducer) for step in steps):
            raise UnsupportedModelError(f"InLayer reduces pictures, and this call holds {others[held]}; use FastV, PyramidDrop "
                                        f"or StagePool inside the language model, or {held}=... before it")
    labels = None if labels is None else labels.cpu()
    if prompt is None:
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        starts = [int(item.columns[0]) for item in found]
    else:
        valid = prompt.column >= 0
        labels = None if labels is None else prompt.select(labels, -100)
        starts = [int((prompt.column[item.row] == item.columns[0]).nonzero()[0]) for item in found]
    counts = [k if isinstance(k, int) else len(k) for k in kept]
    entering = [item.layout if k == item.layout.tokens else SequenceLayout(k, k) for item, k in zip(found, counts)]
    spans = [Span(item.row, start, layout, item.modality) for item, start, layout in zip(found, starts, entering)]
    return plan_layers(steps, valid, spans, side, labels, device)


def _shortened(run: Run, inputs: Mapping[str, Any], mask: Tensor | None, found: Sequence[Found],
               positions: Positions | None, full: Tensor | None) -> dict[str, Any]:
    """input_ids, attention_mask, labels and position_ids of the shorter prompt; nothing where no column was dropped."""
    if run.prompt is None:
        return {}
    ids, prompt = inputs["input_ids"], run.prompt
    out: dict[str, Any] = {"input_ids": prompt.select(ids, 0)}
    if mask is not None or prompt.is_padded or positions == "original" or full is not None:
        whole = torch.ones_like(ids) if mask is None else mask
        out["attention_mask"] = prompt.select(whole, 0)
    if inputs.get("token_type_ids") is not None:
        out["token_type_ids"] = prompt.select(inputs["token_type_ids"], 0)
    if full is not None:
        out["position_ids"] = _three_axes(prompt, full.to(ids.device), found, run.items)
        return out
    given = inputs.get("position_ids")
    if given is not None or positions == "original":
        if given is None:
            given = (torch.ones_like(ids) if mask is None else mask).long().cumsum(1).sub(1).clamp_min(0)
        out["position_ids"] = _original_positions(prompt, given.expand_as(ids), found, run.items)
    return out


def _original_positions(prompt: PromptMap, position_ids: Tensor, found: Sequence[Found], items: Sequence[Item]) -> Tensor:
    """Each kept token's position in the full prompt. -> (B, L')"""
    out = prompt.select(position_ids, 0)
    for place, item in zip(found, items):
        if item.after < item.before and place.together:         # else each kept placeholder stands where it stood
            first = int((prompt.column[place.row] == place.columns[0]).nonzero()[0])
            out[place.row, first:first + item.after] = position_ids[place.row, place.columns.to(out.device)[item.index]]
    return out


def _three_axes(prompt: PromptMap, full: Tensor, found: Sequence[Found], items: Sequence[Item]) -> Tensor:
    """M-RoPE positions of the shorter prompt, behind a row of plain ones that masks are made from. -> (4, B, L')"""
    plain = (prompt.column >= 0).long().cumsum(1).sub(1).clamp_min(0).to(full.device)
    return torch.stack([plain, *(_original_positions(prompt, axis, found, items) for axis in full)])


def _questions(adapter: Adapter, ids: Tensor, mask: Tensor | None, found: Sequence[Found]) -> tuple[Tensor, Tensor]:
    """Input embeddings of the text that follows each item in its prompt. -> (items, Q, D), (items, Q) bool"""
    texts = []
    for item in found:
        after = ids[item.row, int(item.columns[-1]) + 1:]
        real = ~torch.isin(after, torch.tensor(adapter.placeholders))
        if mask is not None:
            real &= mask[item.row, int(item.columns[-1]) + 1:].bool()
        texts.append(after[real])
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True) if texts else ids[:0]
    lengths = torch.tensor([len(t) for t in texts])
    device = adapter.model.get_input_embeddings().weight.device
    embedded = adapter.model.get_input_embeddings()(padded.to(device))
    return embedded.detach(), (torch.arange(padded.shape[1]) < lengths[:, None]).to(device)
