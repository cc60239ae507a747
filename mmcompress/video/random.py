"""Random tokens of a clip: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import VideoLayout
from ..ops.hashing import hashed
from ..ops.ranking import topk_in_order
from ..tokens import Reduction, Tokens, VideoReducer, select_from


@dataclass(frozen=True)
class Random(VideoReducer):
    """Keep a random subset, the same for every clip of a layout under one seed, on any device and in any batch.

    A cell's rank depends on the seed and its number alone, so longer clips keep a subset of what shorter ones ranked first,
    and a stream keeps what the whole clip would. To average over selections, vary `seed`.
    """

    seed: int = 0

    def reduce_frames(self, x: Tokens, k: int) -> Reduction:
        worth, _ = self.causal(x.frames, x.layout)
        return select_from(x.frames.flatten(1, 2), topk_in_order(worth.flatten(1), k))

    def causal(self, frames: Tensor, layout: VideoLayout, before: Tensor | None = None, start: int = 0
               ) -> tuple[Tensor, None]:
        """A cell's rank under the seed. See `VideoReducer.causal`."""
        batch, t, p, _ = frames.shape
        rank = hashed(start + torch.arange(t * p, device=frames.device), self.seed)
        return rank.view(1, t, p).expand(batch, -1, -1), None
