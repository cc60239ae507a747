"""What each book of a codec is worth: how much of it is used, what its codes carry, what it repairs; and how many books to buy.

    H_k = - sum_c p_k(c) log2 p_k(c)     bits, p_k the shares of book k's codes over all real frames
    perplexity 2^H_k                     codes that it has as good as used
    entropy bitrate  rate * sum_k H_k    what an ideal coder would need that takes every code by itself

The entropy is that of the sample (plug-in): of N frames it is at most log2 N and biased low by about (used - 1) / (2 N ln 2)
bits (Miller 1955), so judge a book of 1,024 codes by many thousand frames. Dependence in time and between books is not used,
with which a coder could do better still.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reading import Sound
from .codec import detokenize
from .tokens import AudioTokens

Distortion = Callable[[Tensor, Tensor], float]      # (reference, decoded), both (n,) float32 at one rate


@dataclass(frozen=True, eq=False)
class Usage:
    """Of each book, over all real frames of a batch. All (n_q,) float64.

    used         share of its codes that occur
    entropy      H, bits per code
    perplexity   2^H, in 1 ... its size
    frames       how many were counted
    entropy_kbps, nominal_kbps   of all books
    """

    used: Tensor
    entropy: Tensor
    perplexity: Tensor
    frames: int
    entropy_kbps: float
    nominal_kbps: float


def usage(tokens: AudioTokens) -> Usage:
    """How the books are used. Raises ValueError if there is no frame."""
    mask = tokens.mask
    frames = int(mask.sum())
    if not frames:
        raise ValueError("no frames: there is nothing to count")
    used, entropy = [], []
    for book, size in enumerate(tokens.vocab):
        counts = torch.bincount(tokens.codes[:, book][mask], minlength=size).double()
        share = counts / frames
        used.append((counts > 0).double().mean())
        entropy.append(-torch.special.xlogy(share, share).sum() / torch.log(torch.tensor(2.0, dtype=torch.float64)))
    h = torch.stack(entropy).clamp(min=0)
    return Usage(torch.stack(used), h, 2 ** h, frames, float(tokens.rate * h.sum() / 1000), tokens.kbps)


def relative_error(reference: Tensor, decoded: Tensor) -> float:
    """||decoded - reference||^2 / ||reference||^2: 0 is perfect, 1 as bad as silence. Waveforms; ears judge otherwise."""
    energy = float(reference.double().square().sum())
    error = float((decoded.double() - reference.double()).square().sum())
    return error / energy if energy else float(error > 0)


def spectral_error(reference: Tensor, decoded: Tensor) -> float:
    """Mean |log difference| of magnitudes in nats, over X-Codec's three resolutions; at least 1,025 samples."""
    from ..xcodec.losses import spectral_loss
    return float(spectral_loss(decoded[None], reference[None])[1])


def semantic_error(hearer: Any) -> Distortion:
    """A distortion for `prefix_errors`: ||f(decoded) - f(reference)||^2 / ||f(reference) - its mean over time||^2.

    hearer   an XcodecModel, whose teacher (HuBERT, WavLM) gives the features f; it need not be the codec that is judged, but
             hears at the rate of the sounds. 1 is as bad as to know the mean alone
    """
    @torch.no_grad()
    def distortion(reference: Tensor, decoded: Tensor) -> float:
        device = next(hearer.parameters()).device
        said, heard = (hearer._extract_semantic_features(x[None, None].to(device))[0].double() for x in (decoded, reference))
        return float((said - heard).square().sum() / (heard - heard.mean(0)).square().sum())
    return distortion


def prefix_errors(model: Any, tokens: AudioTokens, reference: list[Sound], distortion: Distortion = relative_error) -> Tensor:
    """The distortion of each recording decoded from its first 1, 2 ... n_q books. (B, n_q) float64

    reference   the recordings, at the rate that the model gives; each pair is cut to the shorter of the two
    distortion  (reference, decoded) -> float, lower is better
    """
    if len(reference) != len(tokens):
        raise ValueError(f"{len(reference)} references for {len(tokens)} recordings")
    errors = torch.zeros(len(tokens), tokens.n_q, dtype=torch.float64)
    for n in range(1, tokens.n_q + 1):
        for b, sound in enumerate(detokenize(model, tokens.prefix(n))):
            if reference[b].sample_rate != sound.sample_rate:
                raise ValueError(f"reference {b} is at {reference[b].sample_rate} Hz and this model gives {sound.sample_rate}: "
                                 f"as_sound(reference, to={sound.sample_rate})")
            most = min(len(sound.samples), len(reference[b].samples))
            errors[b, n - 1] = distortion(reference[b].samples[:most], sound.samples[:most])
    return errors


def gains(errors: Tensor, silence: float = 1.0) -> Tensor:
    """What each book takes off the distortion, given those before it; negative where it adds. errors (..., n_q) -> (..., n_q)

    silence  the distortion without any book; 1 for `relative_error`
    """
    before = torch.cat([torch.full_like(errors[..., :1], silence), errors[..., :-1]], -1)
    return before - errors


def choose(errors: Tensor, tokens: AudioTokens, *, kbps: float | None = None, tokens_per_second: float | None = None) -> Tensor:
    """How many books each recording gets within a mean rate over the batch, greedily. (B,) int64

    errors   (B, n_q) of each prefix, from `prefix_errors`; each recording gets at least one book
    kbps or tokens_per_second   the most, nominal, averaged over all seconds of the batch

    Distortion is summed over recordings, weighted by duration. Again and again, that recording gets further books where it
    drops most per bit (or token): one book, or several where a later one makes up for a weak one. So it follows the lower
    convex hull of each curve, which is optimal wherever the budget ends on a step of it, and always is for recordings of equal
    length, books of equal size and gains that diminish. Books that do not lower the distortion are not bought.

    Raises ValueError if one book each does not fit.
    """
    if tuple(errors.shape) != (len(tokens), tokens.n_q):
        raise ValueError(f"errors {tuple(errors.shape)} for {len(tokens)} recordings of {tokens.n_q} books: pass (B, n_q)")
    if (kbps is None) == (tokens_per_second is None):
        raise ValueError("pass kbps or tokens_per_second, one of them")
    seconds = tokens.seconds.cpu()
    price = tokens.rate * torch.tensor([b / 1000 if kbps is not None else 1.0 for b in tokens.bits], dtype=torch.float64)
    limit = float(kbps if kbps is not None else tokens_per_second or 0)
    budget = limit * float(seconds.sum()) * (1 + 1e-9)
    cost = seconds[:, None] * price.cumsum(0)                           # (B, n_q) of each prefix
    value = seconds[:, None] * errors.double().cpu()
    spent = float(cost[:, 0].sum())
    if not spent <= budget:
        raise ValueError(f"{limit:g}: the first book alone takes {spent / float(seconds.sum()):g}; pass at least that")
    have = [1] * len(tokens)
    while (step := _steepest(have, value, cost, budget - spent)) is not None:
        b, n = step
        spent += float(cost[b, n - 1] - cost[b, have[b] - 1])
        have[b] = n
    return torch.tensor(have, dtype=torch.int64)


def _steepest(have: list[int], value: Tensor, cost: Tensor, left: float) -> tuple[int, int] | None:
    """(recording, books) of the affordable step that lowers distortion most per cost; None if none does."""
    best, slope = None, 0.0
    for b, n in enumerate(have):
        dearer = cost[b, n:] - cost[b, n - 1]
        drop = torch.where(dearer <= left, (value[b, n - 1] - value[b, n:]) / dearer, -torch.inf)
        if drop.numel() and float(drop.max()) > slope:
            slope, best = float(drop.max()), (b, n + 1 + int(drop.argmax()))
    return best
