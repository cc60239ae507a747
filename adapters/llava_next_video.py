"""LLaVA-NeXT-Video: pictures as in LLaVA-NeXT, and clips whose frames are pooled after the tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmcompress.tokens import VideoLayout

from .base import tile_tokens
from .llava_next import LlavaNextAdapter


class LlavaNextVideoAdapter(LlavaNextAdapter):
    """`LlavaNextVideoForConditionalGeneration`: one tile a frame, 24 x 24 patches pooled to 12 x 12 as released."""

    video_inputs = ("pixel_values_videos", "vision_feature_layer", "vision_feature_select_strategy")

    def video_layouts(self, inputs: Mapping[str, Any]) -> list[VideoLayout]:
        rows, columns = tile_tokens(self.config)
        stride = self.config.spatial_pool_stride
        pixels = inputs["pixel_values_videos"]                                          # (clips, frames, 3, H, W)
        return [VideoLayout(frames=pixels.shape[1], grid=(rows // stride, columns // stride))] * len(pixels)

    def vision_grid(self, modality: str) -> tuple[int, int] | None:
        return tile_tokens(self.config) if modality == "video" else None
