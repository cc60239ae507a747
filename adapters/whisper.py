"""Whisper: the decoder attends to the states of a 30 s window, 50 a second; there is no prompt to shorten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mmcompress.errors import UnsupportedModelError
from mmcompress.layout import AudioLayout

from .audio import AudioAdapter, Encoded, mel_by_token
from .merging import Merging, Window, plan_merging


class WhisperAdapter(AudioAdapter):
    """`WhisperForConditionalGeneration`. What is reduced are the encoder's states, which every decoder layer reads.

    Every row of a batch keeps equally many states, since the cross-attention takes no mask. Where a recording ends is read from
    its spectrogram: the feature extractor pads with digital silence, whose mel bins are all alike, as no sound's are.
    """

    audio_inputs = ("input_features",)
    states_per_token = 1
    seq2seq = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if not hasattr(getattr(model, "model", None), "encoder") or not hasattr(model.model, "decoder"):
            raise UnsupportedModelError(f"{type(model).__name__} has no decoder that attends to its encoder; pass a "
                                        f"WhisperForConditionalGeneration")

    @property
    def depth(self) -> int:
        return self.config.decoder_layers

    @property
    def encoder(self) -> Any:
        return self.model.model.encoder

    def tower(self, modality: str) -> Any:
        return self.encoder

    def tokens(self, frames: int) -> int:
        return (frames - 1) // 2 + 1

    def audio_layouts(self, inputs: Mapping[str, Any], ids: Tensor | None = None) -> list[AudioLayout]:
        """One window a row. Waits for the spectrogram, to see where each recording ends."""
        mel = inputs["input_features"]
        return [AudioLayout(self.tokens(mel.shape[-1]), self.rate, self.tokens(n) if n else 0) for n in sounding(mel).tolist()]

    def encode_audio(self, inputs: Mapping[str, Any], layouts: Sequence[AudioLayout], merging: Any = None) -> Encoded:
        with (plan := self.plan_merging(merging, inputs, layouts)) or nullcontext():
            out = self.encoder(inputs["input_features"], return_dict=True)
        return self.encoded(inputs["input_features"], out.last_hidden_state, plan)

    def plan_merging(self, merging: Any, inputs: Mapping[str, Any], layouts: Sequence[AudioLayout]) -> Merging | None:
        """As for other families, the silence behind a recording apart, and all rows to the same number of states."""
        return plan_merging(merging, self.encoder, [Window(x.tokens, (x.sound, x.tail)) for x in layouts], layouts, 1)

    def encoded(self, mel: Tensor, states: Tensor, plan: Merging | None = None) -> Encoded:
        """Encoder states (B, N, D) of spectrograms (B, bins, T), one recording a row; plan: how they were merged."""
        tokens = self.tokens(mel.shape[-1])
        return Encoded(list(states), {}, mel=lambda: [mel_by_token(x, tokens, 2) for x in mel],
                       reductions=() if plan is None else plan.reductions(states))


def sounding(mel: Tensor) -> Tensor:
    """Frames up to the last one that is not digital silence. mel (B, bins, T) -> (B,) int64"""
    loud = mel.amax(1) != mel.amin(1)                                                                # (B, T)
    number = torch.arange(1, mel.shape[-1] + 1, device=mel.device)
    return torch.where(loud, number, 0).amax(1)
