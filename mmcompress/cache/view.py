"""What a method sees of one layer when the cache is compressed, and what attention sees of its slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SignalError
from .slots import Slots

TAGS = ("text", "image", "video", "audio")      # modality tags are numbers into this


@dataclass(frozen=True, eq=False)
class Sight:
    """Which columns the queries of one call may look at.

    mask   what the stock model made for all columns: (B or 1, 1, Q, L or more) bool, or additive and then read as seen or not;
           None where causality says all
    start  the column of the first query
    """

    mask: Tensor | None
    start: int

    def __post_init__(self) -> None:
        if self.mask is not None and (self.mask.ndim != 4 or self.mask.shape[1] != 1):
            raise ValueError(f"an attention mask of shape {tuple(self.mask.shape)}: a compressed cache reads masks of (B, 1, "
                             f"queries, columns), columns counted as if nothing had been dropped")

    def seen(self, slots: Slots, rows: Tensor) -> Tensor:
        """Whether some queries see each slot, the mask of the stock model looked up by column.

        rows (B, q) int64, numbers of queries -> (B, H_kv, q, N) bool
        """
        column = slots.column[:, :, None]                                                           # (B, H, 1, N)
        if self.mask is None:
            return (column <= self.start + rows[:, None, :, None]) & slots.valid[:, :, None]
        self._check(self.mask)
        looks = self._allowed(self.mask.expand(len(rows), -1, -1, -1))
        looks = looks.gather(2, rows[:, None, :, None].expand(-1, 1, -1, looks.shape[-1]))          # (B, 1, q, L)
        column = column.expand(-1, -1, rows.shape[1], -1)
        return looks.expand(-1, column.shape[1], -1, -1).gather(3, column) & slots.valid[:, :, None]

    def real(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Which columns are no padding: those that the call's last query sees. (B, length) bool"""
        if self.mask is None:
            return torch.ones(batch, length, dtype=torch.bool, device=device)
        return self._allowed(self.mask[:, 0, -1, :length]).expand(batch, -1)

    def _check(self, mask: Tensor) -> None:
        queries, columns = mask.shape[2:]
        if columns < self.start + queries:
            raise ValueError(f"an attention mask of {columns} columns for {queries} tokens after {self.start}: a compressed "
                             f"cache counts columns as if nothing had been dropped; pass a mask of {self.start + queries} "
                             f"columns, or a 2-D one")

    @staticmethod
    def _allowed(mask: Tensor) -> Tensor:
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


@dataclass(frozen=True, eq=False)
class CacheView:
    """One layer of the cache after a call, before it is compressed.

    slots     what it holds, the call's own tokens at the end
    queries   (B, H_kv, G, Q, d) the call's own, rotated; G query heads share a key head
    sight     which columns these queries saw
    real      (B, L) bool: which of all columns so far are no padding
    positions (B, L) int64: the rotary position of every column
    tags      (B, L) int64: the modality of every column, see TAGS; None: not told
    hidden    (B, Q, D) what entered the attention layer, for plans that say `needs = ("hidden",)`
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

    @property
    def keys(self) -> Tensor:
        """(B, H_kv, N, d)"""
        return self.slots.keys

    @property
    def values(self) -> Tensor:
        """(B, H_kv, N, d_v)"""
        return self.slots.values

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
        return x[:, None].expand(-1, self.slots.column.shape[1], -1).gather(2, self.slots.column)

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
        return weights(self.queries.gather(3, index), self.slots, self.sight.seen(self.slots, rows), self.scaling)


def weights(queries: Tensor, slots: Slots, seen: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
    """Softmax over slots with their log-mass. queries (B, H_kv, G, q, d), seen (B, H_kv, q, N) -> (B, H_kv, G, q, N) float32

    A query that sees nothing (padding) spreads evenly, as under an additive mask.
    """
    logits = (queries.flatten(2, 3) @ slots.keys.transpose(2, 3)).unflatten(2, queries.shape[2:4]).float() * scaling
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    if slots.bias is not None:
        logits = logits + slots.bias[:, :, None, None]
    return logits.masked_fill(~seen[:, :, None], torch.finfo(torch.float32).min).softmax(-1)
