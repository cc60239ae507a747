"""LLaVA-1.5: one tile a picture, its patches row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmcompress.errors import UnsupportedModelError
from mmcompress.tokens import ImageLayout

from .base import Adapter, tile_tokens


class LlavaAdapter(Adapter):
    """`LlavaForConditionalGeneration` with a vision tower of fixed picture size (CLIP, SigLIP, DINOv2, ...)."""

    encoder_inputs = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")

    def layouts(self, inputs: Mapping[str, Any]) -> list[ImageLayout]:
        if inputs.get("image_sizes") is not None or self.config.vision_config.model_type == "pixtral":
            raise UnsupportedModelError("a Pixtral tower reads pictures of any size with break tokens among the text, "
                                        "which this adapter cannot reduce; known: CLIP, SigLIP and other fixed-size towers")
        return [ImageLayout(tile=tile_tokens(self.config))] * len(inputs["pixel_values"])
