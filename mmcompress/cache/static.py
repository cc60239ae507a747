"""A compressed cache with room for a known number of new tokens: fixed shapes and addresses, for `torch.compile`.

Once a prompt is compressed the number of its slots is known. Each layer then holds what it held, as it held it, and an exact
part with `room` empty slots behind, which new tokens are written into; how far it is filled is a tensor. So decoding compiles
without breaks (`fullgraph=True`), and from one token to the next nothing is compiled again, read back or allocated. Nothing is
compressed any more either: that is what `every=` and `again=` ask for, and the dynamic form does.

The stock 4-D mask, which would grow, is not read: a new token sees every slot that is no padding and itself, and in layers that
slide a window those of the window. New tokens must therefore be real ones in all rows, as `generate` has them, and a mask of
one's own for them has no effect.

Run on a CPU only, with the torch version of `ops.kv_decode`: by the backends eager and aot_eager in tests, by inductor one step
by hand. CUDA graphs, and Triton kernels within a graph, have not been run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from ..errors import UnsupportedModelError
from .attention import OPEN, is_ours, routes_of
from .cache import CompressedCache
from .layer import SlotLayer
from .parts import Parts, by_heads, last_parts
from .slots import Slots, bytes_of, exactly, slots_of
from .timeline import PADDING
from .view import Sight


@dataclass(frozen=True, eq=False)
class Ahead(Sight):
    """What new tokens see of slots that have columns ahead of them: those up to their own.

    at      the column of the first of them, a tensor
    window  how many columns back they see, their own included; None: all
    """

    mask: None = None
    start: int = 0
    at: Tensor | int = 0
    window: int | None = None

    def seen(self, slots: Slots, rows: Tensor) -> Tensor:
        column, query = slots.column[:, :, None], (self.at + rows)[:, None, :, None]
        seen = (column <= query) & slots.valid[:, :, None]                                          # (B, H_kv, q, N)
        return seen if self.window is None else seen & (column > query - self.window)

    def newest(self, slots: Slots) -> Tensor:
        if not slots.exact:
            return slots.valid                              # nothing is ever written there
        seen = (slots.column <= self.at) & slots.valid
        return seen if self.window is None else seen & (slots.column > self.at - self.window)


class StaticSlotLayer(CacheLayerMixin):
    """One layer: parts of fixed size, of which each group of heads' last is exact and open.

    parts   with `room` empty slots at the end of the open ones, whose columns are those of the tokens to come
    length  () int64: tokens seen, dropped ones included; positions count by it
    window  how many columns a query sees, in a layer that slides one
    """

    is_compileable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, config: Any, parts: Parts, seen: int, room: int, window: int | None = None, again: bool = False,
                 first: bool = False) -> None:
        super().__init__()
        self.config, self.parts, self.room, self.window = config, parts, room, window
        self.again, self.first = again, first
        self.device, self.batch_size = parts[0].valid.device, len(parts[0].valid)
        self.length, self.base = (torch.tensor(seen, device=self.device) for _ in range(2))
        self.routes = routes_of(parts, self.device)
        self.open = last_parts(parts)
        self.came = 0                                       # as far as eager calls know
        self.is_initialized = True
        for x in self.tensors():
            torch._dynamo.mark_static_address(x)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """It is never empty."""

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        held = [self.length, self.base, *(x for part in self.parts for x in part.tensors())]
        return held if self.routes is None else [*held, *self.routes.heads.values(), self.routes.order]

    @property
    def count(self) -> int:
        """Slots that its longest head has memory for, empty ones included."""
        return max(sum(part.count for part in own) for own in by_heads(self.parts).values())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens. The keys that come back carry the layer, for `slot_attention`."""
        n = key_states.shape[-2]
        if not is_ours(self.config._attn_implementation):
            raise UnsupportedModelError("this model's attention does not look at the cache's slots: stay attached while the "
                                        "static form of a compressed cache is used")
        if n > 1 and self.again:
            raise ValueError(f"a turn of {n} tokens: the plan compresses after every prompt (again=True), which the static "
                             f"form does not; feed it to the dynamic form, and freeze that")
        self._take_room(n)
        index = torch.arange(n, device=self.device) + (self.length - self.base)
        for i in self.open:
            part = self.parts[i]
            place = index + (part.count - self.room)
            own = (lambda x: x) if self.routes is None else self._of_heads(part)
            exactly(part.keys).index_copy_(2, place, own(key_states))
            exactly(part.values).index_copy_(2, place, own(value_states))
        self.length.add_(n)
        keys = key_states[:]                                # another tensor over the same memory: no cycle of references
        setattr(keys, OPEN, self)
        return keys, value_states

    def _of_heads(self, part: Slots) -> Callable[[Tensor], Tensor]:
        assert self.routes is not None
        index = self.routes.heads[part.heads]
        return lambda x: x.index_select(1, index)

    def _take_room(self, n: int) -> None:
        """Raise where n more tokens do not fit: at once in eager calls; from compiled ones, on a GPU, as a device assertion."""
        said = f"the static cache has room for {self.room} tokens after those it was made with; ask for more, static(room)"
        if torch.compiler.is_compiling():
            if self.first:
                torch._assert_async(self.length + n <= self.base + self.room, said)
            return
        if self.device.type == "cpu":
            self.came = int(self.length - self.base)
        if self.came + n > self.room:
            raise ValueError(f"{n} more after {self.came}: {said}")
        self.came += n

    def sight(self, queries: int) -> Ahead:
        """What the newest tokens see."""
        return Ahead(at=self.length - queries, window=self.window)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The smallest mask there is: none is read."""
        return query_length, 0

    def get_seq_length(self) -> Any:
        """Tokens seen, dropped ones included. () int64"""
        return self.length

    def get_max_length(self) -> int:
        """Slots it has memory for, empty ones included."""
        return self.count

    def reset(self) -> None:
        """Take back all that came after it was made: its room is empty again."""
        self.length.copy_(self.base)
        self.came = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        reorder([self], beam_idx)


class StaticCompressedCache(Cache):
    """The static form of a `CompressedCache`, with room for so many new tokens: `freeze` makes it.

    A second turn of several tokens may come in, as long as there is room; its shape is a graph of its own. `reset()` takes back
    everything after the prompt that was compressed, which may be continued again.

    room   new tokens that it has been made for
    tally  what compressing saved and took
    """

    def __init__(self, layers: list[StaticSlotLayer], tally: Any) -> None:
        super().__init__(layers=list(layers))
        self.tally, self.room = tally, layers[0].room

    @property
    def left(self) -> int:
        """New tokens that there is still room for. Waits for the device."""
        layer: Any = self.layers[0]
        return self.room - int(layer.length - layer.base)

    @property
    def lengths(self) -> list[int]:
        """Slots that each layer has memory for: `room` empty ones and padding of shorter heads included."""
        return [layer.count for layer in self._own]

    @property
    def nbytes(self) -> int:
        """Bytes held, empty slots included; shared ones once."""
        return bytes_of(x for layer in self._own for x in layer.tensors())

    def miss(self, counts: Tensor) -> None:
        """What reducers dropped, which the dynamic form counts: no budget asks any more, as nothing is compressed."""

    @property
    def _own(self) -> list[StaticSlotLayer]:
        return [layer for layer in self.layers if isinstance(layer, StaticSlotLayer)]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows, in place."""
        reorder(self._own, beam_idx)


def reorder(layers: list[StaticSlotLayer], beam_idx: Tensor) -> None:
    """Choose rows of all that layers hold, in place; what they share once."""
    held = {id(x): x for layer in layers for part in layer.parts for x in part.tensors()}
    for x in held.values():
        x.copy_(x.index_select(0, beam_idx.to(x.device)))


def freeze(cache: CompressedCache, room: int, mask: Tensor | None = None, *, take: bool = False) -> StaticCompressedCache:
    """The static form of a cache, with room for so many new tokens in every row.

    mask  (B, L): the 2-D attention mask of all columns so far, for layers that hold every token or slide a window; default that
          of the last call of the model, so give it where rows were chosen since
    take  take the memory over, layer by layer, and leave the cache empty; otherwise everything is copied

    Raises ValueError for an empty cache, or a plan that compresses while decoding (`every=`); UnsupportedModelError for a model
    with layers of another kind.
    """
    own = cache.slot_layers
    if room < 1:
        raise ValueError(f"room={room}: how many new tokens are to fit, 1 or more")
    if not own:
        raise UnsupportedModelError("no layer of this model is compressed (all slide a window); use transformers' StaticCache")
    plan, config, seen = own[0].plan, own[0].config, own[0].seen
    if seen == 0:
        raise ValueError("the cache is empty: run a prompt through the model first, then freeze what the plan kept of it")
    if plan is not None and plan.every is not None:
        raise ValueError(f"every={plan.every}: the plan compresses while decoding, which the static form does not; leave every "
                         f"out, or use the dynamic form")
    check_layers(cache, config)
    again, keep, layers = plan is not None and plan.again, _Keep(copy=not take), []
    real = _Real(cache, mask, seen)
    for i, layer in enumerate(cache.layers):
        parts, window = held(layer, real, seen)
        parts = tuple(replace(part, evidence=None) for part in parts)
        last = last_parts(parts)
        done: list[Slots] = []
        for j, part in enumerate(parts):
            if j in last and part.exact:
                done.append(opened(part, seen, room))
                continue
            done.append(part.each(keep))
            if j in last:
                done.append(opened(empty(part, getattr(layer, "dtype")), seen, room))               # noqa: B009
        if take:
            layer.reset()
        layers.append(StaticSlotLayer(config, tuple(done), seen, room, window, again, first=i == 0))
    if take:
        cache.timeline.clear()
    return StaticCompressedCache(layers, cache.tally)


def check_layers(cache: CompressedCache, config: Any) -> None:
    """Raise UnsupportedModelError unless every layer is one that can be frozen."""
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise UnsupportedModelError(f"{config.model_type} attends in chunks in some layers, which the static form of a "
                                    f"compressed cache does not know; use the dynamic form")
    for layer in cache.layers:
        if not isinstance(layer, SlotLayer) and type(layer) is not DynamicSlidingWindowLayer:
            raise UnsupportedModelError(f"{config.model_type} has {type(layer).__name__}s, which the static form of a "
                                        f"compressed cache does not know; use the dynamic form")


def held(layer: Any, real: Callable[[Tensor], Tensor], seen: int) -> tuple[Parts, int | None]:
    """What a dynamic layer holds as parts, padding not valid, and its window."""
    if isinstance(layer, SlotLayer) and not layer.whole:
        return layer.parts, None
    slots = slots_of(layer.keys, layer.values, seen - layer.keys.shape[2])
    slots = replace(slots, valid=real(slots.column))
    return (slots,), None if isinstance(layer, SlotLayer) else layer.sliding_window


def opened(part: Slots, seen: int, room: int) -> Slots:
    """An exact part with room behind it, for the columns from `seen` on."""
    batch, heads, _ = part.column.shape
    ahead = torch.arange(seen, seen + room, device=part.column.device, dtype=part.column.dtype).expand(batch, heads, -1)
    longer = lambda x: F.pad(exactly(x), (0, 0, 0, room))  # noqa: E731
    bias = None if part.bias is None else F.pad(part.bias, (0, room))
    return replace(part, keys=longer(part.keys), values=longer(part.values), column=torch.cat([part.column, ahead], 2),
                   valid=F.pad(part.valid, (0, room), value=True), bias=bias)


def empty(like: Slots, dtype: torch.dtype) -> Slots:
    """No exact slots, of the heads and widths of others."""
    none = lambda x: torch.zeros(*x.shape[:2], 0, x.shape[3], dtype=dtype, device=like.valid.device)  # noqa: E731
    return Slots(none(like.keys), none(like.values), like.column[:, :, :0], like.valid[:, :, :0], heads=like.heads)


class _Keep:
    """Tensors that stay as they are: contiguous, copied or not, and shared where they were."""

    def __init__(self, copy: bool) -> None:
        self.copy = copy
        self.known: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if id(x) not in self.known:
            self.known[id(x)] = x, x.clone(memory_format=torch.contiguous_format) if self.copy else x.contiguous()
        return self.known[id(x)][1]


class _Real:
    """Which slots are no padding, looked up by column in the mask of a call."""

    def __init__(self, cache: CompressedCache, mask: Tensor | None, seen: int) -> None:
        self.mask = getattr(cache, PADDING, ...) if mask is None else mask
        self.seen = seen

    def __call__(self, column: Tensor) -> Tensor:
        """(B, H_kv, N) int32 -> (B, H_kv, N) bool"""
        mask: Any = self.mask
        if mask is None:
            return torch.ones_like(column, dtype=torch.bool)
        batch = len(column)
        if mask is ... or mask.ndim != 2 or mask.shape[1] < self.seen or batch % len(mask):
            raise ValueError(f"some layers hold every token, and which of them is padding is not known here: pass "
                             f"mask=attention_mask, ({batch}, {self.seen}), ones where there is none")
        mask = mask.to(column.device).bool().repeat_interleave(batch // len(mask), 0)
        return mask[:, None].expand(-1, column.shape[1], -1).gather(2, column.long())
