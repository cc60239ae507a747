"""Sub-bands of a sound: a pseudo quadrature mirror filter bank (Nguyen 1994), near-perfect in reconstruction.

Prototype: a Kaiser-windowed low pass (Lin and Vaidyanathan 1998), 62 taps, beta 9. Its cut-off is the one that makes the bands'
powers sum to one: the figures of X-Codec's code (after kan-bayashi/ParallelWaveGAN) for 6 and 8 bands, the latter's for 4.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CUTOFF = {4: 0.142, 6: 0.10032791, 8: 0.07949452}               # of the Nyquist frequency
TAPS, BETA = 62, 9.0


class PQMF(nn.Module):
    """Splits (B, 1, T) into (B, bands, ceil(T / bands)) and puts it together again; band k is the k-th lowest."""

    analysis_filter: Tensor                                     # (bands, 1, TAPS + 1)
    synthesis_filter: Tensor                                    # (bands, 1, TAPS + 1), reversed for a transposed convolution

    def __init__(self, bands: int = 6) -> None:
        super().__init__()
        if bands not in CUTOFF:
            raise ValueError(f"bands={bands}: filters are designed for {', '.join(map(str, CUTOFF))}")
        self.bands = bands
        n = torch.arange(TAPS + 1, dtype=torch.float64) - TAPS / 2
        low = CUTOFF[bands] * torch.sinc(CUTOFF[bands] * n)
        low = low * torch.kaiser_window(TAPS + 1, periodic=False, beta=BETA, dtype=torch.float64)
        k = torch.arange(bands, dtype=torch.float64)[:, None]
        turn = (2 * k + 1) * math.pi / (2 * bands) * n
        shift = (-1) ** k * math.pi / 4
        for name, sign in (("analysis_filter", 1), ("synthesis_filter", -1)):
            band = (2 * low * torch.cos(turn + sign * shift)).float()[:, None]
            self.register_buffer(name, band if sign == 1 else band.flip(-1), persistent=False)

    def analysis(self, x: Tensor) -> Tensor:
        """(B, 1, T) -> (B, bands, ceil(T / bands))"""
        return F.conv1d(x, self.analysis_filter, stride=self.bands, padding=TAPS // 2)

    def synthesis(self, x: Tensor) -> Tensor:
        """(B, bands, N) -> (B, 1, N * bands)"""
        return self.bands * F.conv_transpose1d(x, self.synthesis_filter, stride=self.bands, padding=TAPS // 2,
                                               output_padding=self.bands - 1)
