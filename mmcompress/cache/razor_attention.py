"""RazorAttention (Tang et al., ICLR 2025, arXiv 2407.15891): retrieval heads stay whole, the others keep what is near.

The paper's: all but the retrieval heads keep four sinks, the last max(4000, N / 5) tokens and one compensation token, the mean
of the dropped keys and of their values, counted as often as it stands for: a slot with log-mass. Retrieval heads are found once
a model by a probe (`find_retrieval_heads`). As in the authors' code the mean is over rotated keys.

Heads of unlike length are held in two tensors, so what is dropped is freed. Before another plan of a chain they lie in one, as
long as its longest head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .parts import Parts, split
from .plan import CachePlan, Keep, Kept
from .slots import Slots, fold_into
from .view import CacheView


@dataclass(frozen=True)
class RazorAttention(CachePlan):
    """Keep everything in retrieval heads; elsewhere sinks, the last tokens and one token for all the rest.

    retrieval     (layer, key head) pairs
    keep          the others keep this share of the prompt, sinks counted, and the last `recent` tokens in any case
    compensation  whether what they drop stays as one token, on top of the budget
    """

    keep: Keep = 0.2
    recent: int | float = 4000
    retrieval: tuple[tuple[int, int], ...] = ()
    compensation: bool = True

    may_lead: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.keep, Mapping):
            raise ValueError(f"keep={dict(self.keep)!r}: RazorAttention keeps what is near, whatever it is; pass one share or "
                             f"count")
        object.__setattr__(self, "retrieval", tuple((int(layer), int(head)) for layer, head in self.retrieval))

    def scores(self, x: CacheView) -> Tensor:
        return x.slots.column.float()

    def evict(self, x: CacheView, scores: Tensor) -> Kept:
        kept = super().evict(x, scores)
        if not (whole := self.whole(x)):
            return kept
        mask = kept.mask.clone()
        mask[:, whole] = x.valid[:, whole]
        return Kept(mask, x.slots.count)

    def whole(self, x: CacheView) -> list[int]:
        """The retrieval heads of a layer."""
        return sorted({head for layer, head in self.retrieval if layer == x.layer})

    def fold(self, x: CacheView, kept: Kept) -> Slots:
        if not self.compensation:
            return super().fold(x, kept)
        dropped = x.valid & ~kept.mask
        place = torch.arange(x.slots.count, device=x.keys.device)
        last = torch.where(dropped, place, -1).amax(-1, keepdim=True)                               # (B, H, 1), -1: none
        mask = kept.mask | (place == last)
        index, valid = Kept(mask, None if kept.width is None else kept.width + 1).index()
        slot = mask.long().cumsum(-1) - 1                                                           # where a kept one goes
        target = torch.where(dropped, slot.gather(-1, last.clamp_min(0)), torch.where(mask, slot, -1))
        return fold_into(x.slots, index, valid, target)

    def store(self, x: CacheView) -> Slots | Parts:
        whole, heads = self.whole(x), range(x.slots.column.shape[1])
        near = tuple(head for head in heads if head not in whole)
        if not whole or not near:
            return x.slots
        return split(x.slots, ((tuple(whole), x.slots.count), (near, min(self.width(x) + self.compensation, x.slots.count))))
