"""VidCom2: frames that stand out get more of the budget, cells that stand out stay (Liu et al., EMNLP 2025).

The code's: of the channels, the half that varies least over the clip, L2-normalised; a cell's likeness to the clip's centre v
and to its frame's centre f is a sum of five Gaussian kernels; a frame's distinctiveness is -mean(v), softmaxed over frames
into p at temperature 0.01; frame t keeps the share R (1 + p_t - mean(p)), and of its cells those of lowest v + f.
Ours: one exact total by Webster's apportionment of the same weights. With the total that the code's own rounding leads to
it is the code's selection; at the total R T P, which that rounding misses, the leftover seats go where they are next due,
and what a full frame cannot use goes to the others instead of being lost. A frame may end with nothing where the budget
is that small (the code leaves it one cell), and keep=1.0 is the identity (the code drops cells at R = 1). Scores are
computed in float32 (the code: in the model's dtype).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.ranking import apportion, topk_in_order
from ..tokens import Reduction, Tokens, VideoReducer, select_from

BANDWIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class VidCom2(VideoReducer):
    """Cells least like their clip and their frame, more of them from frames unlike the clip.

    keep         share of the clip's tokens, or an exact count
    temperature  of the softmax over frames. At the code's 0.01 it is mostly one-hot: one frame gets up to twice the mean
    channels     share of the channels that is compared, those that vary least, in (0, 1]
    """

    temperature: float = 0.01
    channels: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: must be positive")
        if not 0 < self.channels <= 1:
            raise ValueError(f"channels={self.channels}: a share of the channels, in (0, 1]")

    def reduce_frames(self, x: Tokens, k: int) -> Reduction:
        clip, frame = likeness(x.frames, self.channels)                                              # (B, T, P) each
        weight = frame_weights(clip, self.temperature)                                               # (B, T)
        t, p = clip.shape[1:]
        number = torch.arange(t * p, device=clip.device) // p
        ranking = apportion(-(clip + frame).flatten(1), number, weight)
        return select_from(x.frames.flatten(1, 2), topk_in_order(ranking, k))


def likeness(frames: Tensor, channels: float = 0.5) -> tuple[Tensor, Tensor]:
    """How much each cell is like the clip's centre and its frame's. frames (B, T, P, D) -> two of (B, T, P) float32"""
    features = frames.detach().float()
    steady = features.flatten(1, 2).var(1, unbiased=False).argsort(dim=1, stable=True)               # (B, D)
    steady = steady[:, :max(1, int(features.shape[-1] * channels))]
    index = steady[:, None, None].expand(-1, *features.shape[1:3], -1)
    unit = F.normalize(features.gather(3, index), dim=-1)                                            # (B, T, P, C)
    return _kernels(unit, unit.mean((1, 2), keepdim=True)), _kernels(unit, unit.mean(2, keepdim=True))


def _kernels(unit: Tensor, centre: Tensor) -> Tensor:
    distance = (unit - centre).square().sum(-1)                                                      # (B, T, P)
    return torch.stack([(-distance / (2 * a)).exp() for a in BANDWIDTHS]).sum(0)


def frame_weights(clip: Tensor, temperature: float = 0.01) -> Tensor:
    """1 + p - mean(p) of every frame. clip (B, T, P): likeness to the clip's centre -> (B, T), mean 1"""
    heat = -clip.mean(2)
    p = ((heat - heat.amax(1, keepdim=True)) / temperature).softmax(1)
    return 1 + p - p.mean(1, keepdim=True)
