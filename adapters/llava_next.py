"""LLaVA-NeXT (1.6): a thumbnail, then crops packed onto an unpadded canvas with a newline token a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers.image_processing_utils import select_best_resolution

from mmcompress.tokens import ImageLayout

from .base import Adapter, tile_tokens


class LlavaNextAdapter(Adapter):
    """`LlavaNextForConditionalGeneration` with any vision tower it takes."""

    encoder_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes", "vision_feature_layer",
                                                 "vision_feature_select_strategy")

    def layouts(self, inputs: Mapping[str, Any]) -> list[ImageLayout]:
        sizes = inputs.get("image_sizes")
        if sizes is None:
            raise ValueError("pixel_values without image_sizes: pass everything the LLaVA-NeXT processor returned")
        sizes = sizes.tolist() if hasattr(sizes, "tolist") else [list(s) for s in sizes]
        if len(sizes) != len(inputs["pixel_values"]) and inputs["pixel_values"].ndim == 5:
            raise ValueError(f"{len(inputs['pixel_values'])} pictures in pixel_values but {len(sizes)} image_sizes")
        return [self.layout(height, width) for height, width in sizes]

    def layout(self, height: int, width: int) -> ImageLayout:
        """Layout of a picture of this size in pixels, by the geometry of transformers' `pack_image_features`."""
        tile, side = tile_tokens(self.config), self.config.vision_config.image_size
        best = select_best_resolution((height, width), self.config.image_grid_pinpoints)
        grid = best[0] // side, best[1] // side
        canvas = grid[0] * tile[0], grid[1] * tile[1]
        rows, columns = (0, canvas[0]), (0, canvas[1])
        if width / height > canvas[1] / canvas[0]:              # wide: padded above and below
            padding = (canvas[0] - int(round(height * (canvas[1] / width), 7))) // 2
            rows = padding, canvas[0] - padding
        else:
            padding = (canvas[1] - int(round(width * (canvas[0] / height), 7))) // 2
            columns = padding, canvas[1] - padding
        return ImageLayout(tile=tile, grid=grid, rows=rows, columns=columns, newlines=True)
