"""LLaVA-OneVision: any-resolution pictures whose large canvases are shrunk, and clips pooled to a quarter of their tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmcompress.tokens import ImageLayout, VideoLayout

from .base import one_tensor, tile_tokens
from .llava_next import LlavaNextAdapter


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """`LlavaOnevisionForConditionalGeneration`. A clip is closed by one newline token; several pictures of one prompt
    are not cut into crops."""

    encoder_inputs = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy",
                      "vision_aspect_ratio", "batch_num_images")
    video_inputs = ("pixel_values_videos", "vision_feature_layer", "vision_feature_select_strategy")

    @property
    def dropped(self) -> tuple[str, ...]:
        return (*super().dropped, "image_sizes_videos")

    def layouts(self, inputs: Mapping[str, Any]) -> list[ImageLayout]:
        counts = inputs.get("batch_num_images")
        alone = [True] * len(inputs["image_sizes"]) if counts is None else [n == 1 for n in _ints(counts) for _ in range(n)]
        whole = ImageLayout(tile=tile_tokens(self.config), newlines=True)
        return [layout if cut else whole for layout, cut in zip(super().layouts(inputs), alone)]

    def layout(self, height: int, width: int) -> ImageLayout:
        """As LLaVA-NeXT's; a canvas of more than the aspect ratio's tiles is resized (`anyres_max_9`: nine tiles' worth)."""
        layout = super().layout(height, width)
        rows, columns = layout.size
        most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * layout.tile[0] ** 2))
        return replace(layout, resized=(int(rows // ratio), int(columns // ratio))) if ratio > 1.1 else layout

    def video_layouts(self, inputs: Mapping[str, Any]) -> list[VideoLayout]:
        rows, columns = tile_tokens(self.config)
        pixels = inputs["pixel_values_videos"]                                          # (clips, frames, 3, H, W)
        return [VideoLayout(frames=pixels.shape[1], grid=(-(-rows // 2), -(-columns // 2)), tail=1)] * len(pixels)

    def vision_grid(self, modality: str) -> tuple[int, int] | None:
        return tile_tokens(self.config) if modality == "video" else None

    def finish(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        return one_tensor(outputs, ("video",))


def _ints(counts: Any) -> Sequence[int]:
    return counts.flatten().tolist() if hasattr(counts, "flatten") else list(counts)
