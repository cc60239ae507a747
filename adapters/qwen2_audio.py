"""Qwen2-Audio: one 30 s window a recording, 25 tokens a second, padding masked in the encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

from mmcompress.layout import AudioLayout

from .audio import AudioAdapter, Encoded


class Qwen2AudioAdapter(AudioAdapter):
    """`Qwen2AudioForConditionalGeneration`, with prompts that hold one placeholder a token, as its processor writes them.

    The model encodes inside its `forward` and has no method for it, so the encoder is called here as `forward` calls it.
    """

    audio_inputs = ("input_features", "feature_attention_mask")
    mask_input = "feature_attention_mask"
    masks_loss = True
    states_per_token = 2

    def encode_audio(self, inputs: Mapping[str, Any], layouts: Sequence[AudioLayout], merging: Any = None) -> Encoded:
        core, plan = self.model.model, self.plan_merging(merging, inputs, layouts)
        mel = inputs["input_features"].to(core.audio_tower.device)
        with plan or nullcontext():
            out = core.audio_tower(mel, attention_mask=self._encoder_mask(mel, inputs["feature_attention_mask"]))
        features = core.multi_modal_projector(out.last_hidden_state)
        if plan is not None:
            return self.merged(plan, features, inputs, layouts)
        return Encoded([x[:layout.tokens] for x, layout in zip(features, layouts)], {}, mel=partial(self.mel, inputs, layouts))

    def _encoder_mask(self, mel: Tensor, frames: Tensor) -> Any:
        """The encoder's attention mask over its states, as the model builds it."""
        states = (mel.shape[-1] - 2) // 2 + 1
        lengths = (frames.to(mel.device).sum(-1) - 1) // 2 + 1
        valid = torch.arange(states, device=mel.device) < lengths[:, None]
        like = self.model.get_input_embeddings().weight
        return create_bidirectional_mask(
            config=self.model.model.audio_tower.config, attention_mask=valid.long(),
            inputs_embeds=torch.zeros(len(mel), states, 1, dtype=like.dtype, device=mel.device))
