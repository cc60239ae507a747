"""A-ToMe, adjacent token merging (Li, Wu, Li, Liu 2023, arXiv 2306.16009): inside the encoder, which gets faster itself.

The paper's: in several of the encoder's layers neighbouring states of similar attention keys are averaged, in a fixed ratio,
most alike first. It trains with the merging, and its authors published no code. A public reading for Whisper without training
(token-merging-multilingual-asr, Apache-2.0): keys averaged over heads, pairs greedily, the same ratio at every merging layer.
Ours: exact counts, known before the data; batches; averages by size; merging behind a layer, not in front of its FFN.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SignalError
from ..ops.ranking import mask_to_index, ranks
from ..tokens import Reduction, Tokens
from .base import AudioReducer

Pairing = Literal["even_odd", "greedy"]
PAIRINGS = ("even_odd", "greedy")
FEWEST = 8                      # merging layers of an encoder that has more, with `layers=None`


@dataclass(frozen=True)
class ATome(AudioReducer):
    """Average neighbouring encoder states with similar keys, a little after each of several layers. `mass` counts tokens.

    layers         after which of the encoder's layers states merge, from 0 (negative: from the end); None: after every one, of
                   deep encoders after every n-th, eight to fifteen in all
    pairing        "even_odd": states 0 and 1 may merge, 2 and 3, ...; a layer removes at most half.
                   "greedy": any neighbours, most alike first; a layer removes at most a third
    size_weighted  weigh a state by the original states in it; False: the plain mean of two, as published. On clips of read and
                   acted speech Whisper-tiny.en did as well with either
    """

    keep: float | int = 0.5
    layers: tuple[int, ...] | None = None
    pairing: Pairing = "even_odd"
    size_weighted: bool = False

    in_encoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairing not in PAIRINGS:
            raise ValueError(f"pairing={self.pairing!r}: one of {', '.join(PAIRINGS)}")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            if not self.layers or not all(isinstance(i, int) for i in self.layers):
                raise ValueError(f"layers={self.layers}: one encoder layer or several, numbered from 0; None chooses them")

    def after(self, depth: int) -> tuple[int, ...]:
        """The layers of an encoder of `depth` layers after which states merge, ascending."""
        if self.layers is None:
            return tuple(range(0, depth, max(1, depth // FEWEST)))
        if any(not -depth <= i < depth for i in self.layers):
            raise ValueError(f"layers={self.layers}: the audio encoder has {depth} layers, numbered from 0, or from the end "
                             f"by -1")
        return tuple(sorted({i % depth for i in self.layers}))

    def least(self, parts: tuple[int, ...], steps: int) -> int:
        """How few states `steps` merging layers can leave of a window whose parts have these many."""
        return least(sum(parts), steps, len(parts), self.pairing)

    def lengths(self, parts: tuple[int, ...], k: int, steps: int) -> list[tuple[int, ...]]:
        """States of each part of a window before the first merging layer and after each; the last sum to k.

        parts: (states,), or (sound, silence behind it), which share the states at every layer in proportion to their length and
        never merge with each other. The sums depend on the whole window's length alone.
        """
        out = [parts]
        for total in counts(sum(parts), k, steps, len(parts), self.pairing):
            out.append(_shared(parts, out[-1], total, self.pairing))
        return out

    def merge(self, hidden: Tensor, keys: Tensor, size: Tensor, now: Tensor, then: Tensor, width: int
              ) -> tuple[Tensor, Tensor, Tensor]:
        """One merging layer, see `merge_adjacent`."""
        return merge_adjacent(hidden, keys, size, now, then, width, self.pairing, self.size_weighted)

    def reduce_sound(self, x: Tokens, k: int) -> Reduction:
        raise SignalError("ATome merges states inside the audio encoder, and these are tokens that have left it; pass it as "
                          "audio=... to wrap() or compress(), or use MeanPool")


def merge_adjacent(hidden: Tensor, keys: Tensor, size: Tensor, now: Tensor, then: Tensor, width: int,
                   pairing: Pairing = "even_odd", size_weighted: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Average the pairs of neighbouring states whose keys are most alike (cosine of the heads' mean), of equals the earlier.

    hidden (B, N, D), keys (B, N, H, d), size (B, N) float32: original states in each. now, then (B, P) int64: how many states
    the P parts of each row have, one part after the other from the first column on, and shall have; columns behind them are
    padding. -> hidden (B, width, D), size (B, width), and the column that each state went to, (B, N) int64
    """
    n, parts = hidden.shape[1], now.shape[1]
    ends = now.cumsum(1)                                                                             # (B, P)
    column = torch.arange(n, device=hidden.device)
    part = (column[:, None] >= ends[:, None]).sum(2)                                                 # (B, N): P is padding
    key = keys.detach().float().mean(2)
    likeness = F.pad(F.cosine_similarity(key[:, :-1], key[:, 1:], dim=-1), (0, 1))                   # of i and i + 1
    allowed = F.pad((part[:, 1:] == part[:, :-1]) & (part[:, :-1] < parts), (0, 1))
    if pairing == "even_odd":
        allowed &= (column - F.pad(ends, (1, 0)).gather(1, part)) % 2 == 0
    else:
        allowed &= greedy_pairs(likeness.masked_fill(~allowed, -torch.inf))
    chosen = torch.zeros_like(allowed)
    for i in range(parts):
        here = allowed & (part == i)
        chosen |= here & (ranks(likeness.masked_fill(~here, -torch.inf)) < (now - then)[:, i:i + 1])
    stays = ~F.pad(chosen[:, :-1], (1, 0))
    first = mask_to_index(stays, width).clamp_max(n - 1)                                             # (B, width)
    second = (first + 1).clamp_max(n - 1)
    one, two = size.gather(1, first), size.gather(1, second) * chosen.gather(1, first)
    share = two / (one + two) if size_weighted else 0.5 * (two > 0)
    pick = lambda at: hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[2])).float()  # noqa: E731
    merged = torch.lerp(pick(first), pick(second), share[..., None].float()).to(hidden.dtype)
    return merged, one + two, (stays.cumsum(1) - 1).clamp_max(width - 1)


def greedy_pairs(likeness: Tensor) -> Tensor:
    """Which pairs (i, i + 1) are taken if the most alike goes first and none may share a state. (B, M) -> (B, M) bool

    Without a loop: from each local maximum down, every second pair is taken; a local minimum only if neither neighbour is. So
    at least a third of the states can go.
    """
    place = torch.arange(likeness.shape[1], device=likeness.device)
    higher_left = F.pad(likeness[:, :-1] >= likeness[:, 1:], (1, 0))        # of equals the earlier is taken first
    higher_right = F.pad(likeness[:, 1:] > likeness[:, :-1], (0, 1))
    peak_left = torch.where(higher_left, 0, place).cummax(1).values
    peak_right = place[-1] - torch.where(higher_right, 0, place[-1] - place).flip(1).cummax(1).values.flip(1)
    taken = torch.where(higher_left, place - peak_left, peak_right - place) % 2 == 0
    free = ~F.pad(taken[:, :-1], (1, 0)) & ~F.pad(taken[:, 1:], (0, 1))
    return torch.where(higher_left & higher_right, free, taken)


def removable(n: int, parts: int, pairing: Pairing) -> int:
    """How many of n states one layer can surely remove, wherever its one or two parts meet."""
    return (n + 1 - parts) // 2 if pairing == "even_odd" else (n + 2 - parts) // 3


def least(n: int, steps: int, parts: int, pairing: Pairing) -> int:
    """What `steps` layers can surely bring n states down to."""
    for _ in range(steps):
        n -= removable(n, parts, pairing)
    return n


@lru_cache(maxsize=4096)
def counts(n: int, k: int, steps: int, parts: int, pairing: Pairing) -> tuple[int, ...]:
    """States after each of `steps` layers that share the way from n to k: every layer leaves (k / n)^(1 / steps)."""
    out, now = [], n
    for step in range(1, steps + 1):
        now = min(now, max(now - removable(now, parts, pairing), round(n * (k / n) ** (step / steps))))
        while least(now, steps - step, parts, pairing) > k:
            now -= 1
        out.append(now)
    return tuple(out)


def _shared(whole: tuple[int, ...], now: tuple[int, ...], total: int, pairing: Pairing) -> tuple[int, ...]:
    """`total` states shared by a window's parts in proportion to their length, as far as one layer reaches."""
    if len(whole) == 1:
        return (total,)
    (sound, tail), low = now, [x - removable(x, 1, pairing) for x in now]
    sound = min(sound, total - low[1], max(low[0], total - tail, round(total * whole[0] / sum(whole))))
    return sound, total - sound


__all__ = ["ATome", "counts", "greedy_pairs", "least", "merge_adjacent", "removable"]
