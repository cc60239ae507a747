"""Pauses go first, then what changes least: a recording thinned out by its spectrogram alone. No paper; all of it is ours.

A token is quiet if its energy is near the recording's own floor, and in a pause if it is quiet and no sound is within `edge`
seconds. Pauses are emptied from their middle, all of them down to the same length. If that is not enough they go whole, and the
rest is thinned out: evenly in time, or less where the spectrum changes, which is torchaudio's `compute_deltas` of the log-mel
spectrogram. Of the silence that fills Whisper's window a second stays if it can: without it the decoder talks on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.ranking import mask_to_index, ranks
from ..tokens import Reduction, Tokens, select
from .base import AudioReducer, evenly, sound_budget
from .energy_prune import energy

LEAST = 0.25                # a pause is quieter than the level by this at least: 10 dB in the unit of Whisper's log-mel
UNIT, MOST = 256, 1 << 15   # the weight 1 as an integer, and the largest there is


@dataclass(frozen=True)
class SilencePrune(AudioReducer):
    """Drop pauses, from the middle of the longest on; then thin out the rest, keeping what changes.

    depth    how far up from the recording's floor (5 % of its tokens are quieter) to its level (10 % are louder) a token may
             come and still be quiet, in (0, 1)
    edge     seconds of quiet next to sound that are no pause: words begin and end there
    end      seconds of the silence behind the recording that stay, evenly spaced, but no larger a share of it than of the rest
    change   how much more densely tokens stay where the spectrum changes: the weight of a token is 1 + change * its spectral
             change over the mean one. 0: evenly in time, and torchaudio is not needed
    """

    depth: float = 0.3
    edge: float = 0.1
    end: float = 1.0
    change: float = 1.0

    whole_window: ClassVar[bool] = True
    reads_spectrogram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.depth < 1:
            raise ValueError(f"depth={self.depth}: how far from floor to level, in (0, 1)")
        for name in ("edge", "end", "change"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: 0 or more")

    def reduce_sound(self, x: Tokens, k: int) -> Reduction:
        layout, mel = x.layout, x.spectrogram().detach().float()
        n, of_sound = layout.sound or layout.length, k
        if n < layout.length:
            of_sound = min(n, max(sound_budget(layout, k)[0], k - round(self.end * layout.rate)))
        index = self.choose(mel[:, :n], layout.rate, of_sound)
        if k > of_sound:
            silence = n + evenly(layout.length - n, k - of_sound, mel.device)
            index = torch.cat([index, silence.expand(len(index), -1)], 1)
        return select(x, index)

    def choose(self, mel: Tensor, rate: float, k: int) -> Tensor:
        """Which of N tokens stay. mel (B, N, bins) -> (B, k) int64, ascending"""
        loud = energy(mel)
        far, n = to_sound(quiet(loud, self.depth)), loud.shape[1]                                    # (B, N)
        pause = far > self.edge * rate
        seats = (~pause).sum(1, keepdim=True).clamp(max=k)                                           # (B, 1)
        chosen = thin(self.weights(mel, ~pause), seats)
        turn = ranks((far * n + ranks(loud)).masked_fill(~pause, n * (n + 1)).neg())                 # of pauses, nearest first
        return mask_to_index(chosen | (pause & (turn < k - seats)), k)

    def weights(self, mel: Tensor, stays: Tensor) -> Tensor:
        """How densely tokens are to be kept. mel (B, N, bins), stays (B, N) bool -> (B, N) int64, 0 where not `stays`"""
        weight = torch.ones_like(mel[..., 0])
        if self.change:
            flux = spectral_change(mel)
            mean = (flux * stays).sum(1, keepdim=True) / stays.sum(1, keepdim=True)
            weight = 1 + self.change * flux / mean.clamp_min(1e-9)
        return (weight * UNIT).round().clamp(max=MOST).long() * stays


def quiet(loud: Tensor, depth: float) -> Tensor:
    """Which tokens are near the floor; the loudest never is. loud (B, N) -> (B, N) bool"""
    ordered, n = loud.sort(1).values, loud.shape[1]
    floor, level = ordered[:, n // 20, None], ordered[:, n - 1 - n // 10, None]
    return loud < torch.minimum(floor + depth * (level - floor), level - LEAST)


def to_sound(quiet: Tensor) -> Tensor:
    """Tokens from each to the nearest that is not quiet, 0 at those. quiet (B, N) bool, not all of a row -> (B, N) int64"""
    n = quiet.shape[1]
    place = torch.arange(n, device=quiet.device)
    before = torch.where(quiet, -n, place).cummax(1).values
    after = torch.where(quiet, 2 * n, place).flip(1).cummin(1).values.flip(1)
    return torch.minimum(place - before, after - place)


def spectral_change(mel: Tensor) -> Tensor:
    """Mean absolute slope over bins, from the token before to the one after. mel (B, N, bins) -> (B, N) float32"""
    return _functional().compute_deltas(mel.transpose(1, 2), win_length=3).abs().mean(1)


def thin(weight: Tensor, seats: Tensor) -> Tensor:
    """Exactly `seats` of the positions in proportion to their weights, as evenly as these allow (systematic sampling).

    A position's share is min(1, c weight), with c such that shares sum to `seats`; along their running sum it is chosen where
    1/2, 3/2, 5/2, ... fall. Integers throughout, so the count is exact. Equal weights give the middles of equal parts.

    weight (B, N) int64 >= 0, seats (B, 1) int64 from 1 to the number of positive weights -> (B, N) bool
    """
    place = torch.arange(weight.shape[1], device=weight.device)
    heavy = weight.sort(1, descending=True).values
    left = heavy.flip(1).cumsum(1).flip(1)                                               # weight of this and the lighter ones
    certain = (heavy * (seats - place) > left).sum(1, keepdim=True)                                  # those with a share of 1
    one = left.gather(1, certain)
    share = torch.minimum(weight * (seats - certain), one)                                           # in units of 1 / one
    passed = (2 * share.cumsum(1) + one - 1) // (2 * one)
    return passed > F.pad(passed[:, :-1], (1, 0))


def _functional() -> Any:
    try:
        import torchaudio.functional
    except (ImportError, OSError, RuntimeError) as e:       # missing, or its libraries are for another torch
        raise ImportError(f"spectral change is torchaudio's, which does not load beside torch {torch.__version__}: "
                          f"pip install 'mmcompress[audio]'; SilencePrune(change=0) needs none") from e
    return torchaudio.functional
