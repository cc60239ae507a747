"""Video-LLaVA: clips and pictures through towers of their own, every frame with its [CLS] token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mmcompress.compat import pictures_argument
from mmcompress.tokens import ImageLayout, VideoLayout

from .base import Adapter, Encoded, one_tensor, tile_tokens


class VideoLlavaAdapter(Adapter):
    """`VideoLlavaForConditionalGeneration`: 257 tokens a frame, [CLS] first, which the language model reads."""

    encoder_inputs = ("pixel_values", "pixel_values_images", "vision_feature_layer", "vision_feature_select_strategy")
    video_inputs = ("pixel_values_videos", "vision_feature_layer")

    def tower(self, modality: str) -> Any:
        return self.model.model.image_tower if modality == "image" else self.model.model.video_tower

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        pixels = _pictures(inputs)
        return pixels is not None and len(pixels) > 0

    def pixels(self, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        return _pictures(inputs), inputs.get("pixel_values_videos")

    def layouts(self, inputs: Mapping[str, Any]) -> list[ImageLayout]:
        return [ImageLayout(tile=tile_tokens(self.config))] * len(_pictures(inputs))

    def encode(self, inputs: Mapping[str, Any], layers: Sequence[int] = (), receives: Sequence[int] = ()) -> Encoded:
        name = pictures_argument(self.model.model)
        kept = {k: v for k, v in inputs.items() if k not in ("pixel_values", "pixel_values_images")}
        return super().encode({**kept, name: _pictures(inputs)}, layers, receives)

    def video_layouts(self, inputs: Mapping[str, Any]) -> list[VideoLayout]:
        pixels = inputs["pixel_values_videos"]                                          # (clips, frames, 3, H, W)
        return [VideoLayout(frames=pixels.shape[1], grid=tile_tokens(self.config), lead=1)] * len(pixels)

    def encode_video(self, inputs: Mapping[str, Any], layers: Sequence[int] = (), receives: Sequence[int] = ()) -> Encoded:
        encoded = super().encode_video(inputs, layers, receives)                        # (frames of all clips) x (257, D)
        frames = inputs["pixel_values_videos"].shape[1]
        clips = range(0, len(encoded.features), frames)
        return replace(encoded, features=[torch.cat(list(encoded.features[i:i + frames])) for i in clips])

    def finish(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        return one_tensor(outputs, ("image", "video"))


def _pictures(inputs: Mapping[str, Any]) -> Any:
    """The pictures' pixels under either of the names that transformers has had for them; None if there are none."""
    given = inputs.get("pixel_values")
    return inputs.get("pixel_values_images") if given is None else given
