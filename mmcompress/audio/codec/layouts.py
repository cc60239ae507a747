"""Codes as sequences for language models, and back without loss: `sequence = arrange(tokens, "delay")`, `sequence.restore()`.

    flatten        frame by frame, each frame's books from coarse to fine: L = T * n_q (also called interleaved)
    coarse_first   all of book 0, then all of book 1 ...: L = T * n_q (AudioLM 2209.03143 puts coarse stages before fine ones)
    parallel       a stream per book, all books of a frame at one step: L = T (VALL-E's later books; MusicGen's "parallel")
    delay          a stream per book, book k being k steps late: L = T + n_q - 1 (MusicGen 2306.05284), pads beside

The first two give ids (B, L) and by default one joint vocabulary, in which book k's codes begin where book k - 1's end. The
others give ids (B, n_q, L), whose books usually have an embedding each, so that by default codes stay as they are. The id after
the last code is the pad: behind a recording's length, and in delay's corners. Start and end tokens are left to the model.

A language model that has written ids of its own: `replace(sequence, ids=written, lengths=steps).restore()`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from .tokens import AudioTokens

Order = Literal["flatten", "coarse_first", "parallel", "delay"]
ORDERS: tuple[str, ...] = get_args(Order)


@dataclass(frozen=True, eq=False)
class Sequence:
    """What a language model reads of B recordings, and what it takes to read it back.

    ids      (B, L) or, if the order has a stream per book, (B, n_q, L) int64
    lengths  (B,) int64: steps of L that are each recording's
    joint    one vocabulary for all books
    The others are those of the AudioTokens.
    """

    ids: Tensor
    lengths: Tensor
    order: Order
    joint: bool
    rate: float
    vocab: tuple[int, ...]
    codec: str
    sample_rate: int

    @property
    def n_q(self) -> int:
        return len(self.vocab)

    @property
    def pad(self) -> int:
        """The id that is no code."""
        return sum(self.vocab) if self.joint else max(self.vocab)

    @property
    def vocabulary(self) -> int:
        """Ids that there are, the pad included: rows of an embedding."""
        return self.pad + 1

    @property
    def mask(self) -> Tensor:
        """Which steps are a recording's. (B, L) bool"""
        return torch.arange(self.ids.shape[-1], device=self.ids.device) < self.lengths[:, None]

    def restore(self) -> AudioTokens:
        """The codes, exactly; where ids lie that the order ignores (delay's corners), they are not looked at.

        Raises ValueError for a length that is no whole number of frames and an id that is no code of the book whose turn it is.
        """
        _check(self)
        frames = _frames_of(self.order, self.lengths, self.n_q)
        most = int(frames.max()) if len(frames) else 0
        place, real = _places(self.order, self.n_q, frames, most)
        ids = self.ids if streams(self.order) else self.ids[:, None].expand(-1, self.n_q, -1)
        ids = torch.nn.functional.pad(ids, (0, 1))                              # so that there is one to gather from
        codes = ids.gather(2, place.where(real, 0)) - _offsets(self.vocab, self.joint, self.ids.device)
        return AudioTokens(codes, frames, self.rate, self.vocab, self.codec, self.sample_rate)


def arrange(tokens: AudioTokens, order: Order = "flatten", joint: bool | None = None) -> Sequence:
    """Codes as a sequence. `joint`: one vocabulary for all books; None: in flatten and coarse_first."""
    if order not in ORDERS:
        raise ValueError(f"order={order!r}: one of {', '.join(ORDERS)}")
    joint = not streams(order) if joint is None else joint
    n_q, lengths = tokens.n_q, _lengths_of(order, tokens.lengths, tokens.n_q)
    steps = int(lengths.max()) if len(lengths) else 0
    empty = Sequence(tokens.codes, lengths, order, joint, tokens.rate, tokens.vocab, tokens.codec, tokens.sample_rate)
    place, real = _places(order, n_q, tokens.lengths, tokens.codes.shape[2])
    codes = tokens.codes + _offsets(tokens.vocab, joint, tokens.codes.device)
    place = place.where(real, steps)                                            # what is not real goes behind the end, and off
    if not streams(order):
        codes, place = codes.flatten(1)[:, None], place.flatten(1)[:, None]
    ids = codes.new_full((*codes.shape[:2], steps + 1), empty.pad).scatter(2, place, codes)[..., :steps]
    return replace(empty, ids=ids if streams(order) else ids[:, 0])


def streams(order: Order) -> bool:
    """Whether an order has a stream per book."""
    return order in ("parallel", "delay")


def _places(order: Order, n_q: int, frames: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Where the code of a book at a time stands in its sequence, and whether it is real. Both (B, n_q, most)"""
    t = torch.arange(most, device=frames.device)
    book = torch.arange(n_q, device=frames.device)[:, None]
    place = {"flatten": lambda: t * n_q + book, "parallel": lambda: t + 0 * book, "delay": lambda: t + book,
             "coarse_first": lambda: frames[:, None, None] * book + t}[order]()
    shape = (len(frames), n_q, most)
    return place.expand(shape), (t < frames[:, None, None]).expand(shape)


def _lengths_of(order: Order, frames: Tensor, n_q: int) -> Tensor:
    if order == "delay":
        return torch.where(frames > 0, frames + n_q - 1, 0)
    return frames if order == "parallel" else frames * n_q


def _frames_of(order: Order, lengths: Tensor, n_q: int) -> Tensor:
    frames = {"delay": lambda: torch.where(lengths > 0, lengths - n_q + 1, 0), "parallel": lambda: lengths}.get(
        order, lambda: lengths // n_q)()
    wrong = (_lengths_of(order, frames, n_q) != lengths) | (frames < 0)
    if wrong.any():
        b = int(wrong.nonzero()[0])
        way_out = (f"pass at least {n_q}, or 0" if order == "delay" else f"cut it to {int(frames[b]) * n_q}")
        raise ValueError(f"recording {b} has {int(lengths[b])} steps, no whole frames of {n_q} books in the order {order}: "
                         f"{way_out}")
    return frames


def _offsets(vocab: tuple[int, ...], joint: bool, device: torch.device) -> Tensor:
    """What is added to each book's codes. (n_q, 1) int64"""
    size = torch.tensor(vocab, device=device)
    return (size.cumsum(0) - size if joint else torch.zeros_like(size))[:, None]


def _check(x: Sequence) -> None:
    shape = (*x.lengths.shape, x.n_q) if streams(x.order) else tuple(x.lengths.shape)
    if x.ids.dtype != torch.int64 or x.lengths.dtype != torch.int64 or x.lengths.ndim != 1 or tuple(x.ids.shape[:-1]) != shape:
        wanted = "(B, n_q, L)" if streams(x.order) else "(B, L)"
        raise ValueError(f"ids {tuple(x.ids.shape)} {x.ids.dtype} and lengths {tuple(x.lengths.shape)} {x.lengths.dtype}: "
                         f"the order {x.order} of {x.n_q} books has ids {wanted} and lengths (B,), int64")
    if len(x.lengths) and not 0 <= int(x.lengths.min()) <= int(x.lengths.max()) <= x.ids.shape[-1]:
        raise ValueError(f"lengths={x.lengths.tolist()}: steps lie in 0 ... {x.ids.shape[-1]}")
