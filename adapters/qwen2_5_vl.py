"""Qwen2.5-VL: pictures and clips of any size, two file frames a token, and rotary positions in time, height and width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmcompress.tokens import ImageLayout, VideoLayout

from .base import Adapter, Encoded, named


class Qwen25VLAdapter(Adapter):
    """`Qwen2_5_VLForConditionalGeneration`.

    Kept tokens keep the (t, y, x) positions of the full prompt, always: they are taken from the model's own
    `get_rope_index` on the full prompt and selected. The tower's attention is windowed and its projections are fused, so
    reducers that read vision attention raise `SignalError`.
    """

    encoder_inputs = ("pixel_values", "image_grid_thw")
    video_inputs = ("pixel_values_videos", "video_grid_thw")
    mrope = True

    @property
    def dropped(self) -> tuple[str, ...]:
        return (*super().dropped, "second_per_grid_ts", "mm_token_type_ids")

    def tower(self, modality: str) -> Any:
        return self.model.model.visual

    def layouts(self, inputs: Mapping[str, Any]) -> list[ImageLayout]:
        return [ImageLayout(tile=(h, w)) for _, h, w in self._grids(inputs, "image_grid_thw", "pixel_values")]

    def video_layouts(self, inputs: Mapping[str, Any]) -> list[VideoLayout]:
        return [VideoLayout(frames=t, grid=(h, w))
                for t, h, w in self._grids(inputs, "video_grid_thw", "pixel_values_videos")]

    def _grids(self, inputs: Mapping[str, Any], name: str, pixels: str) -> list[tuple[int, int, int]]:
        """Frames, token rows and token columns of each item."""
        if inputs.get(name) is None:
            raise ValueError(f"{pixels} without {name}: pass everything the Qwen2.5-VL processor returned")
        merge = self.config.vision_config.spatial_merge_size
        return [(t, h // merge, w // merge) for t, h, w in torch.as_tensor(inputs[name]).tolist()]

    def encode(self, inputs: Mapping[str, Any], layers: Sequence[int] = (), receives: Sequence[int] = ()) -> Encoded:
        out = self.model.model.get_image_features(**named(inputs, self.encoder_inputs), return_dict=True)
        return Encoded(list(out.pooler_output), dict.fromkeys((*layers, *receives)))

    def encode_video(self, inputs: Mapping[str, Any], layers: Sequence[int] = (), receives: Sequence[int] = ()) -> Encoded:
        out = self.model.model.get_video_features(**named(inputs, self.video_inputs), return_dict=True)
        return Encoded(list(out.pooler_output), dict.fromkeys((*layers, *receives)))

    def positions(self, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The model's own, of the prompt with one more word, which tells where text goes on.

        That is not one behind the largest position: a long clip's last frames may lie further ahead in time than the text that
        follows, as the model lays them out. Its own `rope_deltas` take the largest, so that a second turn on a cache begins
        elsewhere than the same turn in one prompt; here it does not.
        """
        ids = torch.cat([ids, torch.zeros_like(ids[:, :1])], 1)
        ids[:, -1:] = next(i for i in range(3) if i not in self.placeholders)
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        kinds = torch.where(ids == self.image_token_id, 1, torch.where(ids == self.video_token_id, 2, 0))
        grids = {name: torch.as_tensor(inputs[name]).cpu() for name in ("image_grid_thw", "video_grid_thw")
                 if inputs.get(name) is not None}
        seconds = inputs.get("second_per_grid_ts")
        seconds = None if seconds is None else torch.as_tensor(seconds).cpu()
        positions, _ = self.model.model.get_rope_index(ids, mm_token_type_ids=kinds, attention_mask=mask,
                                                       second_per_grid_ts=seconds, **grids)
        return positions[..., :-1], positions[0, :, -1:]
