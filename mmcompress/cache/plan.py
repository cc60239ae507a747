"""What every way of shrinking the cache is: a plan of stages, score -> evict -> fold -> store, over one layer's slots.

Where a plan shares slots between two layers there is a fifth stage, share. A plan without a stage passes on what it is given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..budget import check_keep, keep_count
from ..ops.ranking import mask_to_index, ranks
from .parts import Parts
from .slots import Slots
from .view import TAGS, CacheView

Need = Literal["hidden"]
Keep = float | int | Sequence[float | int] | Mapping[str, float | int]


@dataclass(frozen=True, eq=False)
class Kept:
    """Which slots stay. mask (B, H_kv, N) bool; heads may keep unlike many.

    width  what no head exceeds, known on the host; None: read from the mask, which waits for the device
    """

    mask: Tensor
    width: int | None = None

    def index(self) -> tuple[Tensor, Tensor]:
        """-> (B, H_kv, K) int64 in order, and which of the K there are (B, H_kv, K) bool"""
        n = self.mask.shape[2]
        width = max(1, int(self.mask.sum(-1).max())) if self.width is None else min(self.width, n)
        index = mask_to_index(self.mask.flatten(0, 1), width).unflatten(0, self.mask.shape[:2])
        return index.clamp_max(n - 1), index < n


@dataclass(frozen=True)
class CachePlan(ABC):
    """Base of the built-in methods: a frozen dataclass whose fields are its configuration, and pure functions of tensors.

    A subclass writes `scores`; the budget is here, `evict` may be replaced by a method that divides it otherwise, `fold` by
    one that merges and `store` by one that holds slots in another form (`slots.Stored`). A scorer or a store with parameters is
    a field: an `nn.Module` that the stage calls. Queries, keys, values, positions and modalities are always there
    (`CacheView`); `needs` names what has to be read from the model for it.

    keep    what a layer keeps of all the tokens that the cache has seen, padding not counted: a share, or a count; a sequence
            of one a layer; or a mapping from modality, as {"image": 0.1}, where modalities that are not named stay whole.
            Tokens that a reducer dropped before the language model count as seen: one unit for both
    sinks   so many of a row's first tokens always stay
    recent  so many of its last ones, or that share of the budget. Sinks and recent tokens are paid from the budget, and stay
            where it is smaller than they are
    again   compress after every prompt, not the first alone, to the share of all the tokens so far: for chunked prefill
    every   compress while decoding too, when so many tokens have come since the last time; None: generated tokens all stay
    text_prior  tokens of text come before all others, as where their attention is raised by the highest of another modality's
            (LOOK-M, Wan et al., 2024, arXiv 2406.18139). It orders one budget; a mapping in `keep` gives each modality its own
    """

    keep: Keep = 0.25
    sinks: int = 4
    recent: int | float = 32
    again: bool = False
    every: int | None = None
    text_prior: bool = False

    needs: ClassVar[tuple[Need, ...]] = ()
    accumulates: ClassVar[bool] = False         # reads `x.slots.evidence`, which the cache then gathers call by call
    may_lead: ClassVar[bool] = False            # its `reduce` is of use where its `store` gives way to another plan's
    asks_queries: ClassVar[bool] = False        # judges by a prompt's queries, so cannot judge while decoding

    def __post_init__(self) -> None:
        if isinstance(self.keep, list):
            object.__setattr__(self, "keep", tuple(self.keep))
        _check(self.keep)
        if self.sinks < 0 or isinstance(self.sinks, bool):
            raise ValueError(f"sinks={self.sinks}: how many of the first tokens always stay, 0 or more")
        if self.recent < 0 or (isinstance(self.recent, float) and self.recent >= 1):
            raise ValueError(f"recent={self.recent}: how many of the last tokens always stay (int), or a share of the budget "
                             f"(float in [0, 1))")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every={self.every}: compress after so many generated tokens, 1 or more; None: never")
        if self.every is not None and self.asks_queries:
            raise ValueError(f"{type(self).__name__}(every={self.every}): it judges by the queries of a prompt, and decoding "
                             f"has one query a step; leave every out, or use H2O, StreamingLLM, KNorm or KeyDiff")

    @abstractmethod
    def scores(self, x: CacheView) -> Tensor:
        """What each slot is worth. (B, H_kv, N) float32, higher is kept; of equals the earlier"""

    def evict(self, x: CacheView, scores: Tensor) -> Kept:
        """The best of each head, sinks and recent tokens first."""
        if isinstance(self.keep, Mapping):
            return self._by_modality(x, scores, self.keep)
        if self.text_prior:
            order = -ranks(scores.masked_fill(~x.valid, -torch.inf))
            scores = torch.where(x.tag == 0, order + x.slots.count, order)
        keep = self.at(x.layer, x.depth)
        count = budget(x.total, keep)[:, None, None]
        return Kept(admit(scores, x.valid, self.forced(x.valid, count), count), self.width(x))

    def width(self, x: CacheView) -> int:
        """Slots that no head exceeds after `evict`, known on the host."""
        most = keep_count(x.columns, self.at(x.layer, x.depth))
        return max(most, self.sinks + (self.recent if isinstance(self.recent, int) else int(most * self.recent + 1e-9)))

    def fold(self, x: CacheView, kept: Kept) -> Slots:
        """The slots after eviction; here what goes is gone."""
        return x.slots.take(*kept.index())

    def reduce(self, x: CacheView) -> Slots:
        """Score, evict, fold: the layer's slots, fewer; the same object where the budget holds all of them."""
        if not isinstance(self.keep, Mapping) and self.keeps_all(x):
            return x.slots
        with x.stage("score"):
            scores = self.scores(x)
        with x.stage("select"):
            kept = self.evict(x, scores)
        with x.stage("gather"):
            return self.fold(x, kept)

    def store(self, x: CacheView) -> Slots | Parts:
        """How the slots of a view that has been reduced are held; here as they are, exact."""
        return x.slots

    def share(self, x: CacheView, below: Slots) -> tuple[Slots | Parts, Slots | Parts]:
        """What two layers hold together: the lower one's and this one's. below: the lower one's slots"""
        raise NotImplementedError(f"{type(self).__name__} shares nothing between layers")

    def follows(self, before: Sequence[CachePlan]) -> None:
        """Check what comes before it in a chain; ValueError where it cannot come after that."""
        return

    def partner(self, layer: int, depth: int) -> int | None:
        """The lower layer that a layer shares its slots with; None: it shares nothing."""
        return None

    def __call__(self, x: CacheView) -> Slots | Parts:
        """What a layer holds from now on; `x.slots` itself where nothing changes."""
        new = self.reduce(x)
        with x.stage("store"):
            return self.store(x if new is x.slots else replace(x, slots=new, intact=False))

    def keeps_all(self, x: CacheView) -> bool:
        """Whether every row's budget holds all that is there, as far as the host can know."""
        keep, there = self.at(x.layer, x.depth), x.real.shape[1]
        return keep_count(there + x.beyond.least, keep) >= there

    def at(self, layer: int, depth: int) -> float | int:
        """The budget of one layer."""
        if isinstance(self.keep, (float, int)):
            return self.keep
        assert not isinstance(self.keep, Mapping)
        if len(self.keep) != depth:
            raise ValueError(f"keep has {len(self.keep)} entries, the model {depth} layers; give one for each")
        return self.keep[layer]

    def forced(self, valid: Tensor, count: Tensor) -> Tensor:
        """Sinks and recent tokens. valid (B, H_kv, N) -> (B, H_kv, N) bool"""
        order = valid.long().cumsum(-1)                                                             # 1, 2, ... along the valid
        total = order[..., -1:]
        recent = self.recent if isinstance(self.recent, int) else (count * self.recent + 1e-9).floor().long()
        return valid & ((order <= self.sinks) | (order > total - recent))

    def _by_modality(self, x: CacheView, scores: Tensor, keep: Mapping[str, float | int]) -> Kept:
        of_slot, counts = x.tag, by_modality(x, keep)
        forced = self.forced(x.valid, counts.sum(0))
        mask = torch.zeros_like(x.valid)
        for number, count in enumerate(counts):
            own = x.valid & (of_slot == number)
            mask |= admit(scores, own, forced & own, count)
        return Kept(mask)


def admit(scores: Tensor, valid: Tensor, forced: Tensor, count: Tensor) -> Tensor:
    """The `count` best valid slots of each head, the forced ones first and all of them. -> (B, H_kv, N) bool

    scores (B, H_kv, N), count (B, 1 or H_kv, 1) int64
    """
    best = scores.float().masked_fill(~valid, -torch.inf).masked_fill(forced, torch.inf)
    count = torch.maximum(count, forced.sum(-1, keepdim=True))
    return (ranks(best) < count) & valid


def budget(tokens: Tensor, keep: float | int) -> Tensor:
    """`keep_count` of many numbers of tokens, on their device. (B,) int64 -> (B,) int64"""
    if isinstance(keep, int):
        return tokens.clamp_max(keep)
    return torch.minimum((tokens.double() * keep + 1e-9).floor().long().clamp_min(1), tokens)


def by_modality(x: CacheView, keep: Mapping[str, float | int]) -> Tensor:
    """The budget of each modality, all of it where none is given. (len(TAGS), B, 1, 1) int64"""
    return torch.stack([budget(x.total_of(number), keep.get(name, 1.0)) for number, name in enumerate(TAGS)])[..., None, None]


def _check(keep: Any) -> None:
    if isinstance(keep, Mapping):
        if unknown := sorted(set(keep) - set(TAGS)):
            raise ValueError(f"keep={dict(keep)!r}: no modality {unknown[0]!r}; known: {', '.join(TAGS)}")
        for name, one in keep.items():
            check_keep(one, f"keep[{name!r}]")
    elif isinstance(keep, Sequence) and not isinstance(keep, str):
        for i, one in enumerate(keep):
            check_keep(one, f"keep[{i}]")
    else:
        check_keep(keep)
