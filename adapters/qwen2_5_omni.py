"""Qwen2.5-Omni's thinker: pictures and clips as in Qwen2.5-VL, recordings at 25 tokens a second, one M-RoPE for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmcompress.compat import check_thinker
from mmcompress.layout import AudioLayout

from .audio import MEL_RATE, Encoded, mel_by_token, pooled_tokens, refuse_merging, regroup
from .qwen2_5_vl import Qwen25VLAdapter


class Qwen25OmniAdapter(Qwen25VLAdapter):
    """`Qwen2_5OmniThinkerForConditionalGeneration`.

    Positions are the model's own `get_rope_index` of the full prompt, which counts a recording by its mel frames, and are
    selected with the tokens. With `use_audio_in_video` a clip's tokens and its sound's stand in turn; each is reduced by its
    own reducer, and what stays keeps its place between the other's. The encoder hears 2 s at a time, so no
    reducer works inside it.
    """

    audio_inputs = ("input_features", "feature_attention_mask", "audio_feature_lengths")

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        check_thinker(model)

    @property
    def dropped(self) -> tuple[str, ...]:
        return (*super().dropped, "use_audio_in_video", "video_second_per_grid")

    def audio_layouts(self, inputs: Mapping[str, Any], ids: Tensor) -> list[AudioLayout]:
        return [AudioLayout(pooled_tokens(n), MEL_RATE / 4) for n in self._frames(inputs)]

    def _frames(self, inputs: Mapping[str, Any]) -> list[int]:
        if inputs.get("feature_attention_mask") is None:
            raise ValueError("input_features without feature_attention_mask: pass everything that the Qwen2.5-Omni processor "
                             "returned")
        return inputs["feature_attention_mask"].sum(-1).tolist()

    def encode_audio(self, inputs: Mapping[str, Any], layouts: Sequence[AudioLayout], merging: Any = None) -> Encoded:
        refuse_merging(merging, self.model)
        out = self.model.model.get_audio_features(inputs["input_features"], inputs["feature_attention_mask"], return_dict=True)
        mel = lambda: [mel_by_token(x, layout.tokens, 4) for x, layout in zip(inputs["input_features"], layouts)]  # noqa: E731
        return Encoded(regroup(out.last_hidden_state, layouts), {}, mel=mel)

    @property
    def _word(self) -> int:
        """A token that stands for text."""
        marks = (*self.placeholders, self.config.vision_start_token_id, self.config.audio_start_token_id)
        return next(i for i in range(8) if i not in marks)

    def positions(self, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The model's own, of the prompt with one more word, which tells where text goes on."""
        ids = torch.cat([ids, ids.new_full((len(ids), 1), self._word)], 1)
        mask = torch.ones_like(ids) if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        host = lambda name: None if inputs.get(name) is None else torch.as_tensor(inputs[name]).cpu()  # noqa: E731
        frames = host("feature_attention_mask")
        positions, _ = self.model.model.get_rope_index(
            ids, host("image_grid_thw"), host("video_grid_thw"), mask, bool(inputs.get("use_audio_in_video")),
            None if frames is None else frames.sum(-1), host("video_second_per_grid"))
        return positions[..., :-1], positions[0, :, -1:]
