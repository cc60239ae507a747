"""What a cache must remember of a prompt that was reduced inside the language model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

_CACHE = "_mmcompress_layers"   # layer -> Held, on the cache


@dataclass(frozen=True, eq=False)
class Held:
    """What one layer of a cache holds of the prompts so far, where that is less than layer 0 holds.

    valid   (B, C) bool: its first C columns; False: padding
    base    how many columns of layer 0 they stand for; what follows is alike in all layers
    shift   (B, 1) int64: how far this layer's positions lie below layer 0's
    """

    valid: Tensor
    base: int
    shift: Tensor
    full: bool
    moved: bool                 # shift may differ from zero

    def repeat(self, rows: int) -> Held:
        times = rows // len(self.valid)
        if times == 1:
            return self
        return replace(self, valid=self.valid.repeat_interleave(times, 0), shift=self.shift.repeat_interleave(times, 0))


def holds_layers(cache: Any) -> bool:
    """Whether some layers of a cache hold less of its prompt than the first."""
    return bool(getattr(cache, _CACHE, {}))


def recall_layers(cache: Any, rows: int) -> dict[int, Held]:
    """What a cache's layers hold less than its first; nothing once it was emptied for another prompt."""
    if not holds_layers(cache):
        return {}
    held: dict[int, Held] = getattr(cache, _CACHE)
    length = int(cache.get_seq_length())
    if length == 0:
        delattr(cache, _CACHE)
        return {}
    if length < max(h.base for h in held.values()):
        raise ValueError(f"this cache was cropped to {length} columns, into a prompt that was reduced inside the language "
                         f"model; crop generated tokens only, or start a new cache")
    repeated = {id(h): h.repeat(rows) for h in held.values()}
    return {layer: repeated[id(h)] for layer, h in held.items()}


def remember_layers(cache: Any, held: dict[int, Held]) -> None:
    """Note on a cache what its layers hold."""
    if cache is not None and held:
        setattr(cache, _CACHE, held)
