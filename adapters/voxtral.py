"""Voxtral: 30 s windows, 12.5 tokens a second, a window's silence included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from mmcompress.layout import AudioLayout

from .audio import AudioAdapter, Encoded, regroup, windows_of_runs


class VoxtralAdapter(AudioAdapter):
    """`VoxtralForConditionalGeneration`. Four encoder states become a token; every window is read whole, with the silence that
    fills the last one, so that a short recording costs 375 tokens as a long one does."""

    audio_inputs = ("input_features",)

    @property
    def states_per_token(self) -> int:      # type: ignore[override]
        audio = self.config.audio_config
        return audio.intermediate_size // audio.hidden_size

    def tokens(self, frames: int) -> int:
        return ((frames - 1) // 2 + 1) // self.states_per_token

    def audio_layouts(self, inputs: Mapping[str, Any], ids: Tensor) -> list[AudioLayout]:
        return windows_of_runs(ids, self.audio_token_id, [self.tokens(n) for n in self.frames(inputs)], self.rate)

    def encode_audio(self, inputs: Mapping[str, Any], layouts: Sequence[AudioLayout], merging: Any = None) -> Encoded:
        if (plan := self.plan_merging(merging, inputs, layouts)) is not None:
            core = self.model.model
            with plan:
                states = core.audio_tower(inputs["input_features"], return_dict=True).last_hidden_state
            together = states.unflatten(1, (-1, self.states_per_token)).flatten(2)
            return self.merged(plan, core.multi_modal_projector(together), inputs, layouts)
        out = self.model.model.get_audio_features(inputs["input_features"], return_dict=True)
        return Encoded(regroup(out.pooler_output, layouts), {}, mel=partial(self.mel, inputs, layouts))
