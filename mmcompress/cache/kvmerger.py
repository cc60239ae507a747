"""KVMerger (Wang et al., 2024, arXiv 2407.08454): neighbours with similar keys become one slot, weights from a kernel.

No code of the authors was found. The paper's: neighbours join while cos(k_i, k_i+1) >= eps, scanned from the last token; heavy
hitters and recent tokens take no part; a set's pivot p is its most attended token, and with g_i = exp(-||k_p - k_i||^2 / 2s^2)
its key and its value are means by g_i / sum g. From a third party's notes: the first two layers and the last stay unmerged
(say so with a budget a layer, keep=[1.0, 1.0, 0.5, ..., 1.0]); s = sum_i g_i / (sqrt 2 |S|), which is circular, and is taken
once from s = the mean distance to the pivot (their code begins with the root mean square, the pivot counted); a factor |S| on
the values is left out, as there. From memory, unverified:
eps = 0.75, and 12 % heavy hitters and 17 % recent tokens where half is kept, here as shares of the budget.

Ours: sets by KV head, over rotated keys. The number of sets depends on the data, and the budget does not: a pair less is a slot
more, so of the pairs above eps the most similar join until the budget is met (eps rises, head by head), which needs no scan:
runs of joined neighbours are the sets, from whichever end. Where pairs run out, the sets that received the least attention go.
Slots that stand for several tokens count as often in a later merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.ranking import ranks
from .plan import CachePlan, Kept, admit, budget, by_modality
from .scores import accumulated
from .slots import Slots, fold_into
from .view import CacheView


@dataclass(frozen=True, eq=False)
class Sets(Kept):
    """Kept slots, each for its set. pivot (B, H_kv, N) int64: where the pivot of a slot's set is; its own place where alone"""

    pivot: Tensor | None = None


@dataclass(frozen=True)
class KVMerger(CachePlan):
    """Merge neighbours with similar keys; heavy hitters and the last tokens stay as they are.

    eps    cosine that neighbours must have to be merged; what is still too much is dropped. -1.0: merge whatever it takes
    heavy  so many heavy hitters stay unmerged, or that share of the budget
    sigma  width of the kernel: a number, in units of keys; "paper": the rule above, at most 0.71 whatever the keys' scale, so
           that where keys are far apart the pivot alone is left; "distance": the mean distance of a set's others to its pivot
    mass   count a set in attention as often as it has tokens (ours). The paper has no such term, so not by default; with it
           attention over sets of equal keys and kernel weights is what it was, without it a set counts as one token
    """

    sinks: int = 0
    recent: int | float = 0.34
    eps: float = 0.75
    heavy: int | float = 0.24
    sigma: float | Literal["paper", "distance"] = "paper"
    mass: bool = False

    accumulates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.eps <= 1:
            raise ValueError(f"eps={self.eps}: the least cosine of keys that are merged, in [-1, 1]")
        if self.heavy < 0 or isinstance(self.heavy, bool) or (isinstance(self.heavy, float) and self.heavy >= 1):
            raise ValueError(f"heavy={self.heavy}: how many heavy hitters stay unmerged (int), or a share of the budget "
                             f"(float in [0, 1))")
        if self.sigma not in ("paper", "distance") and (isinstance(self.sigma, str) or not self.sigma > 0):
            raise ValueError(f"sigma={self.sigma!r}: the kernel's width, a number above 0, or 'paper' or 'distance'")

    def scores(self, x: CacheView) -> Tensor:
        return accumulated(x)

    def evict(self, x: CacheView, scores: Tensor) -> Kept:
        if isinstance(self.keep, Mapping):
            of_slot, counts = x.tag, by_modality(x, self.keep)
            forced = self.forced(x.valid, counts.sum(0))
            parts = [self._sets(x, scores, x.valid & (of_slot == number), forced, count) for number, count in enumerate(counts)]
            masks, places = zip(*parts)
            return Sets(torch.stack(masks).any(0), None, torch.stack(places).amax(0))
        if self.text_prior:
            text = x.tag == 0
            scores = torch.where(text, scores + scores.masked_fill(text | ~x.valid, 0).amax(-1, keepdim=True), scores)
        keep = self.at(x.layer, x.depth)
        count = budget(x.total, keep)[:, None, None]
        mask, pivot = self._sets(x, scores, x.valid, self.forced(x.valid, count), count)
        return Sets(mask, self.width(x), pivot)

    def fold(self, x: CacheView, kept: Kept) -> Slots:
        assert isinstance(kept, Sets) and kept.pivot is not None
        pivot, mass = kept.pivot.clamp_min(0), x.slots.mass
        stays = (kept.pivot >= 0) & kept.mask.gather(2, pivot)
        target = torch.where(stays, (kept.mask.long().cumsum(-1) - 1).gather(2, pivot), -1)
        weight = kernel(x.keys, kept.pivot, self.sigma) * mass
        index, valid = kept.index()
        new = fold_into(replace(x.slots, bias=weight.log()), index, valid, target)
        if not self.mass:
            return replace(new, bias=None)
        total = torch.zeros_like(mass).scatter_add(2, pivot, mass).gather(2, index)
        return replace(new, bias=total.clamp_min(1e-20).log().masked_fill(~new.valid, 0))

    def _sets(self, x: CacheView, scores: Tensor, own: Tensor, forced: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Sets of some slots, `count` of them a head. own, forced (B, H_kv, N) bool, count (B, 1, 1) int64

        -> which slots stay (B, H_kv, N) bool, and where the pivot of each own slot's set is, -1 for others
        """
        forced = forced & own
        heavy = self.heavy if isinstance(self.heavy, int) else (count * self.heavy + 1e-9).floor().long()
        apart = admit(scores, own, forced, torch.minimum(forced.sum(-1, keepdim=True) + heavy, count))
        free, place = own & ~apart, torch.arange(own.shape[-1], device=own.device)
        before = F.pad(torch.where(x.valid, place, -1).cummax(-1).values, (1, -1), value=-1)         # the slot before, -1: none
        unit = F.normalize(x.keys.float(), dim=-1)
        near = (unit * unit.gather(2, before.clamp_min(0)[..., None].expand_as(unit))).sum(-1)       # (B, H, N)
        pairs = free & (before >= 0) & free.gather(2, before.clamp_min(0)) & (near >= self.eps)
        much = own.sum(-1, keepdim=True) - torch.maximum(count, apart.sum(-1, keepdim=True))
        joined = pairs & (ranks(near.masked_fill(~pairs, -torch.inf)) < much)
        pivot = pivots(scores, own, joined)
        paid = torch.zeros_like(scores).scatter_add(2, pivot.clamp_min(0), scores.masked_fill(~own, 0))
        return admit(paid, own & (pivot == place), apart, count), pivot


def pivots(scores: Tensor, own: Tensor, joined: Tensor) -> Tensor:
    """The most attended slot of each one's set, of equals the earlier. (B, H_kv, N) int64, -1 where not own

    joined (B, H_kv, N) bool: slots that are in one set with the own slot before them
    """
    n = own.shape[-1]
    place = torch.arange(n, device=own.device).expand_as(own)
    run = torch.where(own, (own & ~joined).long().cumsum(-1) - 1, n)                                 # n: none of ours
    most = scores.new_full((*own.shape[:2], n + 1), -torch.inf).scatter_reduce(2, run, scores, "amax").gather(2, run)
    best = torch.where(own & (scores == most), place, n)
    first = place.new_full((*own.shape[:2], n + 1), n).scatter_reduce(2, run, best, "amin").gather(2, run)
    return torch.where(own, first, -1)


def kernel(keys: Tensor, pivot: Tensor, sigma: float | str) -> Tensor:
    """exp(-||k_p - k_i||^2 / 2 sigma^2) of each slot to its pivot. (B, H_kv, N) float32

    keys (B, H_kv, N, d), pivot as in `Sets`, sigma as in `KVMerger`
    """
    keys, own, to = keys.float(), pivot >= 0, pivot.clamp_min(0)
    square = (keys - keys.gather(2, to[..., None].expand_as(keys))).square().sum(-1)
    summed = lambda x: torch.zeros_like(square).scatter_add(2, to, x * own).gather(2, to)  # noqa: E731
    gauss = lambda width: (-square / (2 * width.square()).clamp_min(1e-20)).exp()  # noqa: E731
    if not isinstance(sigma, str):
        return gauss(torch.tensor(float(sigma), device=keys.device))
    size = summed(torch.ones_like(square))
    distance = summed(square.sqrt()) / (size - 1).clamp_min(1)
    return gauss(distance if sigma == "distance" else summed(gauss(distance)) / (2 ** 0.5 * size.clamp_min(1)))
