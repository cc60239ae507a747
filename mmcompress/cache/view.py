"""What a method sees of one layer when the cache is compressed, and what attention sees of its slots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import SignalError
from .slots import Slots, exactly

if TYPE_CHECKING:
    from ..report import Stopwatch

_KIND = "_mmcompress_kind"                      # on a mask: what `Sight.kind` found
TAGS = ("text", "image", "video", "audio")      # modality tags are numbers into this


@dataclass(frozen=True, eq=False)
class Sight:
    """Which columns the queries of one call may look at.

    mask   what the stock model made for all columns: (B or 1, 1, Q, L or more) bool, or additive and then read as seen or not;
           (B, L or more) as flash attention takes it: which columns are no padding, and causality besides; None where
           causality says all
    start  the column of the first query
    """

    mask: Tensor | None
    start: int

    def __post_init__(self) -> None:
        if self.mask is not None and self.mask.ndim != 2 and (self.mask.ndim != 4 or self.mask.shape[1] != 1):
            raise ValueError(f"an attention mask of shape {tuple(self.mask.shape)}: a compressed cache reads masks of (B, 1, "
                             f"queries, columns) or (B, columns), columns counted as if nothing had been dropped")

    def seen(self, slots: Slots, rows: Tensor) -> Tensor:
        """Whether some queries see each slot, the mask of the stock model looked up by column.

        rows (B, q) int64, numbers of queries -> (B, H_kv, q, N) bool
        """
        column = slots.column.long()[:, :, None]                                                    # (B, H, 1, N)
        if self.mask is None or self.mask.ndim == 2:
            seen = (column <= self.start + rows[:, None, :, None]) & slots.valid[:, :, None]
            if self.mask is None:
                return seen
            self._check(self.mask)
            real = self.mask.bool()[:, None, None].expand(-1, *column.shape[1:3], -1)
            return seen & real.gather(3, column)
        self._check(self.mask)
        looks = self._allowed(self.mask.expand(len(rows), -1, -1, -1))
        looks = looks.gather(2, rows[:, None, :, None].expand(-1, 1, -1, looks.shape[-1]))          # (B, 1, q, L)
        column = column.expand(-1, -1, rows.shape[1], -1)
        return looks.expand(-1, column.shape[1], -1, -1).gather(3, column) & slots.valid[:, :, None]

    def newest(self, slots: Slots) -> Tensor:
        """Which slots the only query of a call sees. (B, H_kv, N) bool"""
        if self.mask is None:
            return slots.valid
        return self.seen(slots, torch.zeros(len(slots.valid), 1, dtype=torch.long, device=slots.valid.device))[:, :, 0]

    def real(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Which columns are no padding: those that the call's last query sees. (B, length) bool"""
        if self.mask is None:
            return torch.ones(batch, length, dtype=torch.bool, device=device)
        if self.mask.ndim == 2:
            self._check(self.mask)
            return self.mask[:, :length].bool()
        return self._allowed(self.mask[:, 0, -1, :length]).expand(batch, -1)

    def kind(self, queries: int) -> tuple[bool, bool]:
        """Whether the mask says no more than causality and padding, and whether all padding is in front of a row's tokens.

        Reads the mask, so it waits for the device, once for all layers that share the mask. No mask: no padding.
        """
        if self.mask is None:
            return True, True
        known: dict[tuple[int, int], tuple[bool, bool]] = self.mask.__dict__.setdefault(_KIND, {})
        if (self.start, queries) not in known:
            known[self.start, queries] = self._kind(self.mask, queries)
        return known[self.start, queries]

    def _kind(self, mask: Tensor, queries: int) -> tuple[bool, bool]:
        self._check(mask)
        length = self.start + queries
        if mask.ndim == 2:
            return True, bool((mask[:, :length].long().diff(dim=1) >= 0).all())
        allowed = self._allowed(mask[:, 0, :, :length])                                             # (B or 1, Q, L)
        real, place = allowed[:, -1], torch.arange(length, device=mask.device)
        causal = real[:, None] & (place <= place[self.start:, None])
        asking = real[:, self.start:, None]
        plain = ((allowed == causal) | ~asking).all()
        left = (real.long().diff(dim=1) >= 0).all()
        plain, left = torch.stack([plain, left]).tolist()
        return plain, left

    def _check(self, mask: Tensor) -> None:
        queries, columns = mask.shape[2:] if mask.ndim == 4 else (1, mask.shape[1])
        if columns < self.start + queries:
            raise ValueError(f"an attention mask of {columns} columns for {queries} tokens after {self.start}: a compressed "
                             f"cache counts columns as if nothing had been dropped; pass a mask of {self.start + queries} "
                             f"columns, or a 2-D one")

    @staticmethod
    def _allowed(mask: Tensor) -> Tensor:
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


@dataclass(frozen=True, eq=False)
class Total:
    """How many tokens a budget counts: those that the stock model would hold once the prompt is in.

    of_tag  (B, len(TAGS)) int64: tokens of each modality beyond those that have come, because a reducer dropped them before the
            language model, or because a prompt that comes in chunks has been announced; None: no others
    least   what no row's sum of them is below, and most: what none is above; known on the host
    """

    of_tag: Tensor | None = None
    least: int = 0
    most: int = 0


@dataclass(frozen=True, eq=False)
class CacheView:
    """One layer of the cache after a call, before it is compressed.

    slots     what it holds, exact and in the order of columns, the call's own tokens at the end
    queries   (B, H_kv, G, Q, d) the call's own, rotated; G query heads share a key head
    sight     which columns these queries saw
    real      (B, L) bool: which of all columns so far are no padding
    positions (B, L) int64: the rotary position of every column
    tags      (B, L) int64: the modality of every column, see TAGS; None: not told
    hidden    (B, Q, D) what entered the attention layer, for plans that say `needs = ("hidden",)`
    softcap   what the layer caps its logits at; None: it does not
    beyond    tokens that count for budgets and are no columns
    intact    whether the call's own tokens are all there; not after another plan of a chain
    balance   (B, H_kv, 1, d) float32: the balancer of what is held in few bits already; None: nothing is
    stopwatch where the milliseconds of the stages go; None: nowhere
    """

    slots: Slots
    queries: Tensor
    sight: Sight
    real: Tensor
    positions: Tensor
    scaling: float
    layer: int
    depth: int
    tags: Tensor | None = None
    hidden: Tensor | None = None
    softcap: float | None = None
    beyond: Total = Total()
    intact: bool = True
    balance: Tensor | None = None
    stopwatch: Stopwatch | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage of a plan."""
        if self.stopwatch is None:
            yield
            return
        with self.stopwatch.stage(name):
            yield

    @property
    def total(self) -> Tensor:
        """How many tokens of each row a budget counts. (B,) int64"""
        real = self.real.sum(1)
        return real if self.beyond.of_tag is None else real + self.beyond.of_tag.sum(1)

    def total_of(self, tag: int) -> Tensor:
        """The same, of one modality. (B,) int64"""
        real = (self.real & (self.tagged() == tag)).sum(1)
        return real if self.beyond.of_tag is None else real + self.beyond.of_tag[:, tag]

    @property
    def columns(self) -> int:
        """What no row's total exceeds, known on the host."""
        return self.real.shape[1] + self.beyond.most

    @property
    def keys(self) -> Tensor:
        """(B, H_kv, N, d)"""
        return exactly(self.slots.keys)

    @property
    def values(self) -> Tensor:
        """(B, H_kv, N, d_v)"""
        return exactly(self.slots.values)

    @property
    def valid(self) -> Tensor:
        """(B, H_kv, N) bool"""
        return self.slots.valid

    @property
    def position(self) -> Tensor:
        """The rotary position of each slot. (B, H_kv, N) int64"""
        return self.of_columns(self.positions)

    @property
    def tag(self) -> Tensor:
        """The modality of each slot. (B, H_kv, N) int64; raises SignalError where nobody told"""
        return self.of_columns(self.tagged())

    def tagged(self) -> Tensor:
        """The modality of each column. (B, L) int64; raises SignalError where nobody told"""
        if self.tags is None:
            raise SignalError("the cache was not told which tokens are pictures, clips or sound; call cache.tag(tags) before "
                              "the prompt, or attach the plan to a model whose config names its placeholder tokens")
        return self.tags

    def states(self) -> Tensor:
        """Hidden states that entered the attention layer (B, Q, D); raises SignalError where they were not read."""
        if self.hidden is None:
            raise SignalError("there are no hidden states here; say needs = ('hidden',) in the plan's class, and attach the "
                              "plan to the model (a cache alone cannot see them)")
        return self.hidden

    def of_columns(self, x: Tensor) -> Tensor:
        """What is known of columns, by slot. (B, L) -> (B, H_kv, N)"""
        return x[:, None].expand(-1, self.slots.column.shape[1], -1).gather(2, self.slots.column.long())

    @property
    def asking(self) -> Tensor:
        """Which of the call's own queries are no padding. (B, Q) bool"""
        return self.real[:, self.sight.start:self.sight.start + self.queries.shape[3]]

    def last_queries(self, n: int) -> tuple[Tensor, Tensor]:
        """The last n queries that are no padding. -> rows (B, n) int64, and which of them there are (B, n) bool"""
        rows = self.asking.long().argsort(dim=1, stable=True)[:, -n:]
        return rows, self.asking.gather(1, rows)

    def probabilities(self, rows: Tensor) -> Tensor:
        """Attention that some queries pay each slot, as the layer itself computes it. (B, q) -> (B, H_kv, G, q, N) float32"""
        index = rows[:, None, None, :, None].expand(-1, *self.queries.shape[1:3], -1, self.queries.shape[-1])
        return weights(self.queries.gather(3, index), self.slots, self.sight.seen(self.slots, rows), self.scaling,
                       self.softcap)


def weights(queries: Tensor, slots: Slots, seen: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
    """Softmax over slots with their log-mass. queries (B, H_kv, G, q, d), seen (B, H_kv, q, N) -> (B, H_kv, G, q, N) float32

    A query that sees nothing (padding) spreads evenly, as under an additive mask.
    """
    logits = (queries.flatten(2, 3) @ exactly(slots.keys).transpose(2, 3)).unflatten(2, queries.shape[2:4]).float() * scaling
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    if slots.bias is not None:
        logits = logits + slots.bias[:, :, None, None]
    return logits.masked_fill(~seen[:, :, None], torch.finfo(torch.float32).min).softmax(-1)
