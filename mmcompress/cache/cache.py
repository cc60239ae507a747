"""A cache of transformers whose layers hold slots: fewer than the tokens they have seen, unlike many a layer and a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer

from ..errors import UnsupportedModelError
from ..report import Stopwatch
from .layer import SlotLayer
from .slots import bytes_of
from .tally import Tally
from .timeline import PADDING, Timeline

if TYPE_CHECKING:
    from .static import StaticCompressedCache


class CompressedCache(DynamicCache):
    """A `past_key_values` that a plan keeps small: `attach(model, plan).cache()` makes one.

    Its length in tokens (`get_seq_length`: positions, masks) and in memory (`lengths`, `nbytes`) are two numbers. Each layer is
    compressed as soon as its attention over a prompt has run, so no more than one layer is ever held in full. Layers with
    sliding windows, or without keys and values, are the stock ones.
    """

    def __init__(self, config: Any, plan: Any = None, device: torch.device | str = "cpu") -> None:
        """plan: a `CachePlan`; None: everything stays. device: where stages are timed"""
        super().__init__(config=config)
        if any(isinstance(layer, DummyLayer) for layer in self.layers):
            raise UnsupportedModelError(f"{config.model_type}: some layers share the keys and values of others, which a "
                                        f"compressed cache does not know; use the stock cache")
        depth, text = len(self.layers), config.get_text_config(decoder=True)
        self.timeline, self.tally = Timeline(), Tally(Stopwatch(device))
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                partner = None if plan is None else plan.partner(i, depth)
                below = None if partner is None else self.layers[partner]
                if below is not None and not isinstance(below, SlotLayer):
                    raise UnsupportedModelError(f"{type(plan).__name__}: layer {i} is to share its slots with layer {partner}, "
                                                f"which slides a window in {config.model_type}; use another method")
                self.layers[i] = SlotLayer(text, plan, i, depth, self.timeline, self.tally, below)

    @property
    def slot_layers(self) -> list[SlotLayer]:
        return [layer for layer in self.layers if isinstance(layer, SlotLayer)]

    @property
    def lengths(self) -> list[int]:
        """Slots that each layer has memory for, padding of shorter heads included."""
        return [layer.count if isinstance(layer, SlotLayer) else layer.keys.shape[-2] for layer in self._filled()]

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, scales, columns, validity, masses, evidence, positions and tags; shared ones once."""
        held = self.timeline.tensors()
        for layer in self._filled():
            held += layer.tensors() if isinstance(layer, SlotLayer) else [layer.keys, layer.values]
        return bytes_of(iter(held))

    @property
    def stock_nbytes(self) -> int:
        """Bytes that the stock cache would hold of the same tokens."""
        return sum(layer.stock_nbytes if isinstance(layer, SlotLayer) else bytes_of(iter((layer.keys, layer.values)))
                   for layer in self._filled())

    def _filled(self) -> list[Any]:
        """Layers that hold keys and values."""
        return [layer for layer in self.layers
                if (isinstance(layer, SlotLayer) and layer.parts) or getattr(layer, "keys", None) is not None]

    def miss(self, counts: Tensor) -> None:
        """Say how many tokens of the prompt that comes next were dropped before the language model: budgets count them too.

        counts (B, 4) int64, by modality in the order of `TAGS`
        """
        self.timeline.miss(counts)

    def announce(self, mask: Tensor) -> None:
        """Say that a prompt comes in chunks, so that budgets count all of it from the first chunk on.

        mask (B, L): the 2-D attention mask of all columns, those in the cache included; ones where there is no padding
        """
        self.timeline.coming, self.timeline.real = mask.shape[1], mask

    def static(self, room: int, mask: Tensor | None = None) -> StaticCompressedCache:
        """A copy with fixed shapes and room for so many new tokens, which `torch.compile` takes: see `static.freeze`."""
        from .static import freeze

        return freeze(self, room, mask)

    def tag(self, tags: Tensor) -> None:
        """Say what modality the next tokens are. tags (B, n) integers into `TAGS`: 0 text, 1 image, 2 video, 3 audio"""
        line, start = self.timeline, int(self.get_seq_length())
        if line.tags is None and start:
            line.tags = torch.zeros(len(tags), start, dtype=torch.long, device=tags.device)
        if line.tags is not None:
            known = line.tags.repeat_interleave(len(tags) // len(line.tags), 0)
            old = torch.nn.functional.pad(known[:, :start], (0, max(0, start - known.shape[1])))
            tags = torch.cat([old, tags.to(old), known[:, start + tags.shape[1]:]], 1)
        line.tags = tags.long()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back (a negative number); see `SlotLayer.crop`."""
        super().crop(tokens_to_remove)
        self.timeline.crop(int(self.get_seq_length()))

    def reset(self) -> None:
        super().reset()
        self.timeline.clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._rows("reorder_cache", beam_idx, lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows("batch_repeat_interleave", repeats, lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows("batch_select_indices", indices, lambda x: x[indices])

    def _rows(self, name: str, argument: Any, change: Callable[[Tensor], Tensor]) -> None:
        """Choose or repeat rows in every layer; what layers share they share afterwards."""
        done: dict[int, tuple[Tensor, Tensor]] = {}

        def once(x: Tensor) -> Tensor:
            if id(x) not in done:
                done[id(x)] = x, change(x)
            return done[id(x)][1]

        vars(self).pop(PADDING, None)                       # it is of other rows
        for layer in self.layers:
            if isinstance(layer, SlotLayer):
                layer.rows(once if layer.shares else change)
            else:
                getattr(layer, name)(argument)
        self.timeline.rows(change)
