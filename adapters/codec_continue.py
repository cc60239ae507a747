"""Sound that a CodecLM goes on with: one column at a time, books in the pattern of the layout, with or without a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmcompress.audio.codec import AudioTokens, arrange
from mmcompress.audio.codec.layouts import streams

if TYPE_CHECKING:
    from .codec_lm import CodecLM

NEVER = 2 ** 32        # frames


@torch.no_grad()
def continue_sound(model: CodecLM, tokens: AudioTokens, frames: int | None, seconds: float | None, input_ids: Tensor | None,
                   attention_mask: Tensor | None, temperature: float, top_k: int | None, generator: torch.Generator | None,
                   use_cache: bool) -> AudioTokens:
    """CodecLM.continue_sound; its docstring says what is what. -> AudioTokens on the model's device"""
    more = _frames(frames, seconds, tokens.rate)
    _check_sampling(temperature, top_k)
    tokens, embeds, mask = _prompt(model, tokens, input_ids, attention_mask)
    each, late = (model.n_q if model.layout == "flatten" else 1), (model.n_q - 1 if model.layout == "delay" else 0)
    steps = more * each + late
    written = arrange(tokens, model.layout, joint=True)
    canvas = written.ids if streams(model.layout) else written.ids[:, None]
    room = int(tokens.lengths.max()) * each + steps - canvas.shape[2]
    canvas = torch.nn.functional.pad(canvas, (0, room), value=written.pad)                              # (B, S, L)
    end, rows, cache = torch.full_like(tokens.lengths, NEVER), torch.arange(len(tokens), device=canvas.device), None
    for i in range(steps):
        out, hidden = model.read(embeds, mask, use_cache=use_cache, past_key_values=cache, logits_to_keep=1)
        at, cache = tokens.lengths * each + i, out.past_key_values if use_cache else None
        for stream in range(canvas.shape[1]):
            book = i % each if each > 1 else stream
            frame = at // each - (stream if late else 0)
            code = _draw(model.sound.logits(book, hidden[:, -1]), temperature, top_k, generator)        # (B,)
            if book == 0:
                end = torch.where((code == model.vocab[0]) & (frame < end), frame, end)
            ours = (frame >= tokens.lengths) & (frame < end)                # others are known, or nobody's: pad
            canvas[rows, stream, at] = torch.where(ours, code + sum(model.vocab[:book]), canvas[rows, stream, at])
        if bool((at + 1 >= end * each + late).all()):
            break
        new = model.sound.embed(canvas[rows, :, at])[:, None].to(embeds.dtype)                          # (B, 1, D)
        embeds = new if use_cache else torch.cat([embeds, new], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    final = torch.minimum(end, tokens.lengths + more)
    length = final * each + torch.where(final > 0, late, 0)
    return replace(written, ids=canvas if streams(model.layout) else canvas[:, 0], lengths=length).restore()


def _prompt(model: CodecLM, tokens: AudioTokens, input_ids: Tensor | None, mask: Tensor | None
            ) -> tuple[AudioTokens, Tensor, Tensor]:
    """Tokens on the device, inputs_embeds and their mask; rows end with their recording."""
    if not len(tokens):
        raise ValueError("no recordings to go on with: pass at least one; one without frames begins from nothing")
    if input_ids is None:
        prompt = model.expand([[model.audio_token_id]] * len(tokens), tokens, ended=False, side="left")
        input_ids, mask = prompt["input_ids"], prompt["attention_mask"]
    mask = torch.ones_like(input_ids) if mask is None else mask
    here = input_ids == model.audio_token_id
    if len(here) != len(tokens) or not here[:, -1].all() or not mask[:, -1].all():
        raise ValueError(f"{len(here)} rows for {len(tokens)} recordings: each row must end with its own recording; padding on "
                         'the left; expand(rows, tokens, ended=False, side="left") of rows that end with audio_token_id')
    return tokens.to(model.device), model.embed(input_ids, tokens, ended=False), mask


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """logits (B, K) -> classes (B,)"""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _frames(frames: int | None, seconds: float | None, rate: float) -> int:
    if (frames is None) == (seconds is None):
        raise ValueError(f"frames={frames}, seconds={seconds}: pass one of them, the most that is added")
    count = frames if seconds is None else round(seconds * rate)
    if count is None or count < 1:
        raise ValueError(f"frames={frames}, seconds={seconds}: at least one frame ({1 / rate:g} s)")
    return count


def _check_sampling(temperature: float, top_k: int | None) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: 0 for the likeliest code, or above")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: at least 1, or None for all codes")
