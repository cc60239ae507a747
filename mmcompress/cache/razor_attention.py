"""RazorAttention (Tang et al., ICLR 2025, arXiv 2407.15891): retrieval heads stay whole, the others keep what is near.

The paper's: all but the retrieval heads keep four sinks, the last max(4000, N / 5) tokens and one compensation token, the mean
of the dropped keys and of their values, counted as often as it stands for: a slot with log-mass. Retrieval heads are found once
a model by a probe (`find_retrieval_heads`). As in the authors' code the mean is over rotated keys.

Heads of one layer lie in one tensor as long as its longest head, so memory is saved in layers without a retrieval head alone;
in the others fewer slots are read into the softmax, and a ragged store has to follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    def scores(self, x: CacheView) -> Tensor:
        return x.slots.column.float()

    def evict(self, x: CacheView, scores: Tensor) -> Kept:
        kept = super().evict(x, scores)
        whole = [head for layer, head in self.retrieval if layer == x.layer]
        if not whole:
            return kept
        mask = kept.mask.clone()
        mask[:, whole] = x.valid[:, whole]
        return Kept(mask, x.slots.count)

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
