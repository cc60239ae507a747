"""Hours of sound in bounded memory: overlapping chunks, each decoded or encoded with its surroundings, which are thrown away.

A chunk is encoded with `context` seconds before and behind it, and only its own frames are kept. What is exact follows from how
far a codec sees (families.reach): DAC's codes and Mimi's are those of the whole recording, because the context is by default as
long as their convolutions and attention windows reach (DAC a few frames; Mimi about 80 s backwards, as its 8 layers attend 250
steps each: pass context=10 to save that). X-Codec, X-Codec 2, NeuCodec (attention over everything) and EnCodec (LSTM) have no
such bound; their codes approach those of the whole with the context, and may differ anywhere, most near the seams.

In decoding, two chunks overlap by `fade` seconds around a seam and are cross-faded linearly there; within the reach (DAC, Mimi,
and X-Codec, whose decoder is convolutional) both say the same and the fade changes nothing.

Memory: one chunk with its contexts, and the codes, 8 bytes each (X-Codec's 8 books: 12 MB an hour). Given a path, no more of
the file than a chunk is ever in memory; given samples, they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..reading import Sound, as_sound, load
from .codec import _tokens, books_for, check_tokens, decoded
from .families import Codec, Reach, codec_of
from .tokens import AudioTokens

CONTEXT = 5.0                           # seconds on both sides, for a codec that sees everything


def tokenize_chunked(model: Any, audio: Any, *, chunk: float = 60.0, context: float | None = None, n_q: int | None = None,
                     kbps: float | None = None, tokens_per_second: float | None = None,
                     sample_rate: int | None = None) -> AudioTokens:
    """The codes of one recording (B = 1), chunk by chunk; other arguments as in `tokenize`.

    audio    the path of a file that mmcompress.audio.load reads, a Sound, or samples
    chunk    seconds whose codes are kept of each encoding, to whole frames
    context  seconds heard before and behind each chunk; None: as far as the codec sees, 5 s where it sees everything
    """
    codec = codec_of(model)
    n_q = books_for(codec.vocab, codec.rate, n_q=n_q, kbps=kbps, tokens_per_second=tokens_per_second)
    step = _frames("chunk", chunk, codec.rate)
    left, right = _contexts(context, codec.encoder_reach(), codec.rate)
    read, parts, first, ended = _reader(audio, sample_rate, codec.sample_rate), [], 0, False
    with torch.no_grad():
        while not ended:
            start = max(0, first - left)
            wanted = (first + step + right - start) * codec.hop
            samples = read(start * codec.hop, wanted + 1)               # a sample more says whether there is more
            ended = len(samples) <= wanted
            heard = samples[:wanted]
            stop = start + codec.frames(len(heard)) if ended else first + step
            if stop > first:
                parts.append(codec.encode([heard], n_q)[:, :n_q, first - start:stop - start].cpu().long())
            first = stop
    if not first:
        raise ValueError(f"the recording is shorter than a frame of this codec, {codec.hop} samples: pad it")
    codes = torch.cat(parts, 2)
    return _tokens(codec, codes, [codes.shape[2]])


def detokenize_chunked(model: Any, tokens: AudioTokens, *, chunk: float = 60.0, context: float | None = None,
                       fade: float = 0.1) -> Sound:
    """The sound of one recording (B = 1), as `detokenize` gives it. It is in memory whole; `sound_blocks` has it in blocks."""
    rate = codec_of(model).output_rate
    return Sound(torch.cat(list(sound_blocks(model, tokens, chunk=chunk, context=context, fade=fade))), rate, rate, 1)


def sound_blocks(model: Any, tokens: AudioTokens, *, chunk: float = 60.0, context: float | None = None,
                 fade: float = 0.1) -> Iterator[Tensor]:
    """The sound of one recording (B = 1) in consecutive blocks of about `chunk` seconds, (n,) float32 on the CPU.

    context  seconds decoded before and behind what is used; None: as far as the decoder sees, 5 s where it sees everything
    fade     seconds over which neighbouring chunks are cross-faded, half before and half behind the seam; 0: cut there
    """
    codec = codec_of(model)
    check_tokens(codec, tokens)
    if len(tokens) != 1 or not int(tokens.lengths):
        raise ValueError(f"{len(tokens)} recordings of {tokens.lengths.tolist()} frames: pass one at a time, tokens[i]")
    step = _frames("chunk", chunk, codec.rate)
    left, right = _contexts(context, codec.decoder_reach(), codec.rate)
    half = _half(fade, step, codec)                                     # samples of half a fade
    more = half // codec.output_hop + 1                                 # frames that it touches; the last may be cut short
    total, held = int(tokens.lengths), torch.empty(0)
    for first in range(0, total, step):
        start, stop = max(0, first - left - more), min(total, first + step + right + more)
        with torch.no_grad():
            sound = decoded(codec, tokens.codes[:, :, start:stop])[0]
        at = (first - start) * codec.output_hop                         # where the chunk's own sound begins
        end = (min(total, first + step) - start) * codec.output_hop
        own = sound[at - (half if first else 0):]
        end -= at - (half if first else 0)
        if first and half:
            weight = (torch.arange(len(held)) + 0.5) / (2 * half)
            own = torch.cat([torch.lerp(held, own[:2 * half], weight), own[2 * half:]])
        if first + step >= total:
            yield own[:end].clone()
        else:
            yield own[:end - half].clone()
            held = own[end - half:end + half]


def _contexts(context: float | None, reach: Reach, rate: float) -> tuple[int, int]:
    """Frames to hear before and behind a chunk."""
    if context is None and reach is not None:
        return reach
    context = CONTEXT if context is None else context
    if not 0 <= context < float("inf"):
        raise ValueError(f"context={context}: pass seconds, 0 or more")
    frames = -(-round(context * rate * 1e6) // 10 ** 6)
    return frames, 0 if reach is not None and not reach[1] else frames


def _frames(name: str, seconds: float, rate: float) -> int:
    if not (0 < seconds < float("inf")) or round(seconds * rate) < 1:
        raise ValueError(f"{name}={seconds}: pass seconds, at least one frame ({1 / rate:g} s)")
    return round(seconds * rate)


def _half(fade: float, step: int, codec: Codec) -> int:
    most = step * codec.output_hop / codec.output_rate
    if not 0 <= fade <= most:
        raise ValueError(f"fade={fade}: pass seconds in 0 ... {most:g}, the length of a chunk")
    return int(fade * codec.output_rate / 2)


def _reader(audio: Any, sample_rate: int | None, to: int) -> Callable[[int, int], Tensor]:
    """(first, count) -> that many samples at the rate `to`, fewer where the recording ends."""
    if isinstance(audio, (str, os.PathLike)):
        path = audio
        return lambda first, count: load(path, to, start=first / to, end=(first + count) / to).samples
    sound = as_sound(audio, sample_rate=None if isinstance(audio, Sound) else sample_rate, to=to)
    return lambda first, count: sound.samples[first:first + count]
