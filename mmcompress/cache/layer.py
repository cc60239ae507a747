"""One layer of a compressed cache: whole as stock, or in parts that hold fewer slots than the tokens that came in."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..errors import UnsupportedModelError
from .attention import LAYER, Routes, is_ours, routes_of
from .parts import Parts, as_parts, by_heads, grown, in_one, joined, last_parts
from .scores import column_sums
from .slots import Slots, bytes_of, slots_of
from .stores import InBits
from .tally import LayerTally, Tally
from .timeline import Timeline
from .view import CacheView, Sight


class SlotLayer(DynamicLayer):
    """One layer: keys and values as stock while it holds every column (`whole`), parts with their columns afterwards.

    config is the language model's: whether its attention knows slots is asked there.

    seen  its logical length: how many columns came in; masks and positions count by it
    base  how many of them had come when it was last compressed
    parts what it holds; empty while it is whole
    """

    keys: Any
    values: Any

    def __init__(self, config: Any, plan: Any, layer: int, depth: int, timeline: Timeline, tally: Tally,
                 below: Any = None) -> None:
        super().__init__()
        self.config, self.plan, self.layer, self.depth, self.timeline, self.tally = config, plan, layer, depth, timeline, tally
        self.below = below                      # the layer that it shares slots with, where the plan says so
        self._empty()

    def _empty(self) -> None:
        self.parts: Parts = ()
        self.routes: Routes | None = None       # where its groups of heads are, if it has any
        self.evidence: Tensor | None = None     # of a whole layer's columns, where the plan gathers it
        self.hidden: Tensor | None = None       # what entered the attention layer in this call, where a plan needs it
        self.seen = self.base = 0
        self.unread = False

    def __deepcopy__(self, memo: dict[int, Any]) -> SlotLayer:
        """Its own tensors; the model's configuration and the plan, whose modules are trained, are the same ones."""
        new = copy(self)
        memo[id(self)] = new
        for name in ("keys", "values", "parts", "evidence", "hidden", "timeline", "tally", "below"):
            setattr(new, name, deepcopy(getattr(self, name), memo))
        return new

    @property
    def shares(self) -> bool:
        """Whether another layer may hold some of the same memory."""
        return self.plan is not None and (self.below is not None or self.plan.partner(self.layer + 1, self.depth) == self.layer)

    @property
    def whole(self) -> bool:
        """Whether it holds every column, each as one token."""
        return not self.parts

    @property
    def slots(self) -> Slots:
        """All of it in one, exact: for stored slots a copy."""
        if self.parts:
            return in_one(self.parts, self.dtype)
        return replace(slots_of(self.keys, self.values), evidence=self.evidence)

    @property
    def heads(self) -> int:
        """Its key heads."""
        return self.keys.shape[1] if self.whole else sum(own[0].column.shape[1] for own in by_heads(self.parts).values())

    @property
    def count(self) -> int:
        """Slots that its longest head has memory for."""
        if self.whole:
            return 0 if self.keys is None else int(self.keys.shape[-2])
        return max(sum(part.count for part in own) for own in by_heads(self.parts).values())

    @property
    def nbytes(self) -> int:
        return bytes_of(iter(self.tensors()))

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        if self.parts:
            return [x for part in self.parts for x in part.tensors()]
        return [x for x in (self.keys, self.values, self.evidence) if x is not None]

    @property
    def stock_nbytes(self) -> int:
        """Bytes of the stock cache's keys and values of the same tokens."""
        if self.whole:
            return 0 if self.keys is None else bytes_of(iter((self.keys, self.values)))
        rows = len(self.parts[0].column)
        width = self.parts[0].keys.shape[-1] + self.parts[0].values.shape[-1]
        return rows * self.heads * self.seen * width * self.dtype.itemsize

    def put(self, held: Slots | Parts) -> None:
        """Hold these instead."""
        self.parts, self.evidence = as_parts(held), None
        self.routes = routes_of(self.parts, self.parts[0].valid.device)
        self.keys = self.values = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new tokens. The keys that come back carry the layer, for `slot_attention`."""
        if self.plan is not None and (self.unread or not is_ours(self.config._attn_implementation)):
            raise UnsupportedModelError("this model's attention does not look at the cache's slots: attach(model, plan) first, "
                                        "from mmcompress.cache, pass the cache it makes, and stay attached while it is used")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.whole:
            self.keys = torch.cat([self.keys, key_states], -2)
            self.values = torch.cat([self.values, value_states], -2)
            if self.evidence is not None:
                self.evidence = torch.nn.functional.pad(self.evidence, (0, key_states.shape[-2]))
        else:
            index = None if self.routes is None else self.routes.heads
            self.parts = grown(self.parts, slots_of(key_states, value_states, self.seen), index)
        self.seen += key_states.shape[-2]
        self.unread = True
        keys, values = (self.keys, self.values) if self.whole else (key_states, value_states)
        keys = keys[:]                                      # another tensor over the same memory: no cycle of references
        setattr(keys, LAYER, self)
        return keys, values

    def due(self, queries: int) -> bool:
        """Whether it is to be compressed after a call of so many tokens."""
        if self.plan is None:
            return False
        if self.prompted(queries) and (self.seen == queries or self.plan.again):
            return True
        return self.plan.every is not None and self.seen - self.base >= self.plan.every

    def prompted(self, queries: int) -> bool:
        """Whether a call of so many tokens is a prompt or a chunk of one, the last of which may be a single token."""
        return queries > 1 or self.seen <= self.timeline.coming

    def note(self, sight: Sight, positions: Tensor | None, rows: int, device: torch.device) -> None:
        """Take down the new columns' positions and, once they are slots, which of them are padding."""
        self.timeline.extend(positions, rows, sight.start, self.seen, device)
        if self.whole or sight.mask is None:
            return
        own = sight.real(rows, self.seen, device)[:, None, sight.start:]
        parts = list(self.parts)
        for i in last_parts(self.parts):
            old, new = parts[i].valid.split([parts[i].count - own.shape[2], own.shape[2]], 2)
            parts[i] = replace(parts[i], valid=torch.cat([old, new & own], 2))
        self.parts = tuple(parts)

    def settle(self, query: Tensor, sight: Sight, scaling: float, softcap: float | None = None) -> None:
        """After its attention has run: gather evidence, and compress if it is due. query (B, H, Q, d)"""
        hidden, self.hidden, self.unread = self.hidden, None, False
        if self.plan is None:
            return
        due = self.due(query.shape[2])
        if not due and not (self.plan.accumulates and (self.plan.again or self.plan.every is not None)):
            return
        if due and self.prompted(query.shape[2]):
            self.tally.hold(self.layer, self.nbytes)
        x = self._view(query, sight, scaling, softcap, hidden)
        if self.plan.accumulates:
            with x.stage("score"):
                self._gather_evidence(x)
        if due:
            self._compress(replace(x, slots=self._real(x)))
            self.base = self.seen
            if self.plan.accumulates and not self.plan.again and self.plan.every is None:
                self._forget_evidence()

    def _view(self, query: Tensor, sight: Sight, scaling: float, softcap: float | None, hidden: Tensor | None) -> CacheView:
        """All of a view but its slots, which are put in once there is evidence."""
        batch, device = len(query), query.device
        if self.timeline.positions is None or self.timeline.length != self.seen:
            raise UnsupportedModelError(f"layer {self.layer} has seen {self.seen} tokens and the cache {self.timeline.length}: "
                                        f"tokens were dropped between layers (layers=[...]), whose positions a compressed "
                                        f"cache does not know; use reducers before the language model with it")
        none = query[:, :self.heads, :0]
        return CacheView(slots_of(none, none), query.unflatten(1, (self.heads, -1)), sight,
                         sight.real(batch, self.seen, device), self.timeline.positions.to(device), scaling, self.layer,
                         self.depth, self.timeline.tags_of(batch, self.seen, device), hidden, softcap,
                         self.timeline.beyond(batch, self.seen, device), balance=self._balance(),
                         stopwatch=self.tally.stopwatch)

    def _real(self, x: CacheView) -> Slots:
        """What it holds in one, without its padding."""
        slots = self.slots
        return replace(slots, valid=replace(x, slots=slots).of_columns(x.real)) if self.whole else slots

    def _balance(self) -> Tensor | None:
        """The balancer that keys in few bits have been multiplied by."""
        if len(self.parts) > 1 and isinstance(keys := self.parts[0].keys, InBits) and self.parts[0].heads is None:
            return keys.balance
        return None

    def _gather_evidence(self, x: CacheView) -> None:
        """Add what this call's queries paid each slot to what it has had before, part by part."""
        if self.whole:
            new = column_sums(replace(x, slots=self._real(x)))
            self.evidence = new if self.evidence is None else self.evidence + new
            return
        parts = []
        for heads, own in by_heads(self.parts).items():
            slots = joined(own, self.dtype)
            queries = x.queries if heads is None else x.queries[:, list(heads)]
            new = column_sums(replace(x, slots=slots, queries=queries))
            total = new if slots.evidence is None else slots.evidence + new
            parts += [replace(part, evidence=e) for part, e in zip(own, total.split([part.count for part in own], 2))]
        self.parts = tuple(parts)

    def _forget_evidence(self) -> None:
        """Free what no later call will read."""
        self.evidence, self.parts = None, tuple(replace(part, evidence=None) for part in self.parts)

    def _compress(self, x: CacheView) -> None:
        if self.below is None:
            new = self.plan(x)
            if new is not x.slots:
                self.put(new)
        else:
            with x.stage("store"):
                under, new = self.plan.share(x, self.below._real(x))
            self.below.put(under)
            self.below.count_up()
            self.put(new)
        self.count_up()

    def count_up(self) -> None:
        """Tell the tally what it holds."""
        nbytes = self.nbytes
        if self.below is not None:                          # of what two layers share the lower one is said to hold it
            nbytes = bytes_of(iter([*self.below.tensors(), *self.tensors()])) - self.below.nbytes
        self.tally.hold(self.layer, nbytes)
        self.tally.layers[self.layer] = LayerTally(self.seen, self.count, nbytes, self.stock_nbytes, self.dtype)

    def get_seq_length(self) -> int:
        """Tokens seen, dropped ones included."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back (a negative number), none of those that were there when the layer was compressed."""
        n = abs(tokens_to_remove)
        left = self.seen - n
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if self.whole or tokens_to_remove > 0:
            super().crop(tokens_to_remove)                  # raises on a positive number, as stock does
            self.evidence = None if self.evidence is None else self.evidence[..., :-n]
        elif left < self.base:
            raise ValueError(f"crop({tokens_to_remove}) goes into the {self.base} tokens that were compressed together, of "
                             f"{self.seen}; take back {self.seen - self.base} at most, or start a new cache")
        else:
            last = last_parts(self.parts)
            cut = (p.first(p.count - n) if i in last else p for i, p in enumerate(self.parts))
            self.parts = tuple(p for p in cut if p.count)
        self.seen, self.base = left, min(self.base, left)

    def reset(self) -> None:
        super().reset()
        self._empty()

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Choose or repeat rows."""
        if self.seen == 0:
            return
        if self.whole:
            self.keys, self.values = change(self.keys), change(self.values)
            self.evidence = None if self.evidence is None else change(self.evidence)
        else:
            self.parts = tuple(part.each(change) for part in self.parts)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.rows(lambda x: x[indices])
