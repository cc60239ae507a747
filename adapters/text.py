"""Models of text, and families that have no adapter: nothing that they read is encoded or reduced, only their cache is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmcompress.tokens import ImageLayout

from .base import Adapter


class TextAdapter(Adapter):
    """Sees and hears nothing, whatever the call holds."""

    encoder_inputs = ()
    takes_features = False

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        return False

    def layouts(self, inputs: Mapping[str, Any]) -> list[ImageLayout]:
        return []
