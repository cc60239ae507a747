"""MiniCache (Liu et al., NeurIPS 2024, arXiv 2405.14366): two neighbouring layers share directions of keys and of values.

The paper's: from mid depth on, layers l-1 (`below`) and l (`above`) are a pair; of each token's two unit vectors the one at
t = 0.6 of the arc from l-1 to l is stored once, with both norms; a layer's vector is the shared direction times its own norm;
tokens whose directions lie far apart, gamma = 0.05, are kept as they are, for both layers. Keys as rotated, and values alike.

The authors published no code: their repository is a web page. A third party's (KVCache-Factory, which wires it to no model): of
each head the ceil(gamma N) tokens of the largest angle are retained; angles have a floor of 1.4e-3, a clamped cosine, below
which tokens are in the order of the noise; a zero vector is at a right angle to all others, so is retained; directions are
normalised once more on the way back. Its function takes keys or values; by its notes values are retained where keys are.

Ours: the angle from |u - v| and |u + v|, precise at both ends, and the arc from its middle, which needs no branch for equal
directions. Directions within 1e-4 of opposite span no plane: the nearer end is taken. A zero vector has no direction, takes
the other layer's at angle 0, and comes back exactly. Everything is computed in float32. The paper's threshold, under which the
data say how many are retained, here lowers a number that is known before the data.

Uncertain: the threshold is from memory, read as the far end of the range from the least distance to the largest; whether the
paper measures by head or over a whole token, and whether its keys and values are retained apart, was not verified.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.kv_quant import BITS
from ..ops.ranking import ranks
from .parts import Parts
from .plan import CachePlan, Keep, Kept
from .slots import Slots, exactly, tensor
from .stores import InBits, in_bits
from .streaming_llm import StreamingLLM
from .view import CacheView

OPPOSITE = 1e-4         # |u + v| below which two unit vectors span no plane that float32 knows


@dataclass(frozen=True, eq=False)
class Spherical:
    """One layer's keys or values (B, H, N, d): directions that another layer holds too, and norms (B, H, N) of its own."""

    direction: Tensor | InBits
    norm: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.direction.shape)

    def restore(self, dtype: torch.dtype) -> Tensor:
        return restore(tensor(self.direction, torch.float32).float(), self.norm.float()).to(dtype)

    def tensors(self) -> Iterator[Tensor]:
        if isinstance(self.direction, Tensor):
            yield self.direction
        else:
            yield from self.direction.tensors()
        yield self.norm

    def each(self, change: Callable[[Tensor], Tensor]) -> Spherical:
        direction = change(self.direction) if isinstance(self.direction, Tensor) else self.direction.each(change)
        return Spherical(direction, change(self.norm))


@dataclass(frozen=True)
class MiniCache(CachePlan):
    """Hold the directions of keys and values once for two layers; nothing is dropped.

    start      the first layer of a pair, or the share of the depth where pairs begin; layers below it stay as they are
    t          where on the arc from the lower layer's direction to the upper one's the shared one lies
    gamma      the share of tokens, those whose keys' directions lie furthest apart, that both layers keep as they are
    threshold  of these only the ones in the last `gamma` of the range of angles (the paper's rule)
    bits       directions are rounded to 8, 4 or 2 bits; None: they are not. The paper's 5.02 is with 4
    """

    keep: Keep = 1.0
    sinks: int = 0
    recent: int | float = 0
    start: int | float = 0.5
    t: float = 0.6
    gamma: float = 0.05
    threshold: bool = False
    bits: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep != 1.0 or not isinstance(self.keep, float):
            raise ValueError(f"keep={self.keep!r}: MiniCache drops nothing; put StreamingLLM before it, "
                             f"cache=[StreamingLLM(keep={self.keep!r}), MiniCache()]")
        for name in ("t", "gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: lies in [0, 1]")
        if isinstance(self.start, bool) or self.start < 0 or (isinstance(self.start, float) and self.start > 1):
            raise ValueError(f"start={self.start}: the first layer of a pair (int), or a share of the depth (float in [0, 1])")
        if self.bits is not None and self.bits not in BITS:
            raise ValueError(f"bits={self.bits}: directions are rounded to 8, 4 or 2 bits; None: they are not")

    def scores(self, x: CacheView) -> Tensor:
        raise AssertionError("MiniCache drops nothing")

    def follows(self, before: Sequence[CachePlan]) -> None:
        for plan in before:
            if not isinstance(plan, StreamingLLM) or not isinstance(plan.keep, (int, float)):
                raise ValueError(f"{type(plan).__name__} keeps other tokens in one layer than in the next, and MiniCache "
                                 f"shares each token's slot between two; put StreamingLLM with one keep for all before it")

    def partner(self, layer: int, depth: int) -> int | None:
        first = self.start if isinstance(self.start, int) else int(depth * self.start + 1e-9)
        return layer - 1 if layer > first and (layer - first) % 2 else None

    def share(self, x: CacheView, below: Slots) -> tuple[Slots | Parts, Slots | Parts]:
        n = x.slots.count
        apart = angle(exactly(below.keys), x.keys)
        most = retained(n, self.gamma)
        count = (x.valid.sum(-1, keepdim=True).double() * self.gamma - 1e-9).ceil().long()
        exact = furthest(apart, x.valid, count, self.gamma if self.threshold else None)
        index, there = Kept(x.valid & ~exact, n if self.threshold else n - most).index()
        low, high = below.take(index, there), x.slots.take(index, there)
        shared: list[tuple[Any, Any]] = []
        for a, b in ((low.keys, high.keys), (low.values, high.values)):
            a, b = exactly(a), exactly(b)
            direction = interpolate(a, b, self.t)
            held = direction if self.bits is None else in_bits(direction, self.bits)
            shared.append((Spherical(held, norms(a).to(a.dtype)), Spherical(held, norms(b).to(b.dtype))))
        (low_keys, high_keys), (low_values, high_values) = shared
        lower: Parts = (replace(low, keys=low_keys, values=low_values),)
        upper: Parts = (replace(high, keys=high_keys, values=high_values),)
        if most:
            kept = Kept(exact, most).index()
            lower, upper = (*lower, below.take(*kept)), (*upper, x.slots.take(*kept))
        return lower, upper


def norms(x: Tensor) -> Tensor:
    """What a layer keeps of its own. (B, H, N, d) -> (B, H, N) float32"""
    return x.float().norm(dim=-1)


def angle(below: Tensor, above: Tensor) -> Tensor:
    """The angle between two layers' vectors, 0 where one is zero. (B, H, N, d) twice -> (B, H, N) float32 in [0, pi]"""
    u, v = _units(below, above)
    return 2 * torch.atan2((v - u).norm(dim=-1), (v + u).norm(dim=-1))


def interpolate(below: Tensor, above: Tensor, t: float = 0.6) -> Tensor:
    """The unit vector at t of the arc from one layer's direction (0) to the other's (1). (B, H, N, d) twice -> (B, H, N, d)

    In the dtype of `below`; zero where both are.
    """
    u, v = _units(below, above)
    along, across = u + v, v - u                                    # at right angles: middle of the arc, and its way
    near, far = along.norm(dim=-1, keepdim=True), across.norm(dim=-1, keepdim=True)
    turn = (2 * t - 1) * torch.atan2(far, near)                     # from the middle, (t - 1/2) of the angle
    arc = turn.cos() * F.normalize(along, dim=-1) + turn.sin() * F.normalize(across, dim=-1)
    return torch.where(near < OPPOSITE, v if t >= 0.5 else u, arc).to(below.dtype)


def restore(direction: Tensor, norm: Tensor) -> Tensor:
    """One layer's vectors again. direction (B, H, N, d), norm (B, H, N) -> (B, H, N, d) in the dtype of `direction`"""
    return (direction.float() * norm[..., None]).to(direction.dtype)


def retained(tokens: int, gamma: float = 0.05) -> int:
    """How many tokens of a head are kept as they are: the share gamma, rounded up."""
    return math.ceil(tokens * gamma - 1e-9)


def furthest(angles: Tensor, valid: Tensor, count: Tensor | int, gamma: float | None = None) -> Tensor:
    """The valid slots of the largest angle, `count` a head or all there are; of equals the earlier. -> (B, H, N) bool

    angles  (B, H, N) float32, in any unit
    valid   (B or 1, H or 1, N) bool
    count   a number, or (B or 1, H or 1, 1) int64 for rows of unlike length
    gamma   None: the code's rule. A number: the paper's besides, only those in the last gamma of the range from the head's
            least angle to its largest, so `count` or fewer; none where all angles are equal
    """
    valid = valid.expand_as(angles)
    distance = angles.float().masked_fill(~valid, -torch.inf)
    chosen = valid & (ranks(distance) < count)
    if gamma is None:
        return chosen
    most = distance.amax(-1, keepdim=True)
    least = angles.float().masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    return chosen & (distance > most - gamma * (most - least))


def _units(below: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """Both directions in float32, a zero vector's being the other's; zero where both are."""
    u, v = F.normalize(below.float(), dim=-1), F.normalize(above.float(), dim=-1)
    there = lambda x: x.norm(dim=-1, keepdim=True) > 0.5  # noqa: E731
    return torch.where(there(u), u, v), torch.where(there(v), v, u)
