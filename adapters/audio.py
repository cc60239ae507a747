"""What families that hear share: an encoder of Whisper's shape, two mel frames a state, some states a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmcompress.errors import UnsupportedModelError
from mmcompress.layout import AudioLayout
from mmcompress.tokens import ImageLayout

from .base import Adapter, Encoded
from .merging import Merging, Window, plan_merging

MEL_RATE = 100          # frames a second of the log-mel spectrograms that all these families read


class AudioAdapter(Adapter):
    """A language model that hears and does not see."""

    encoder_inputs = ()
    states_per_token: int           # encoder states that become one token
    mask_input: str | None = None   # the input that says which mel frames are sound
    takes_features = False          # audio families' forward has no mm_encoder_outputs

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return MEL_RATE / (2 * self.states_per_token)

    def layouts(self, inputs: Mapping[str, Any]) -> list[ImageLayout]:
        return []

    def frames(self, inputs: Mapping[str, Any]) -> list[int]:
        """Mel frames that are sound, of each row of `input_features`."""
        if self.mask_input is None:
            return [inputs["input_features"].shape[-1]] * len(inputs["input_features"])
        if inputs.get(self.mask_input) is None:
            raise ValueError(f"input_features without {self.mask_input}: pass everything the processor returned (some need "
                             f"return_attention_mask=True)")
        return inputs[self.mask_input].sum(-1).tolist()

    def tokens(self, frames: int) -> int:
        """Tokens that the encoder makes of this many mel frames."""
        return pooled_tokens(frames)

    def audio_layouts(self, inputs: Mapping[str, Any], ids: Tensor) -> list[AudioLayout]:
        return [AudioLayout(self.tokens(n), self.rate) for n in self.frames(inputs)]

    def plan_merging(self, merging: Any, inputs: Mapping[str, Any], layouts: Sequence[AudioLayout]) -> Merging | None:
        """What a reducer is to do inside the encoder; None if there is none, or nothing for it to do."""
        windows = [Window(self.tokens(n), ((n - 1) // 2 + 1,)) for n in self.frames(inputs)]
        return plan_merging(merging, self.tower("audio"), windows, layouts, self.states_per_token)

    def merged(self, plan: Merging, features: Tensor, inputs: Mapping[str, Any], layouts: Sequence[AudioLayout]) -> Encoded:
        """What an encoder left that merged by this plan. features (windows, ., D), projected"""
        reductions = plan.reductions(features)
        return Encoded([r.tokens[0] for r in reductions], {}, mel=partial(self.mel, inputs, layouts), reductions=reductions)

    def mel(self, inputs: Mapping[str, Any], layouts: Sequence[AudioLayout]) -> list[Tensor]:
        """Log-mel spectrogram by token of each recording. -> (N_i, bins) float32"""
        per_window = [mel_by_token(x, self.tokens(n), 2 * self.states_per_token)
                      for x, n in zip(inputs["input_features"], self.frames(inputs))]
        return regroup(torch.cat(per_window), layouts)


def pooled_tokens(frames: int) -> int:
    """Tokens of this many mel frames where convolutions halve them and an average pool halves the states."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def mel_by_token(mel: Tensor, tokens: int, frames: int) -> Tensor:
    """Mean log-mel spectrum of the `frames` frames of each token. mel (bins, T) -> (tokens, bins) float32

    The last token may have fewer frames.
    """
    mel = mel.float()[:, :tokens * frames]
    missing = tokens * frames - mel.shape[1]
    if missing > 0:
        mel = torch.cat([mel, mel[:, -1:].expand(-1, missing)], 1)
    return mel.unflatten(1, (tokens, frames)).mean(2).T


def regroup(flat: Tensor, layouts: Sequence[AudioLayout]) -> list[Tensor]:
    """Rows of all recordings end to end, cut into recordings. (sum N_i, ...) -> (N_i, ...) each"""
    if len(flat) != (wanted := sum(x.tokens for x in layouts)):
        raise ValueError(f"input_features make {len(flat)} tokens where the prompts have {wanted} audio placeholders; pass "
                         f"input_ids and input_features of one processor call")
    return list(flat.split([x.tokens for x in layouts]))


def windows_of_runs(ids: Tensor, token_id: int, windows: Sequence[int], rate: float) -> list[AudioLayout]:
    """Recordings whose tokens come from one window or several: those that fill a run of placeholders are one recording.

    ids (B, L) on the host; windows: tokens of each window, in order. Recordings between which no text stands count as one.
    """
    left, out = list(windows), []
    for run in runs_of(ids, token_id):
        length = 0
        while left and length < run:
            length += left.pop(0)
        if length != run:
            raise ValueError(f"a run of {run} audio placeholders is no whole number of windows ({list(windows)} tokens each); "
                             f"pass input_ids and input_features of one processor call")
        out.append(AudioLayout(run, rate))
    if left:
        raise ValueError(f"input_features hold {len(left)} windows of sound more than the prompts have placeholders for; pass "
                         f"input_ids and input_features of one processor call")
    return out


def runs_of(ids: Tensor, token_id: int) -> list[int]:
    """Lengths of the runs of a token, row by row. ids (B, L)"""
    out = []
    for row in ids:
        there = torch.nn.functional.pad((row == token_id).int(), (1, 1))
        edges = there.diff().nonzero()[:, 0]
        out += (edges[1::2] - edges[::2]).tolist()
    return out


def refuse_merging(merging: Any, model: Any) -> None:
    if merging is not None:
        raise UnsupportedModelError(f"{type(merging).__name__} works inside audio encoders of Whisper's shape, and that of "
                                    f"{type(model).__name__} is another; use a reducer that works behind it, such as "
                                    f"SpectralPool")


__all__ = ["AudioAdapter", "Encoded", "mel_by_token", "pooled_tokens", "refuse_merging", "regroup", "windows_of_runs"]
