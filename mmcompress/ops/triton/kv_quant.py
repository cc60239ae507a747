"""Quantising and packing in one reading of keys or values, without a copy in float32. Twin of `ops.kv_quant`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shapes import dense, on_its_device

TILE = 32                       # tokens; untuned: no GPU has run these yet


@triton.jit
def _grid(low, high, levels, most, scale_at, zero_at, mask, GRID: tl.constexpr):
    """Scale and zero as they are stored, and stored; a flat or empty group has scale 0."""
    low, high = tl.where(high >= low, low, 0.0), tl.where(high >= low, high, 0.0)
    scale = tl.minimum(tl.div_rn(high - low, levels), most).to(GRID)
    zero = tl.minimum(tl.maximum(low, -most), most).to(GRID)
    tl.store(scale_at, scale, mask=mask)
    tl.store(zero_at, zero, mask=mask)
    scale = scale.to(tl.float32)
    return tl.where(scale > 0, scale, float("inf")), zero.to(tl.float32)


@triton.jit
def _quantize(x_at, seen_at, codes_at, scale_at, zero_at, h, n, d, tokens, channels, levels, most, x_b, x_h, x_n,
              BITS: tl.constexpr, CHANNEL: tl.constexpr, SEEN: tl.constexpr, GRID: tl.constexpr,
              T: tl.constexpr, W: tl.constexpr):
    """One tile of T tokens by W bytes: a group of each token, or a group of tokens of every channel."""
    PER: tl.constexpr = 8 // BITS
    tile, part, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, w = tl.arange(0, T), tl.arange(0, W)
    t = tile * tokens + i
    inside = (i[:, None] < tokens) & (t[:, None] < n) & (w[None, :] * PER < channels)
    x_at += (bh // h) * x_b + (bh % h) * x_h + t[:, None].to(tl.int64) * x_n + part * channels + w[None, :] * PER
    seen = inside
    if SEEN:
        seen = seen & (tl.load(seen_at + bh * n + t, mask=(i < tokens) & (t < n), other=0) != 0)[:, None]
    step, zero = 0.0, 0.0
    if not CHANNEL:
        low, high = tl.full((T,), float("inf"), tl.float32), tl.full((T,), float("-inf"), tl.float32)
        for p in tl.static_range(PER):
            x = tl.load(x_at + p, mask=seen, other=0.0).to(tl.float32)
            low = tl.minimum(low, tl.min(tl.where(seen, x, float("inf")), 1))
            high = tl.maximum(high, tl.max(tl.where(seen, x, float("-inf")), 1))
        at = (bh * n + t) * (d // channels) + part
        step, zero = _grid(low, high, levels, most, scale_at + at, zero_at + at, (i < tokens) & (t < n), GRID)
        step, zero = step[:, None], zero[:, None]
    byte = tl.zeros((T, W), tl.int32)
    for p in tl.static_range(PER):
        x = tl.load(x_at + p, mask=seen, other=0.0).to(tl.float32)
        if CHANNEL:
            low, high = tl.min(tl.where(seen, x, float("inf")), 0), tl.max(tl.where(seen, x, float("-inf")), 0)
            at = (bh * (n // tokens) + tile) * d + w * PER + p
            step, zero = _grid(low, high, levels, most, scale_at + at, zero_at + at, w * PER < channels, GRID)
            step, zero = step[None, :], zero[None, :]
        code = tl.minimum(tl.maximum(tl.floor(tl.div_rn(x - zero, step + tl.zeros_like(x)) + 0.5), 0.0), levels)
        byte |= code.to(tl.int32) << (BITS * p)
    at = (bh * n + t[:, None]) * (d // PER) + part * (channels // PER) + w[None, :]
    tl.store(codes_at + at, byte.to(tl.uint8), mask=inside)


@on_its_device
def quantize(x: Tensor, bits: int, group: tuple[int, int], mask: Tensor | None,
             grid: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """codes, scale and zero of a `Quantized`"""
    x, (b, h, n, d), (tokens, channels) = dense(x), x.shape, group
    codes = torch.empty(b, h, n, d * bits // 8, dtype=torch.uint8, device=x.device)
    scale, zero = (torch.empty(b, h, n // tokens, d // channels, dtype=grid, device=x.device) for _ in range(2))
    seen = codes if mask is None else mask.to(torch.uint8).contiguous()
    along = tokens > 1 or channels == 1
    run, wide = (tokens, d) if along else (TILE, channels)                          # tokens and channels of a program
    _quantize[(triton.cdiv(n, run), d // wide, b * h)](
        x, seen, codes, scale, zero, h, n, d, run, wide, float(2 ** bits - 1), torch.finfo(grid).max, *x.stride()[:3],
        BITS=bits, CHANNEL=along, SEEN=mask is not None, GRID=getattr(tl, str(grid).removeprefix("torch.")),
        T=triton.next_power_of_2(run), W=triton.next_power_of_2(wide * bits // 8))
    return codes, scale, zero
