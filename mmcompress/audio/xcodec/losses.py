"""What X-Codec minimises (arXiv 2408.17175; weights and sizes of the released codec_16k_6kbps_v3_vqdp.yaml).

    generator       adversarial + 20 features + (convergence + log magnitude), full band and six sub-bands,
                    + commitment + 100 semantic
    discriminator   (D(x) - 1)^2 + D(x')^2, mean over spectrograms (LSGAN, arXiv 1611.04076)

Spectrogram losses are Parallel WaveGAN's (arXiv 1910.11480): spectral convergence ||S - S'||_F / ||S||_F over a whole batch,
and the mean |log S - log S'|, each averaged over three resolutions. The released code's mel loss is switched off there and
left out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .pqmf import PQMF

if TYPE_CHECKING:
    from .model import XCodecOutput

FULL = ((512, 120, 480), (1024, 240, 960), (2048, 300, 1200))           # (fft, hop, window) in samples
SUB = ((128, 20, 80), (256, 40, 120), (256, 50, 200))                   # in samples of a sub-band
FLOOR = 1e-7                                                            # of power, which keeps logarithms finite
Judged = tuple[list[Tensor], list[list[Tensor]]]                        # what a discriminator returns: scores, features


@dataclass(frozen=True)
class LossWeights:
    """Weight of each term of the generator's loss; a term of weight 0 is not computed."""

    adversarial: float = 1.0
    features: float = 20.0
    full: float = 1.0
    sub: float = 1.0
    commit: float = 1.0
    semantic: float = 100.0

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if weight < 0:
                raise ValueError(f"{name}={weight}: a loss's weight must not be negative; 0 leaves the loss out")


def magnitude(x: Tensor, fft: int, hop: int, window: int) -> Tensor:
    """Spectrogram. x (M, T), T > fft / 2 -> (M, fft // 2 + 1, T // hop + 1) float32, at least sqrt(FLOOR)"""
    if x.shape[-1] <= fft // 2:
        raise ValueError(f"{x.shape[-1]} samples: a spectrogram of {fft} needs more than {fft // 2}; take longer segments")
    hann = torch.hann_window(window, device=x.device)
    bins = torch.stft(x.float(), fft, hop, window, hann, return_complex=True)
    return (bins.real**2 + bins.imag**2).clamp_min(FLOOR).sqrt()


def spectral_loss(fake: Tensor, real: Tensor, sizes: Sequence[tuple[int, int, int]] = FULL) -> tuple[Tensor, Tensor]:
    """(spectral convergence, log magnitude), means over the resolutions. fake, real (M, T)"""
    convergence, log = [], []
    for size in sizes:
        f, r = magnitude(fake, *size), magnitude(real, *size)
        convergence.append((r - f).norm() / r.norm())
        log.append(F.l1_loss(f.log(), r.log()))
    return torch.stack(convergence).mean(), torch.stack(log).mean()


def sub_band_loss(fake: Tensor, real: Tensor, bank: PQMF) -> tuple[Tensor, Tensor]:
    """The same on sub-bands, all of them one batch. fake, real (B, 1, T)"""
    with torch.autocast(fake.device.type, enabled=False):
        bands = [bank.analysis(x.float()).flatten(0, 1) for x in (fake, real)]              # (B * bands, T / bands)
        return spectral_loss(bands[0], bands[1], SUB)


def feature_matching(fake: Sequence[Sequence[Tensor]], real: Sequence[Sequence[Tensor]]) -> Tensor:
    """Mean over all layers of the mean |difference|; the real sound's have no gradient."""
    pairs = [(f, r) for fs, rs in zip(fake, real, strict=True) for f, r in zip(fs, rs, strict=True)]
    return torch.stack([F.l1_loss(f.float(), r.detach().float()) for f, r in pairs]).mean()


def adversarial_loss(scores: Sequence[Tensor]) -> Tensor:
    """Mean (D(x') - 1)^2 over spectrograms: the generator wants its sound called real."""
    return torch.stack([(s.float() - 1).square().mean() for s in scores]).mean()


def discriminator_loss(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Mean (D(x) - 1)^2 + D(x')^2 over spectrograms; `fake` are scores of a waveform that was detached."""
    each = [(r.float() - 1).square().mean() + f.float().square().mean() for f, r in zip(fake, real, strict=True)]
    return torch.stack(each).mean()


def generator_losses(output: XCodecOutput, audio: Tensor, bank: PQMF, weights: LossWeights | None = None,
                     fake: Judged | None = None, real: Judged | None = None) -> dict[str, Tensor]:
    """Each term unweighted under its name in LossWeights, and "loss", their weighted sum.

    audio       (B, 1, T) the sound that went in
    fake, real  what the discriminator says of output.waveform and of audio; None: no adversarial and feature terms
    """
    weights = weights or LossWeights()
    if (fake is None) != (real is None):
        raise ValueError("fake and real belong together: judge both sounds, or neither")
    terms: dict[str, Tensor] = {}
    if fake is not None and real is not None:
        if weights.adversarial:
            terms["adversarial"] = adversarial_loss(fake[0])
        if weights.features:
            terms["features"] = feature_matching(fake[1], real[1])
    if weights.full:
        terms["full"] = torch.stack(spectral_loss(output.waveform.flatten(0, 1), audio.flatten(0, 1))).sum()
    if weights.sub:
        terms["sub"] = torch.stack(sub_band_loss(output.waveform, audio, bank)).sum()
    if weights.commit:
        terms["commit"] = output.commit_loss
    if weights.semantic:
        terms["semantic"] = output.semantic_loss
    if not terms:
        raise ValueError("every weight is 0: nothing to train on")
    return terms | {"loss": torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()}
