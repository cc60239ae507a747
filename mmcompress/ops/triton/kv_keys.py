"""Norms and diversity of keys, each key read once a pass and never copied in float32. Twin of `ops.kv_keys`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shapes import dense, on_its_device, wide

TILE = 64                       # untuned: no GPU has run these yet


@triton.jit
def _keys(k_at, mask_at, tile, bh, h, n, d, k_b, k_h, k_n, MASK: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """A tile of keys in float32, their norms, which of them exist, and where they are."""
    j, c = tile * N + tl.arange(0, N), tl.arange(0, D)
    k = tl.load(k_at + (bh // h) * k_b + (bh % h) * k_h + j[:, None].to(tl.int64) * k_n + c[None, :],
                mask=(j[:, None] < n) & (c[None, :] < d), other=0.0).to(tl.float32)
    seen = j < n
    if MASK:
        seen = seen & (tl.load(mask_at + bh * n + j, mask=j < n, other=0) != 0)
    return k, tl.sqrt(tl.sum(k * k, 1)), seen, j


@triton.jit
def _norms(k_at, mask_at, out_at, h, n, d, k_b, k_h, k_n, MASK: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    _, norm, seen, j = _keys(k_at, mask_at, tile, bh, h, n, d, k_b, k_h, k_n, MASK, N, D)
    tl.store(out_at + bh * n + j, tl.where(seen, -norm, float("-inf")), mask=j < n)


@triton.jit
def _unit_sums(k_at, mask_at, out_at, h, n, d, k_b, k_h, k_n, MASK: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k, norm, seen, _ = _keys(k_at, mask_at, tile, bh, h, n, d, k_b, k_h, k_n, MASK, N, D)
    unit = tl.where(seen[:, None], k / tl.maximum(norm, 1e-12)[:, None], 0.0)
    c = tl.arange(0, D)
    tl.store(out_at + (bh * tl.num_programs(0) + tile) * d + c, tl.sum(unit, 0), mask=c < d)


@triton.jit
def _cosines(k_at, mask_at, anchor_at, out_at, h, n, d, k_b, k_h, k_n, MASK: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k, norm, seen, j = _keys(k_at, mask_at, tile, bh, h, n, d, k_b, k_h, k_n, MASK, N, D)
    c = tl.arange(0, D)
    anchor = tl.load(anchor_at + bh * d + c, mask=c < d, other=0.0)
    cosine = tl.sum(k * anchor[None, :], 1) / tl.maximum(norm, 1e-12)
    tl.store(out_at + bh * n + j, tl.where(seen, -cosine, float("-inf")), mask=j < n)


@on_its_device
def key_norm(k: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, N) float32"""
    k, seen, out = _prepare(k, mask)
    _norms[_grid(k)](k, seen, out, *k.shape[1:], *k.stride()[:3], MASK=mask is not None, N=TILE, D=wide(k.shape[3]))
    return out


@on_its_device
def key_diversity(k: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, N) float32"""
    k, seen, out = _prepare(k, mask)
    (b, h, _, d), grid = k.shape, _grid(k)
    parts = torch.empty(b, h, grid[0], d, dtype=torch.float32, device=k.device)
    options = dict(MASK=mask is not None, N=TILE, D=wide(d))
    _unit_sums[grid](k, seen, parts, *k.shape[1:], *k.stride()[:3], **options)
    anchor = torch.nn.functional.normalize(parts.sum(2), dim=-1)                                     # (B, H, D)
    _cosines[grid](k, seen, anchor, out, *k.shape[1:], *k.stride()[:3], **options)
    return out


def _grid(k: Tensor) -> tuple[int, int]:
    return triton.cdiv(k.shape[2], TILE), k.shape[0] * k.shape[1]


def _prepare(k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    k = dense(k)
    seen = k.new_empty(1, dtype=torch.uint8) if mask is None else mask.to(torch.uint8).contiguous()
    return k, seen, torch.empty(k.shape[:3], dtype=torch.float32, device=k.device)
