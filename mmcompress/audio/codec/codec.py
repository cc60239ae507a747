"""Sound to codes and back by any codec of transformers: `tokenize(model, sound, kbps=2)`, `detokenize(model, tokens)`.

What is exact: recordings of a batch get the codes (and the sound) that each gets alone. Convolutions hear padding, and no codec
of transformers masks it, so recordings of one padded length are encoded together and others apart; only a float's last bit may
depend on the batch. Any number of books may be asked for, not only those of a codec's list of bandwidths: residual quantizers
choose book after book, so that the first n books of more are what n give. chunked.py is for hours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reading import Sound, as_sound
from .families import FAMILIES, Codec, codec_of
from .tokens import AudioTokens

__all__ = ["FAMILIES", "books_for", "detokenize", "tokenize"]


def tokenize(model: Any, audio: Any, *, n_q: int | None = None, kbps: float | None = None,
             tokens_per_second: float | None = None, sample_rate: int | None = None, batch_size: int = 8) -> AudioTokens:
    """The codes of one recording or of a list of them, on the CPU.

    model              dac, encodec, mimi, neucodec, xcodec or xcodec2 of transformers, in eval mode; used as it is, where it is
    audio              a Sound, samples (T,), (channels, T) or (T, channels), or a list of these. Channels are mixed to one: a
                       2-D tensor is one recording, a batch is a list
    n_q, kbps or tokens_per_second   at most one: how many books, or the most that fit a nominal rate. None: all
    sample_rate        Hz, of samples that are no Sound. All is resampled to the model's rate
    batch_size         recordings encoded at once, of those that have the same length

    A recording becomes ceil(samples / hop) frames, zeros filling the last one (NeuCodec: floor).

    Raises UnsupportedModelError for another model, AudioError for samples that as_sound refuses, and ValueError for a rate
    below one book, more books than there are, a recording too short for a frame, zero codebooks, or a model in training mode.
    """
    codec = codec_of(model)
    n_q = books_for(codec.vocab, codec.rate, n_q=n_q, kbps=kbps, tokens_per_second=tokens_per_second)
    sounds = [as_sound(one, sample_rate=None if isinstance(one, Sound) else sample_rate, to=codec.sample_rate).samples
              for one in recordings(audio)]
    lengths = [codec.frames(len(sound)) for sound in sounds]
    if min(lengths) < 1:
        raise ValueError(f"recording {lengths.index(0)} is shorter than a frame of this codec, {codec.hop} samples: pad it")
    codes = torch.zeros(len(sounds), n_q, max(lengths), dtype=torch.int64)
    with torch.no_grad():
        for rows in _groups([codec.padded(len(sound)) for sound in sounds], batch_size):
            found = codec.encode([sounds[i] for i in rows], n_q).cpu()
            for row, code in zip(rows, found):
                codes[row, :, :lengths[row]] = code[:n_q, :lengths[row]]
    return _tokens(codec, codes, lengths)


def detokenize(model: Any, tokens: AudioTokens, *, batch_size: int = 8) -> list[Sound]:
    """The sound of each recording, (lengths * hop,) samples at the rate that the model gives (NeuCodec: 24 kHz).

    The tokens may be any prefix of the books. The end is as the codec leaves it: what filled the last frame is there (cut
    `sound.samples[:n]` to the n that went in), and where DAC gives some samples less than whole frames, zeros stand for them.

    Raises ValueError for tokens of another codec, rate or vocabulary, and of a recording without frames.
    """
    codec = codec_of(model)
    check_tokens(codec, tokens)
    lengths = tokens.lengths.tolist()
    if 0 in lengths:
        raise ValueError(f"recording {lengths.index(0)} has no frames: leave it out")
    sounds: list[Tensor] = [torch.empty(0)] * len(tokens)
    with torch.no_grad():
        for rows in _groups(lengths, batch_size):
            for row, sound in zip(rows, decoded(codec, tokens.codes[rows, :, :lengths[rows[0]]])):
                sounds[row] = sound.clone()
    return [Sound(sound, codec.output_rate, codec.output_rate, 1) for sound in sounds]


def books_for(vocab: Sequence[int], rate: float, *, n_q: int | None = None, kbps: float | None = None,
              tokens_per_second: float | None = None) -> int:
    """How many of the books to take: `n_q`, or the most within a nominal rate, or all. Raises ValueError if none fits."""
    asked = {"n_q": n_q, "kbps": kbps, "tokens_per_second": tokens_per_second}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given: pass one of them")
    if n_q is not None:
        if isinstance(n_q, bool) or not isinstance(n_q, int) or not 1 <= n_q <= len(vocab):
            raise ValueError(f"n_q={n_q!r}: pass an int in 1 ... {len(vocab)}, the books of this codec")
        return n_q
    if not given:
        return len(vocab)
    limit = float(asked[given[0]] or 0)
    spent, cost = 0.0, 0.0
    for count, size in enumerate(vocab):
        cost = rate * math.log2(size) / 1000 if kbps is not None else rate
        spent += cost
        if not spent <= limit * (1 + 1e-9):
            if count == 0:
                raise ValueError(f"{given[0]}={limit:g}: one book of this codec takes {cost:g}; pass at least that "
                                 "(layouts.collapse shortens runs of one code)")
            return count
    return len(vocab)


def recordings(audio: Any) -> list[Any]:
    """A list of one or several; a list of numbers is one."""
    if isinstance(audio, (list, tuple)) and audio and not isinstance(audio[0], (int, float)):
        return list(audio)
    if isinstance(audio, (list, tuple)) and not audio:
        raise ValueError("no recordings: pass a Sound, samples, or a list of at least one")
    return [audio]


def check_tokens(codec: Codec, tokens: AudioTokens) -> None:
    """Raises ValueError unless `codec` can decode `tokens`."""
    wanted = {"codec": codec.config.model_type, "rate": codec.rate, "vocab": codec.vocab[:tokens.n_q]}
    for name, value in wanted.items():
        if getattr(tokens, name) != value:
            raise ValueError(f"the tokens have {name}={getattr(tokens, name)!r} and this {type(codec.model).__name__} "
                             f"{name}={value!r}: decode them by the model that made them")


def decoded(codec: Codec, codes: Tensor) -> Tensor:
    """codes (B, n_q, T) -> (B, T * output_hop) float32 on the CPU"""
    device = next(codec.model.parameters()).device
    sound = codec.decode(codes.to(device)).float().cpu()
    length = codes.shape[2] * codec.output_hop
    return torch.nn.functional.pad(sound, (0, max(0, length - sound.shape[1])))[:, :length]


def _groups(keys: Iterable[int], batch_size: int) -> Iterator[list[int]]:
    """Numbers of equal keys, at most `batch_size` together."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least 1")
    rows: dict[int, list[int]] = {}
    for i, key in enumerate(keys):
        rows.setdefault(key, []).append(i)
    for same in rows.values():
        for i in range(0, len(same), batch_size):
            yield same[i:i + batch_size]


def _tokens(codec: Codec, codes: Tensor, lengths: Sequence[int]) -> AudioTokens:
    return AudioTokens(codes, torch.tensor(lengths), codec.rate, codec.vocab[:codes.shape[1]], codec.config.model_type,
                       codec.sample_rate)
