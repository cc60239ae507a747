"""SpectralPool: a recording's tokens as frequencies along time, of which only the lowest stay.

Rippel, Snoek and Adams (2015) pool the activations of a convolutional network by cutting their DFT; the same is done here along
time to the tokens that the language model (or Whisper's decoder) reads. Ours: the DCT-II as the default, since a recording does
not end where it begins, and the cut at the recording's own end, so that the silence behind it does not ring into it.

Averages of neighbours (`MeanPool`) let faster changes alias and damp slow ones; here nothing below the cut is altered. But the
energy above it is lost, and tokens drawn towards their mean are not what the model was trained on. So by default what is left
is scaled up to the energy there was: at 15 % of whisper-tiny's states its decoder then diverges 60 instead of 161 mnat a token
from what it says with all of them (`benchmarks/audio_wer.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops.spectral import Basis, check_basis, energy_of, restoring_gain, spectral_pool, wide
from ..tokens import Reduction, Tokens
from .base import AudioReducer, evenly


@dataclass(frozen=True)
class SpectralPool(AudioReducer):
    """Keep the k lowest frequencies of each feature along time and transform back to k tokens.

    keep     share of the recording's tokens, or an exact count
    basis    "dct": the recording mirrored at its ends; "dft": wrapped around, as in the paper
    restore  scale the tokens' deviation from the recording's mean by one factor a recording, so that its mean square is what it
             was before the cut; at most by sqrt(n / k), what white noise needs. Not in the paper; False: linear in the tokens

    A token is a weighted sum of all tokens, the nearest weighing most; `source` names the one of k equal parts
    that each falls in, `mass` is n / k. Nothing depends on the content, so the split is the same for every row.
    """

    basis: Basis = "dct"
    restore: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_basis(self.basis)

    def reduce_sound(self, x: Tokens, k: int) -> Reduction:
        n, device, batch = x.layout.length, x.features.device, len(x.features)
        slot = torch.arange(n, device=device) * k // n
        mass = torch.full((batch, k), n / k, dtype=torch.float32, device=device)
        full = wide(x.features)
        mean = full.mean(1, keepdim=True)
        varying = full - mean
        pooled = spectral_pool(varying, k, self.basis)
        if self.restore:
            before, after = (energy_of(v) / v.shape[1] for v in (varying, pooled))
            pooled = pooled * restoring_gain(before, after, n / k)[:, None, None]
        return Reduction(tokens=(mean + pooled).to(x.features.dtype), index=evenly(n, k, device).expand(batch, -1),
                         source=slot.expand(batch, -1), mass=mass)
