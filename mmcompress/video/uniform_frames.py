"""Uniform frames: whole frames at equal steps of the clip (baseline)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..tokens import Reduction, Tokens, VideoReducer, select_from


@dataclass(frozen=True)
class UniformFrames(VideoReducer):
    """Keep as many whole frames as the budget holds, at equal steps; what is left goes to one more frame, thinned evenly.

    The frames shown are number floor((i + 1/2) T / F) for i < F, F = ceil(k / P); the one in their middle is thinned, so a
    budget below one frame shows the middle frame of the clip.
    """

    def reduce_frames(self, x: Tokens, k: int) -> Reduction:
        t, p = x.layout.frames, x.layout.cells
        shown, rest = -(-k // p), k % p
        whole = (shown // 2) * p                                # cells of whole frames before the one that is thinned
        j = torch.arange(k, device=x.features.device)
        frame, cell = j // p, j % p
        if rest:
            thin, later = j - whole, j - whole - rest
            frame = torch.where(thin < 0, frame, torch.where(later < 0, shown // 2, shown // 2 + 1 + later // p))
            cell = torch.where(thin < 0, cell, torch.where(later < 0, ((2 * thin + 1) * p) // (2 * rest), later % p))
        index = ((2 * frame + 1) * t) // (2 * shown) * p + cell
        return select_from(x.frames.flatten(1, 2), index.expand(len(x.features), -1))
