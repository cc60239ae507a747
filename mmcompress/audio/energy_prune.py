"""The loudest tokens of a recording, by the energy that the model itself was given (baseline)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..ops.ranking import topk_in_order
from ..tokens import Reduction, Tokens, select
from .base import AudioReducer


@dataclass(frozen=True)
class EnergyPrune(AudioReducer):
    """Keep the loudest tokens; of equals the earlier stays.

    The silence behind a recording keeps its share, as it does with all methods that do not see the whole window: Whisper, left
    with the loudest tokens of a window and no silence, talks on when the recording is over.
    """

    reads_spectrogram: ClassVar[bool] = True

    def reduce_sound(self, x: Tokens, k: int) -> Reduction:
        return select(x, topk_in_order(energy(x.spectrogram()), k))


def energy(mel: Tensor) -> Tensor:
    """Mean of a token's log-mel bins, in their unit (Whisper's is 40 dB). mel (B, N, bins) -> (B, N) float32

    A mean of logarithms: a hiss over many bands counts for as much as a vowel, whose power lies in a few.
    """
    return mel.detach().float().mean(-1)
