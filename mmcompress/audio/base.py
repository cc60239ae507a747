"""What every reducer of recordings is: tokens along time, of which only those that hear the recording are judged."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import AudioLayout
from ..tokens import BaseReducer, Reduction, Tokens, identity, select


@dataclass(frozen=True)
class AudioReducer(BaseReducer):
    """Base of the reducers of recordings; `x.layout` is an `AudioLayout`.

    A subclass writes `reduce_sound(x, k)` over tokens that all hear the recording. Where a window of fixed length holds silence
    behind it (Whisper), both parts give up the same share: the silence is thinned out evenly, since there is nothing to choose
    from. Methods that judge by content set `whole_window` and see the silence too.
    """

    positions: ClassVar[Literal["closed", "original"]] = "original"
    whole_window: ClassVar[bool] = False
    reads_spectrogram: ClassVar[bool] = False   # needs `x.spectrogram()`
    reads_first_layer: ClassVar[bool] = False   # needs `x.first_layer()`
    in_encoder: ClassVar[bool] = False          # works inside the audio encoder, see `ATome`

    def reduce(self, x: Tokens, k: int) -> Reduction:
        layout = x.layout
        if layout.tail == 0 or self.whole_window:
            return self.reduce_sound(x, k)
        of_sound, of_tail = sound_budget(layout, k)
        parts = []
        if of_sound:
            sound = x.cut(0, layout.sound, AudioLayout(layout.sound, layout.rate))
            parts.append(identity(sound) if of_sound == layout.sound else self.reduce_sound(sound, of_sound))
        if of_tail:
            tail = x.cut(layout.sound, layout.length, AudioLayout(layout.tail, layout.rate))
            parts.append(select(tail, evenly(layout.tail, of_tail, x.features.device).expand(len(x.features), -1)))
        else:
            parts[0] = replace(parts[0], source=F.pad(parts[0].source, (0, layout.tail), value=-1))
        return parts[0] if len(parts) == 1 else _one_after_the_other(parts)

    @abstractmethod
    def reduce_sound(self, x: Tokens, k: int) -> Reduction:
        """Reduce the N tokens of a recording to k < N."""


def sound_budget(layout: AudioLayout, k: int) -> tuple[int, int]:
    """How many of k tokens go to the recording and how many to the silence behind it, at equal shares."""
    of_sound = min(layout.sound, max(k - layout.tail, int(layout.sound > 0), round(k * layout.sound / layout.length)))
    return of_sound, k - of_sound


def evenly(n: int, k: int, device: torch.device | str = "cpu") -> Tensor:
    """k of n positions, evenly spaced: the middle of each of k equal parts. -> (k,) int64, ascending"""
    return (2 * torch.arange(k, device=device) + 1) * n // (2 * k)


def _one_after_the_other(parts: list[Reduction]) -> Reduction:
    """Reductions of neighbouring stretches as one."""
    first, second = parts
    n, k = first.source.shape[1], first.index.shape[1]
    mass = None
    if first.mass is not None or second.mass is not None:
        ones = [torch.ones_like(p.index, dtype=torch.float32) if p.mass is None else p.mass for p in parts]
        mass = torch.cat([m.to(ones[0].dtype) for m in ones], 1)
    return Reduction(tokens=torch.cat([first.tokens, second.tokens], 1), index=torch.cat([first.index, second.index + n], 1),
                     source=torch.cat([first.source, torch.where(second.source < 0, -1, second.source + k)], 1), mass=mass)
