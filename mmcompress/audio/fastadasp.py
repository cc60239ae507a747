"""FastAdaSP: in the language model, neighbouring audio tokens of like keys become one (Lu et al., EMNLP 2024 industry)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budget import check_keep, keep_count
from ..layers.base import LayerReducer, Positions, Signal, Step, check_layer, check_positions
from ..ops.ranking import topk_in_order
from ..tokens import Layout, Reduction, Tokens

Schedule = Literal["single", "constant", "decay"]
Weights = Literal["attention", "mean"]
SMALLEST = 1e-20        # attention that counts as none: tokens of which all received none are averaged


@dataclass(frozen=True)
class FastAdaSP(LayerReducer):
    """Join the most similar pairs of neighbours of every recording; runs of joined pairs become one token, their mean.

    layer      K, counted from 0: the first decoder layer that no longer sees the joined tokens
    keep       share of a recording's tokens that reach a step which are left (the paper's r is 1 - keep), or with one step a
               count
    schedule   "single": one step at K; "constant": a step at every layer from K on, each keeps `keep`; "decay": what a step
               takes falls linearly, r_i = r (1 - (i - K) / (last + 1 - K)). The paper's single steps are for tasks about the
               whole (emotion, questions), its schedules for those about every word (recognition, translation)
    last       the last layer of a schedule; None: the model's last
    weights    "attention": a mean weighted by the attention each token receives, as published; "mean": plain
    positions  a joined token keeps the rotary position of the one it stands for and text keeps its own ("original"), or
               positions close up ("closed")

    Pairs are ranked by the cosine of their rotated keys in layer K-1, heads concatenated; attention received there is that of
    all the prompt's tokens, summed over heads, as the authors' code has both. Where labels are given, tokens of answers are
    not counted. Neither carries a gradient; the mean's features do. A joined token stands for its member that weighs most, of
    equals the first: that is what it mostly is, and nearly where later layers should look for it.

    What differs from the code: it merges half a layer earlier, between attention and MLP of layer K-1, so its last step, which
    saves one MLP, has no counterpart here; its slice holds the token in front of the recording too; it removes floor(N r)
    tokens, here floor(N keep) are left; it reads one recording of one unpadded prompt with eager attention; and its joined
    tokens move to the right, up to the text behind them, and so does the text in front, in all later layers. Pictures and
    clips of a call are left alone. Choosing K by transfer entropy is not in the code, nor here.
    """

    layer: int = 2
    keep: float | int = 0.5
    schedule: Schedule = "single"
    last: int | None = None
    weights: Weights = "attention"
    positions: Positions = "original"

    modalities: ClassVar[tuple[str, ...]] = ("audio",)

    def __post_init__(self) -> None:
        check_layer("FastAdaSP", self.layer)
        check_keep(self.keep)
        check_positions(self.positions)
        if self.schedule not in ("single", "constant", "decay"):
            raise ValueError(f"schedule={self.schedule!r}: 'single', 'constant' or 'decay'")
        if self.weights not in ("attention", "mean"):
            raise ValueError(f"weights={self.weights!r}: 'attention' (as published) or 'mean'")
        if self.schedule == "single" and self.last is not None:
            raise ValueError(f"last={self.last!r}: where a schedule ends; schedule='single' has one step")
        if self.schedule != "single" and isinstance(self.keep, int):
            raise ValueError(f"keep={self.keep}: each step of a schedule keeps a share of what reaches it; pass a float")
        if self.last is not None and (isinstance(self.last, bool) or not isinstance(self.last, int) or self.last < self.layer):
            raise ValueError(f"last={self.last!r}: the last layer of a schedule, {self.layer} (its first) or more")

    def within(self, depth: int) -> FastAdaSP:
        return self if self.schedule == "single" or self.last is not None else replace(self, last=max(depth - 1, self.layer))

    def steps(self) -> tuple[Step, ...]:
        if self.schedule == "single":
            signals: tuple[Signal, ...] = ("keys", "received") if self.weights == "attention" else ("keys",)
            return (Step(self.layer, self, reads=self.layer - 1, positions=self.positions, signals=signals),)
        if self.last is None:
            raise ValueError(f"schedule={self.schedule!r} goes to the model's last layer: pass last=..., or ask "
                             f"within(depth).steps()")
        at = range(self.layer, self.last + 1)
        return tuple(replace(self, layer=i, keep=self.keep_at(i), schedule="single", last=None).steps()[0] for i in at)

    def keep_at(self, layer: int) -> float:
        """Share that a schedule's step at this layer keeps."""
        assert self.last is not None
        falls = (layer - self.layer) / (self.last + 1 - self.layer) if self.schedule == "decay" else 0
        return 1 - (1 - self.keep) * (1 - falls) if falls else self.keep

    def count(self, layout: Layout) -> int:
        """Tokens left of a recording of which this many reach the step."""
        return keep_count(layout.tokens, self.keep)

    def __call__(self, x: Tokens) -> Reduction:
        keys = x.layer_keys().flatten(2)                                                    # (B, N, H_kv d)
        weight = x.received_attention() if self.weights == "attention" else torch.ones_like(keys[..., 0], dtype=torch.float32)
        return join_neighbours(x.features, likeness(keys), weight, self.count(x.layout))


def likeness(keys: Tensor) -> Tensor:
    """Cosine of each token's key and the next one's. keys (B, N, D) -> (B, N - 1) float32"""
    keys = keys.float()
    return F.cosine_similarity(keys[:, :-1], keys[:, 1:], dim=2)


def join_neighbours(features: Tensor, similarity: Tensor, weight: Tensor, k: int) -> Reduction:
    """Join the N - k most similar pairs of neighbours, of equals the earlier; each run becomes its weighted mean.

    features (B, N, D), similarity (B, N - 1), weight (B, N) float32, not negative. Every joined pair leaves one token less,
    so k are left whatever the data. Sums are float32; a token that joins none is untouched.
    """
    batch, n, width = features.shape
    pairs = topk_in_order(similarity, n - k)
    joined = torch.zeros(batch, n - 1, dtype=torch.int64, device=features.device).scatter(1, pairs, 1)
    source = F.pad((1 - joined).cumsum(1), (1, 0))                                          # (B, N)
    weight = weight.clamp_min(SMALLEST)
    total = weight.new_zeros(batch, k).scatter_add(1, source, weight)
    share = weight / total.gather(1, source)                                                # exactly 1 where it is alone
    tokens = weight.new_zeros(batch, k, width).scatter_add(
        1, source[..., None].expand(-1, -1, width), features.float() * share[..., None])
    most = weight.new_zeros(batch, k).scatter_reduce(1, source, weight, "amax")
    place = torch.arange(n, device=features.device)
    standing = torch.where(weight == most.gather(1, source), place, n)
    index = torch.full_like(standing[:, :k], n).scatter_reduce(1, source, standing, "amin")
    mass = weight.new_zeros(batch, k).scatter_add(1, source, torch.ones_like(weight))
    return Reduction(tokens=tokens.to(features.dtype), index=index, source=source, mass=mass)
