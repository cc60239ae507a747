"""A cache of transformers whose layers hold slots: fewer than the tokens they have seen, unlike many a layer and a head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer

from ..errors import UnsupportedModelError
from .attention import LAYER, is_ours
from .slots import Slots, slots_of
from .view import CacheView, Sight


class Timeline:
    """What a cache knows of every column that it has seen, whatever became of it. One for all layers.

    positions (B, L) int64: rotary positions; tags (B, n) int64, n <= L or ahead of it: modalities, text where not told
    """

    def __init__(self) -> None:
        self.positions: Tensor | None = None
        self.tags: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.positions is None else self.positions.shape[1]

    def extend(self, positions: Tensor | None, batch: int, start: int, stop: int, device: torch.device) -> None:
        """Note the positions of the columns from start to stop, once for all layers."""
        if self.length >= stop:
            return
        if positions is None:
            positions = torch.arange(start, stop, device=device)[None]
        elif positions.ndim == 3:
            positions = positions[0]                                                                # M-RoPE: time
        new = positions.to(device).expand(batch, -1)
        self.positions = new.clone() if self.positions is None else torch.cat([self.positions, new], 1)

    def tags_of(self, batch: int, length: int, device: torch.device) -> Tensor | None:
        """(B, length) int64, rows repeated for beams; None where nobody told"""
        if self.tags is None:
            return None
        tags = self.tags.to(device)[:, :length].repeat_interleave(batch // len(self.tags), 0)
        return torch.nn.functional.pad(tags, (0, length - tags.shape[1]))

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Choose or repeat rows."""
        if self.positions is not None:
            rows = len(self.positions)
            self.positions = change(self.positions)
            if self.tags is not None:
                self.tags = change(self.tags.repeat_interleave(rows // len(self.tags), 0))

    def crop(self, length: int) -> None:
        if self.positions is not None:
            self.positions = self.positions[:, :length]
        if self.tags is not None:
            self.tags = self.tags[:, :length]


class SlotLayer(DynamicLayer):
    """One layer: keys and values as stock while it holds every column (`whole`), slots with their columns afterwards.

    config is the language model's: whether its attention knows slots is asked there.

    seen  its logical length: how many columns came in; masks and positions count by it
    base  how many of them had come when it was last compressed
    """

    def __init__(self, config: Any, plan: Any, layer: int, depth: int, timeline: Timeline) -> None:
        super().__init__()
        self.config, self.plan, self.layer, self.depth, self.timeline = config, plan, layer, depth, timeline
        self._empty()

    keys: Any
    values: Any

    def _empty(self) -> None:
        self.column: Tensor | None = None
        self.valid: Tensor | None = None
        self.bias: Tensor | None = None
        self.hidden: Tensor | None = None       # what entered the attention layer in this call, where a plan needs it
        self.seen = self.base = 0
        self.unread = False

    @property
    def whole(self) -> bool:
        """Whether it holds every column, each as one token."""
        return self.column is None

    @property
    def slots(self) -> Slots:
        if self.column is None or self.valid is None:
            return slots_of(self.keys, self.values)
        return Slots(self.keys, self.values, self.column, self.valid, self.bias)

    def put(self, slots: Slots) -> None:
        """Hold these instead."""
        self.keys, self.values, self.column = slots.keys, slots.values, slots.column
        self.valid, self.bias = slots.valid, slots.bias

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
        else:
            self.put(self.slots.append(slots_of(key_states, value_states, self.seen)))
        self.seen += key_states.shape[-2]
        self.unread = True
        keys = self.keys[:]                                 # another tensor over the same memory: no cycle of references
        setattr(keys, LAYER, self)
        return keys, self.values

    def due(self, queries: int) -> bool:
        """Whether it is to be compressed after a call of so many tokens."""
        if self.plan is None:
            return False
        if queries > 1 and (self.seen == queries or self.plan.again):
            return True
        return self.plan.every is not None and self.seen - self.base >= self.plan.every

    def note(self, sight: Sight, positions: Tensor | None) -> None:
        """Take down the new columns' positions and, once they are slots, which of them are padding."""
        batch, device = len(self.keys), self.keys.device
        self.timeline.extend(positions, batch, sight.start, self.seen, device)
        if self.valid is not None and sight.mask is not None:
            own = sight.real(batch, self.seen, device)[:, None, sight.start:]
            old, new = self.valid.split([self.valid.shape[2] - own.shape[2], own.shape[2]], 2)
            self.valid = torch.cat([old, new & own], 2)

    def settle(self, query: Tensor, sight: Sight, scaling: float) -> None:
        """After its attention has run: compress if it is due. query (B, H, Q, d)"""
        hidden, self.hidden, self.unread = self.hidden, None, False
        if not self.due(query.shape[2]):
            return
        batch, device = len(query), query.device
        real = sight.real(batch, self.seen, device)
        queries = query.unflatten(1, (self.keys.shape[1], -1))
        assert self.timeline.positions is not None
        if self.timeline.length != self.seen:
            raise UnsupportedModelError(f"layer {self.layer} has seen {self.seen} tokens and the cache {self.timeline.length}: "
                                        f"tokens were dropped between layers (layers=[...]), whose positions a compressed "
                                        f"cache does not know; use reducers before the language model with it")
        x = CacheView(self.slots, queries, sight, real, self.timeline.positions.to(device), scaling, self.layer, self.depth,
                      self.timeline.tags_of(batch, self.seen, device), hidden)
        if self.whole:
            x = replace(x, slots=replace(x.slots, valid=x.of_columns(real)))
        new = self.plan(x)
        self.base = self.seen
        if new is not x.slots:
            self.put(new)

    def get_seq_length(self) -> int:
        """Tokens seen, dropped ones included."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back (a negative number), none of those that were there when the layer was compressed."""
        left = self.seen - abs(tokens_to_remove)
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if not self.whole and left < self.base:
            raise ValueError(f"crop({tokens_to_remove}) goes into the {self.base} tokens that were compressed together, of "
                             f"{self.seen}; take back {self.seen - self.base} at most, or start a new cache")
        super().crop(tokens_to_remove)
        if self.column is not None and self.valid is not None:
            self.column, self.valid = (x[..., :-abs(tokens_to_remove)] for x in (self.column, self.valid))
            self.bias = None if self.bias is None else self.bias[..., :-abs(tokens_to_remove)]
        self.seen, self.base = left, min(self.base, left)

    def reset(self) -> None:
        super().reset()
        self._empty()

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.seen == 0:
            return
        if self.whole:
            self.keys, self.values = change(self.keys), change(self.values)
        else:
            self.put(self.slots.each(change))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda x: x[indices])


class CompressedCache(DynamicCache):
    """A `past_key_values` that a plan keeps small: `attach(model, plan).cache()` makes one.

    Its length in tokens (`get_seq_length`: positions, masks) and in memory (`lengths`, `nbytes`) are two numbers. Each layer is
    compressed as soon as its attention over a prompt has run, so no more than one layer is ever held in full. Layers with
    sliding windows, or without keys and values, are the stock ones.
    """

    def __init__(self, config: Any, plan: Any = None) -> None:
        super().__init__(config=config)
        if any(isinstance(layer, DummyLayer) for layer in self.layers):
            raise UnsupportedModelError(f"{config.model_type}: some layers share the keys and values of others, which a "
                                        f"compressed cache does not know; use the stock cache")
        self.timeline, depth, text = Timeline(), len(self.layers), config.get_text_config(decoder=True)
        self.layers = [SlotLayer(text, plan, i, depth, self.timeline) if type(layer) is DynamicLayer else layer
                       for i, layer in enumerate(self.layers)]

    @property
    def slot_layers(self) -> list[SlotLayer]:
        return [layer for layer in self.layers if isinstance(layer, SlotLayer)]

    @property
    def lengths(self) -> list[int]:
        """Slots that each layer has memory for, padding of shorter heads included."""
        return [layer.keys.shape[-2] for layer in self._filled()]

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, columns, validity, masses, positions and tags."""
        total = sum(_bytes(x) for x in (self.timeline.positions, self.timeline.tags) if x is not None)
        for layer in self._filled():
            slots = isinstance(layer, SlotLayer) and not layer.whole
            total += layer.slots.nbytes if slots else _bytes(layer.keys) + _bytes(layer.values)
        return total

    @property
    def stock_nbytes(self) -> int:
        """Bytes that the stock cache would hold of the same tokens."""
        total = 0
        for layer in self._filled():
            length = layer.seen if isinstance(layer, SlotLayer) else layer.keys.shape[-2]
            total += length * (_bytes(layer.keys[..., :1, :]) + _bytes(layer.values[..., :1, :]))
        return total

    def _filled(self) -> list[Any]:
        """Layers that hold keys and values."""
        return [layer for layer in self.layers if getattr(layer, "keys", None) is not None]

    def tag(self, tags: Tensor) -> None:
        """Say what modality the next tokens are. tags (B, n) integers into `TAGS`: 0 text, 1 image, 2 video, 3 audio"""
        line, start = self.timeline, int(self.get_seq_length())
        if line.tags is None and start:
            line.tags = torch.zeros(len(tags), start, dtype=torch.long, device=tags.device)
        if line.tags is not None:
            old = torch.nn.functional.pad(line.tags[:, :start], (0, max(0, start - line.tags.shape[1])))
            tags = torch.cat([old.repeat_interleave(len(tags) // len(old), 0), tags.to(old)], 1)
        line.tags = tags.long()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back (a negative number); see `SlotLayer.crop`."""
        super().crop(tokens_to_remove)
        self.timeline.crop(int(self.get_seq_length()))

    def reset(self) -> None:
        super().reset()
        self.timeline.positions = self.timeline.tags = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.timeline.rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.timeline.rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.timeline.rows(lambda x: x[indices])


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
