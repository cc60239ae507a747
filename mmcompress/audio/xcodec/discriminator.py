"""X-Codec's judge, the only one of its released recipe: a small convolutional network on each of six spectrograms.

After zhenye234/xcodec, modules/discriminators/frequency_discriminator.py: hop 32 to 1024, fft = window = 4 hop, magnitudes on
a mel scale of as many bands as bins, two channels (linear; decibels mapped to [0, 1]), 7 convolutions of 3 x 3. Its features
are those after the activation, which works in place there.
"""

from __future__ import annotations

import warnings
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.audio_utils import mel_filter_bank

from .losses import Judged, magnitude

HOPS = (32, 64, 128, 256, 512, 1024)
HIDDEN = (64, 128, 256, 512, 512, 512)
LOUD, RANGE = 20.0, 100.0               # decibels: the log channel is 1 at LOUD and above, 0 RANGE below that


class MultiFrequencyDiscriminator(nn.Module):
    """Scores sounds, 1 for real and 0 for made, at many places of time and frequency.

    hops        in samples, one spectrogram each
    hidden      channels of each network's last hidden layer, multiples of 32
    rate        of the sound, Hz
    """

    def __init__(self, hops: tuple[int, ...] = HOPS, hidden: tuple[int, ...] = HIDDEN, rate: int = 16_000) -> None:
        super().__init__()
        if not hops or len(hops) != len(hidden):
            raise ValueError(f"hops={hops}, hidden={hidden}: give one number of channels for each spectrogram")
        if any(h < 32 or h % 32 for h in hidden):
            raise ValueError(f"hidden={hidden}: must be multiples of 32")
        self.shortest = 8 * max(hops)
        self.views = nn.ModuleList(MelSpectrogram(hop, rate) for hop in hops)
        self.judges = nn.ModuleList(_Judge(h) for h in hidden)

    def forward(self, audio: Tensor) -> Judged:
        """audio (B, 1, T), T >= `shortest` -> of each spectrogram its scores (B, 1, F', N') and six features (B, C, F', N')"""
        if audio.shape[-1] < self.shortest:
            raise ValueError(f"{audio.shape[-1]} samples: this discriminator needs {self.shortest}; take longer segments")
        scores, features = [], []
        for view, judge in zip(self.views, self.judges):
            score, hidden = judge(view(audio.flatten(0, 1)))
            scores.append(score)
            features.append(hidden)
        return scores, features


class MelSpectrogram(nn.Module):
    """(M, T) -> (M, 2, 2 hop + 1, T // hop + 1): magnitude, and decibels mapped to [0, 1]. No weights."""

    mel: Tensor                         # (bins, bands)

    def __init__(self, hop: int, rate: int) -> None:
        super().__init__()
        self.hop, bins = hop, 2 * hop + 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # as many bands as bins: the lowest lie between two bins
            mel = mel_filter_bank(bins, bins, 0.0, rate / 2, rate, norm=None, mel_scale="htk")
        self.register_buffer("mel", torch.from_numpy(mel).float().clamp_min(1e-6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        size = 4 * self.hop
        # torch's normalized=True divides bins by sqrt(size) before the floor on power
        bins = magnitude(x.float() / size**0.5, size, self.hop, size)
        with torch.autocast(x.device.type, enabled=False):
            mel = torch.einsum("mfn,fb->mbn", bins, self.mel)
        decibels = 20 * mel.log10()
        return torch.stack([mel, ((decibels - LOUD + RANGE) / RANGE).clamp(0, 1)], 1)


class _Judge(nn.Module):
    """(M, 2, F, N) -> score (M, 1, F / 8, N / 8), [features]; every second layer halves both sides."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        widths = [2] + [hidden // 2**i for i in range(5, -1, -1)] + [1]
        self.layers = nn.ModuleList(weight_norm(nn.Conv2d(a, b, 3, 1 + i % 2)) for i, (a, b) in enumerate(pairwise(widths)))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features: list[Tensor] = []
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(F.pad(x, (1, 1, 1, 1), mode="reflect")), 0.2)
            features.append(x)
        return self.layers[-1](F.pad(x, (1, 1, 1, 1), mode="reflect")), features
