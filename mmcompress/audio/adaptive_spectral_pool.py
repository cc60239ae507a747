"""AdaptiveSpectralPool: frequencies along time, of each short segment as many as it needs (ours).

The recording is cut into short segments, and each into frequencies by the DCT-II. A budget of k coefficients is then dealt out
over the whole recording: the next always goes to the segment that has most energy left above its cut (divided by the root of
what it holds already). So what is lost is lost evenly: bursts and consonants keep their tokens, silence and held vowels one or
two. Each segment's coefficients become as many tokens by the DCT-III of that length; the total is exact.

Related: spectral pooling (Rippel, Snoek and Adams, 2015; `SpectralPool`) cuts every part of a recording at one frequency.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.ranking import mask_to_index, ranks
from ..ops.spectral import energy_of, restoring_gain, segment_dct, segment_idct, wide
from ..tokens import Reduction, Tokens
from .base import AudioReducer


@dataclass(frozen=True)
class AdaptiveSpectralPool(AudioReducer):
    """Spectral pooling of segments, which share the budget by the energy they have above the cut.

    keep     share of the recording's tokens, or an exact count
    segment  tokens of a segment, about; longer ones where the budget has fewer than two tokens for each
    restore  scale the tokens' deviation from the recording's mean back to the energy it had before the cut, see `SpectralPool`

    `source` names the one of equal parts of its segment that a token falls in, `mass` is its segment's tokens by its
    coefficients. The split depends on the row alone, not on its loudness, and carries no gradient.
    """

    segment: int = 16
    restore: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.segment, bool) or not isinstance(self.segment, int) or self.segment < 4:
            raise ValueError(f"segment={self.segment!r}: a number of tokens, at least 4")

    def reduce_sound(self, x: Tokens, k: int) -> Reduction:
        n, device, batch, features = x.layout.length, x.features.device, len(x.features), wide(x.features)
        parts = segments_for(n, k, self.segment)
        number = torch.arange(parts, device=device)
        start = number * n // parts                                                                  # (S,)
        length = (number + 1) * n // parts - start
        longest = -(-n // parts)
        most = min(longest, k - parts + 1, self.segment)                                             # C: coefficients at most
        mean = features.mean(1, keepdim=True)
        varying = features - mean
        place = (start[:, None] + torch.arange(longest, device=device)).clamp_max(n - 1)             # (S, L)
        analysis = segment_dct(longest, most, device, features.dtype)[length - longest + 1]          # (S, C, L)
        coefficients = analysis @ varying.index_select(1, place.flatten()).unflatten(1, place.shape)  # (B, S, C, D)
        energy = coefficients.detach().square().sum(-1)                                              # (B, S, C)
        whole = energy_of(varying)                                                                   # (B,)
        counts = deal(energy, length, k, (whole + n * energy_of(mean)) / parts)                      # (B, S)

        slot = torch.arange(most, device=device)
        made = slot < counts[..., None]                                                              # (B, S, C)
        scale = (counts / length.to(features.dtype)).sqrt()[..., None, None]
        tokens = ((segment_idct(most, device, features.dtype)[counts] * scale) @ coefficients).flatten(1, 2)
        pick = mask_to_index(made.flatten(1), k)                                                     # (B, k)
        tokens = tokens.gather(1, pick[..., None].expand(-1, -1, tokens.shape[-1]))
        if self.restore:
            tokens = tokens * restoring_gain(whole, (energy * made).sum((1, 2)), n / k)[:, None, None]
        middle = start[:, None] + (2 * slot + 1) * length[:, None] // (2 * counts[..., None])        # (B, S, C)
        at = -(-(torch.arange(n, device=device) + 1) * parts // n) - 1                               # (N,) segment of each
        within = (torch.arange(n, device=device) - start[at]) * counts[:, at] // length[at]
        return Reduction(tokens=(mean + tokens).to(x.features.dtype), index=middle.flatten(1).gather(1, pick),
                         source=(counts.cumsum(1) - counts)[:, at] + within,
                         mass=(length / counts)[..., None].expand(batch, parts, most).flatten(1).gather(1, pick))


def segments_for(n: int, k: int, segment: int) -> int:
    """How many segments n tokens are cut into: of `segment` tokens at most, or as few as leaves each two of k."""
    return max(1, min(-(-n // segment), k // 2))


def deal(energy: Tensor, length: Tensor, k: int, scale: Tensor) -> Tensor:
    """How many of its lowest coefficients each segment gets: at least one, k in all. -> (B, S) int64

    energy (B, S, C) by frequency, length (S,) int64 tokens of each segment, scale (B,) an energy of which 1e-10 is rounding.
    Claims fall with the frequency, so a segment's lowest win; where nothing varies they are dealt evenly.
    """
    c = torch.arange(energy.shape[2], device=energy.device)
    left = energy.flip(2).cumsum(2).flip(2)                                                          # from frequency c up
    claim = left / (c + 0.5).sqrt() + 1e-10 * scale.clamp_min(1e-20)[:, None, None] / (c + 0.5)
    exists = c < length[:, None]
    claim = torch.where(c == 0, torch.inf, claim).masked_fill(~exists, -1.0)
    return ((ranks(claim.flatten(1)).view_as(claim) < k) & exists).sum(2)
