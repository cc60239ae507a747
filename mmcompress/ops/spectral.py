"""Tokens along time as frequencies: orthonormal DCT-II and DCT-III, the real DFT, and pooling by truncating either.

Spectral pooling (Rippel, Snoek and Adams, 2015) keeps the k lowest of n frequencies and transforms back at length k, scaled so
that a constant stays itself. Theirs is the DFT, which wraps: the end of a recording is neighbour to its beginning. The DCT-II
mirrors instead (ours here). Pooling is linear in the tokens. bfloat16 and float16 are computed in float32 and cast back.

A taper against ringing (Lanczos' sigma factors) was measured on Whisper's states and left out: it damps what the tokens hold
below the cut, and the decoder diverged eight times as far at half of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

Basis = Literal["dct", "dft"]
BASES = ("dct", "dft")
DENSE = 2 ** 19         # entries of a matrix up to which one product is cheaper than two FFTs (measured, one CPU core)


def check_basis(basis: str) -> None:
    if basis not in BASES:
        raise ValueError(f"basis={basis!r}: one of {', '.join(BASES)}")


def spectral_pool(x: Tensor, k: int, basis: Basis = "dct") -> Tensor:
    """Low-pass along time and resample to k <= n tokens: `pool_matrix(n, k) @ x`. x (B, n, D) -> (B, k, D) in its dtype

    Token i stands at (i + 1/2) n / k - 1/2 (DCT) or at i n / k (DFT). Long sequences go through FFTs, n log n instead of n k.
    """
    n, full = x.shape[1], wide(x)
    if n * k <= DENSE and not torch.compiler.is_compiling():        # a graph would make the matrix at every call
        return (pool_matrix(n, k, basis, x.device, full.dtype) @ full).to(x.dtype)
    items = full.split(1) if x.device.type == "cpu" else (full,)    # one by one they stay in a cache: half the time
    return torch.cat([_truncate(item, k, basis) for item in items]).to(x.dtype)


def _truncate(x: Tensor, k: int, basis: Basis) -> Tensor:
    n = x.shape[1]
    if basis == "dct":
        return idct(dct(x, k) * math.sqrt(k / n))
    low = torch.fft.rfft(x, dim=1)[:, :k // 2 + 1] * (k / n)
    if k % 2 == 0:                                          # the Nyquist bin is its own conjugate: real
        low = torch.cat([low[:, :-1], low[:, -1:].real.to(low.dtype)], 1)
    return torch.fft.irfft(low, n=k, dim=1)


def pool_matrix(n: int, k: int, basis: Basis = "dct", device: torch.device | str = "cpu",
                dtype: torch.dtype = torch.float32) -> Tensor:
    """Spectral pooling of n tokens to k <= n as one matrix (k, n), rows summing to 1; computed once a device."""
    check_basis(basis)
    if not 1 <= k <= n:
        raise ValueError(f"{k} of {n} frequencies: at least 1, at most all of them")
    return _constant(_pool_matrix, torch.device(device), dtype, n, k, basis)


def segment_dct(length: int, k: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """The k lowest rows of the DCT-II of length - 1 and of `length`, zeros where there is no row or place. (2, k, length)"""
    return _constant(_segment_dct, torch.device(device), dtype, length, k)


def segment_idct(k: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """The DCT-III of every length 0 ... k, zeros around it: [c] turns c coefficients into c tokens. (k + 1, k, k)"""
    return _constant(_segment_idct, torch.device(device), dtype, k)


def energy_of(x: Tensor) -> Tensor:
    """Sum of the squares of each row, without gradient. (B, n, D) -> (B,)"""
    return torch.linalg.vector_norm(x.detach(), dim=(1, 2)).square()


def restoring_gain(before: Tensor, after: Tensor, most: float) -> Tensor:
    """The factor of amplitudes, 1 to sqrt(most), that brings an energy `after` a cut back to that `before` it. No gradient."""
    ratio = before.detach() / after.detach().clamp_min(torch.finfo(after.dtype).tiny)
    return ratio.clamp(1, most).sqrt()


def dct(x: Tensor, k: int | None = None) -> Tensor:
    """The k lowest coefficients of the orthonormal DCT-II along time. x (B, n, D) -> (B, k or n, D)

    One real FFT of the even places followed by the odd ones backwards, for any n (Makhoul, 1980).
    """
    n, full = x.shape[1], wide(x)
    k = n if k is None else k
    folded = torch.cat([full[:, ::2], full[:, 1::2].flip(1)], 1)
    bins = torch.fft.rfft(folded, dim=1)[:, :k]
    bins = bins * _constant(_turn, x.device, _complex(full), n, bins.shape[1])[:, None]
    low, held = bins.real, bins.shape[1]
    if k > held:                                            # frequency n - f is minus the imaginary part at f
        low = torch.cat([low, -bins[:, n - k + 1:n - held + 1].imag.flip(1)], 1)
    return low.to(x.dtype)


def idct(x: Tensor) -> Tensor:
    """The orthonormal DCT-III along time, which undoes `dct`. (B, k, D) -> (B, k, D)"""
    k, full = x.shape[1], wide(x)
    half = k // 2 + 1
    mirrored = torch.cat([torch.zeros_like(full[:, :1]), full.flip(1)[:, :half - 1]], 1)
    bins = torch.complex(full[:, :half], -mirrored) * _constant(_turn_back, x.device, _complex(full), k, half)[:, None]
    folded = torch.fft.irfft(bins, n=k, dim=1)
    t = torch.arange(k, device=x.device)
    return folded.index_select(1, torch.where(t % 2 == 0, t // 2, k - 1 - t // 2)).to(x.dtype)


def spectrum(x: Tensor, basis: Basis = "dct") -> Tensor:
    """Energy by frequency over time, summed over features: Parseval, its sum is that of the squares. x (B, n, D) float32

    -> (B, n): DCT coefficient f has f / 2 cycles in n tokens; or (B, n // 2 + 1): DFT bin f has f, both signs together.
    """
    full, n = wide(x), x.shape[1]
    if basis == "dct":
        return dct(full).square().sum(-1)
    energy = torch.view_as_real(torch.fft.rfft(full, dim=1, norm="ortho")).square().sum((-1, -2))    # (B, n // 2 + 1)
    f = torch.arange(energy.shape[1], device=x.device)
    return torch.where((f == 0) | (2 * f == n), energy, 2 * energy)


def bandwidth(energy: Tensor, share: float = 0.95) -> Tensor:
    """How many of the lowest frequencies hold a share of the energy beside frequency 0. (B, F) -> (B,) int64, 1 to F"""
    varying, total = energy[:, 1:].cumsum(1), energy[:, 1:].sum(1)
    return 1 + (varying < share * total[:, None]).sum(1) + (total > 0)


def wide(x: Tensor) -> Tensor:
    """As float32, float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def _complex(x: Tensor) -> torch.dtype:
    return torch.complex128 if x.dtype == torch.float64 else torch.complex64


def _constant(make: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, *args: Any) -> Tensor:
    """What `make(*args)` gives in float64, as a constant of a device; made once."""
    if torch.compiler.is_compiling():
        return make(*args).to(device, dtype)
    return _made(make, device, dtype, *args)


@lru_cache(maxsize=128)
def _made(make: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, *args: Any) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():      # a cached inference tensor could never serve a training step
        return make(*args).to(device, dtype)


def _dct_matrix(n: int, k: int) -> Tensor:
    return _wave(torch.tensor(n), torch.arange(k)[:, None], torch.arange(n))


def _pool_matrix(n: int, k: int, basis: Basis) -> Tensor:
    if basis == "dct":
        return math.sqrt(k / n) * _dct_matrix(k, k).T @ _dct_matrix(n, k)
    f = torch.arange(k // 2 + 1, dtype=torch.float64)
    both = torch.where((f == 0) | (2 * f == k), 1 / n, 2 / n * torch.ones_like(f))                   # f and -f, or one alone
    t, i = (torch.arange(m, dtype=torch.float64) * (2 * math.pi / m) for m in (n, k))
    there, back = (torch.stack([torch.cos(p[:, None] * f), torch.sin(p[:, None] * f)], -1) for p in (t, i))
    there[:, 2 * f == k, 1] = 0
    return torch.einsum("ifc,f,tfc->it", back, both, there)


def _segment_dct(length: int, k: int) -> Tensor:
    n, f, t = torch.arange(length - 1, length + 1)[:, None, None], torch.arange(k)[:, None], torch.arange(length)
    return torch.where((f < n) & (t < n), _wave(n.clamp_min(1), f, t), 0)


def _segment_idct(k: int) -> Tensor:
    n, t, f = torch.arange(k + 1)[:, None, None], torch.arange(k)[:, None], torch.arange(k)
    return torch.where((f < n) & (t < n), _wave(n.clamp_min(1), f, t), 0)


def _wave(n: Tensor, f: Tensor, t: Tensor) -> Tensor:
    """DCT-II basis function f of length n at place t. float64"""
    waves = torch.cos(math.pi * f.double() * (t + 0.5) / n)
    return waves * (torch.where(f == 0, 1, 2) / n.double()).sqrt()


def _turn(n: int, frequencies: int) -> Tensor:
    """exp(-i pi f / 2n) and the orthonormal scale. (frequencies,) complex128"""
    f = torch.arange(frequencies, dtype=torch.float64)
    scale = math.sqrt(2 / n) * torch.where(f == 0, math.sqrt(0.5), torch.ones_like(f))
    return torch.polar(scale, -math.pi / (2 * n) * f)


def _turn_back(n: int, frequencies: int) -> Tensor:
    return 1 / _turn(n, frequencies)
