"""The cache of `generate(..., cache_implementation="static")`: a prompt fills it, and its static form goes on."""

from __future__ import annotations

from typing import Any

import torch

from .cache import CompressedCache
from .static import StaticCompressedCache, check_layers, freeze


class FillingCache(CompressedCache):
    """A compressed cache that `generate` fills with a prompt and then freezes.

    columns   tokens, prompt and new ones, that there is to be room for
    promised  before the prompt comes it says that it compiles, as what it becomes does: `generate` decides by it then
    """

    def __init__(self, config: Any, plan: Any, device: torch.device | str, columns: int) -> None:
        super().__init__(config, plan, device)
        self.columns, self.promised = columns, True
        check_layers(self, config)

    @property
    def is_compileable(self) -> bool:
        return self.promised

    def frozen(self) -> StaticCompressedCache:
        """Its static form; it is left empty."""
        return freeze(self, max(1, self.columns - int(self.get_seq_length())), take=True)
