"""Audio Flamingo 3: 30 s windows, 25 tokens a second, padding masked in the encoder and left out behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from mmcompress.layout import AudioLayout

from .audio import AudioAdapter, Encoded, regroup, windows_of_runs


class AudioFlamingo3Adapter(AudioAdapter):
    """`AudioFlamingo3ForConditionalGeneration`: a long recording is several windows, and one run of placeholders."""

    audio_inputs = ("input_features", "input_features_mask")
    mask_input = "input_features_mask"
    states_per_token = 2

    def audio_layouts(self, inputs: Mapping[str, Any], ids: Tensor) -> list[AudioLayout]:
        return windows_of_runs(ids, self.audio_token_id, [self.tokens(n) for n in self.frames(inputs)], self.rate)

    def encode_audio(self, inputs: Mapping[str, Any], layouts: Sequence[AudioLayout], merging: Any = None) -> Encoded:
        if (plan := self.plan_merging(merging, inputs, layouts)) is not None:
            core = self.model.model
            with plan:
                out = core.audio_tower(inputs["input_features"], input_features_mask=inputs["input_features_mask"])
            return self.merged(plan, core.multi_modal_projector(out.last_hidden_state), inputs, layouts)
        out = self.model.model.get_audio_features(inputs["input_features"], inputs["input_features_mask"], return_dict=True)
        return Encoded(regroup(out.pooler_output, layouts), {}, mel=partial(self.mel, inputs, layouts))
