"""Keys and values in 8, 4 or 2 bits: MiKV's grid for each token, KIVI's for each channel, MiKV's balancer, and exact bytes.

MiKV (Yang et al., 2024, arXiv 2402.18096), Eq. 1: asymmetric rounding to nearest with step (max - min) / (2^bits - 1) and
offset min, over groups of D / 2 channels of one token, so that no group straddles the halves that rotary embeddings turn;
Eq. 2: keys are multiplied and queries divided by b = sqrt(max |q| / max |k|) of each channel. KIVI (Liu et al., 2024, arXiv
2402.02750): keys over groups of 32 tokens of one channel, values as above. Read from accounts of the papers, not run beside
their authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .kernels import Kernel, use_triton
from .kv_scores import shaped

Along = Literal["token", "channel"]
BITS = (8, 4, 2)
GRIDS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Quantized:
    """Keys or values (B, H, N, D) in few bits. x is about zero + code x scale.

    codes           (B, H, N, D bits / 8) uint8: channel c in byte c // per, at bit bits (c % per), with per = 8 / bits
    scale, zero     (B, H, N, D / group) of tokens' groups of channels, or (B, H, N / group, D) of channels' groups of tokens
    """
    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: tuple[int, int]      # tokens and channels that share a scale; one of the two is 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, D), as before quantisation."""
        b, h, n, width = self.codes.shape
        return b, h, n, width * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales and zeros. A balancer is beside them: add its own `nbytes`."""
        return self.codes.nbytes + self.scale.nbytes + self.zero.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that the codes stand for, computed in float32. (B, H, N, D)"""
        codes = unpack(self.codes, self.bits).float()
        scale, zero = (g.float().repeat_interleave(self.group[0], 2).repeat_interleave(self.group[1], 3)
                       for g in (self.scale, self.zero))
        return (zero + codes * scale).to(dtype)


@torch.no_grad()
def quantize(x: Tensor, bits: int, along: Along = "token", group: int | None = None, *, valid: Tensor | None = None,
             grid: torch.dtype = torch.float16, kernel: Kernel = "auto") -> Quantized:
    """x (B, H, N, D) in `bits` bits.

    along   "token": the channels of a token share scales, `group` (default D / 2) at a time: MiKV; KIVI's values.
            "channel": `group` (default 32) tokens of a channel share one: KIVI's keys. N must be a multiple of it; keep the
            newest tokens that do not fill a group as they are, and quantise them when they do
    valid   (B, N) or (B, H, N) bool: other tokens do not widen a channel's grid, and hold some value on it
    grid    dtype of scales and zeros, float16 as in MiKV. Codes are chosen for the scale as it is stored

    The error of an entry is at most scale / 2 + eps (|min| + max - min), where eps is half of `torch.finfo(grid).eps`, up to
    underflow of tiny grids; values outside of the grid dtype's range saturate. Raises ValueError on sizes.
    """
    tokens, channels = _group(x, bits, along, group, grid)
    mask = None if valid is None else shaped("valid", valid, tuple(x.shape[:3])).bool()
    if use_triton(kernel, x):
        from .triton.kv_quant import quantize as fused

        return Quantized(*fused(x, bits, (tokens, channels), mask, grid), bits, (tokens, channels))
    b, h, n, d = x.shape
    grouped = x.float().view(b, h, n // tokens, tokens, d // channels, channels)
    seen = None if mask is None else mask.view(b, h, n // tokens, tokens, 1, 1)
    scale, zero = (s.to(grid) for s in grid_of(grouped, seen, 2 ** bits - 1, grid))                  # (B, H, n, 1, c, 1)
    step = torch.where(scale > 0, scale.float(), torch.inf)                         # a flat group: code 0, which is exact
    place = ((grouped if seen is None else grouped.masked_fill(~seen, 0)) - zero.float()) / step
    codes = (place + 0.5).floor().clamp(0, 2 ** bits - 1).to(torch.uint8).view(b, h, n, d)
    return Quantized(pack(codes, bits), scale.flatten(4)[:, :, :, 0], zero.flatten(4)[:, :, :, 0], bits, (tokens, channels))


def grid_of(grouped: Tensor, seen: Tensor | None, levels: int, grid: torch.dtype) -> tuple[Tensor, Tensor]:
    """Eq. 1: (max - min) / levels and min over axes 3 and 5, within the range of `grid`; 0 where no token is valid."""
    low = (grouped if seen is None else grouped.masked_fill(~seen, torch.inf)).amin((3, 5), keepdim=True)
    high = (grouped if seen is None else grouped.masked_fill(~seen, -torch.inf)).amax((3, 5), keepdim=True)
    low, high = (torch.where(high >= low, edge, 0) for edge in (low, high))
    most = torch.finfo(grid).max
    return ((high - low) / levels).clamp_max(most), low.clamp(-most, most)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (.., D) uint8 below 2^bits -> (.., D bits / 8) uint8, the first channel in the lowest bits."""
    per = 8 // bits
    planes = codes.view(*codes.shape[:-1], -1, per)
    out = planes[..., 0].clone()
    for p in range(1, per):
        out |= planes[..., p] << (bits * p)
    return out


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`. (.., W) uint8 -> (.., W 8 / bits) uint8"""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2 ** bits - 1)).flatten(-2)


@torch.no_grad()
def balancer(q: Tensor, k: Tensor, valid: Tensor | None = None) -> Tensor:
    """MiKV's b of each KV head and channel, Eq. 2. (B, Hkv, 1, D) float32, above 0

    q (B, Hq, M, D) queries of the prefill, of which the maximum is over the query heads of the KV head; k (B, Hkv, N, D); valid
    (B, N) bool: with left padding, whose queries (the last M columns) and keys count. Quantise k * b; divide queries by b. 1 in
    channels where queries or keys are all 0.
    """
    (b, _, m, d), hkv = q.shape, k.shape[1]
    size_q, size_k = q.float().abs(), k.float().abs()
    if valid is not None:
        mask = shaped("valid", valid, (b, 1, k.shape[2])).bool()[..., None]                          # (B, 1, N, 1)
        size_q, size_k = size_q.masked_fill(~mask[:, :, -m:], 0), size_k.masked_fill(~mask, 0)
    most_q, most_k = size_q.reshape(b, hkv, -1, d).amax(2, keepdim=True), size_k.amax(2, keepdim=True)
    ratio = most_q / most_k.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where((most_q > 0) & (most_k > 0), ratio.sqrt(), 1)


def quantized_bytes(shape: tuple[int, int, int, int], bits: int, along: Along = "token", group: int | None = None,
                    grid: torch.dtype = torch.float16) -> int:
    """Bytes that `quantize` of this shape (B, H, N, D) will hold, before there is any data: codes, scales and zeros."""
    x = torch.empty(shape, device="meta")
    tokens, channels = _group(x, bits, along, group, grid)
    return x.numel() * bits // 8 + 2 * grid.itemsize * (x.numel() // (tokens * channels))


def _group(x: Tensor, bits: int, along: str, group: int | None, grid: torch.dtype) -> tuple[int, int]:
    """How many tokens and channels share a scale; ValueError where sizes do not divide."""
    if bits not in BITS or grid not in GRIDS:
        raise ValueError(f"bits={bits!r}, grid={grid}: bits are 8, 4 or 2, grids torch.float16, bfloat16 or float32")
    if along not in ("token", "channel"):
        raise ValueError(f"along={along!r}: 'token' (scales over channels) or 'channel' (scales over tokens)")
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x {tuple(x.shape)}: (B, H, N, D), not empty")
    n, d, per = x.shape[2], x.shape[3], 8 // bits
    size = (d // 2 if along == "token" else 32) if group is None else group
    total = d if along == "token" else n
    if size < 1 or total % size:
        raise ValueError(f"group={size}: must divide {total}, the " + ("channels" if along == "token" else
                         "tokens; keep those that do not fill a group unquantised"))
    if d % per or (along == "token" and size % per):
        raise ValueError(f"bits={bits} with D={d} and group={size}: {per} channels share a byte, and must share a group")
    return (1, size) if along == "token" else (size, 1)
