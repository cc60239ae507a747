"""Column sums of attention in two passes over tiles: log-sum-exp of rows, then sums of columns. Twin of `ops.kv_scores`.

Each pass computes q k' once; neither writes a tile to memory, nor adds atomically, so results are the same from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kv_scores import Rows
from .shapes import dense, given, on_its_device, wide, widens

TILE_M, TILE_N = 64, 64         # untuned: no GPU has run these yet
PROGRAMS = 512                  # programs wanted: a window of few queries is split over its columns
LEAST = 1024                    # columns that are worth a program


@triton.jit
def _logits(q, k, bias_at, i, j, m, n, first, scale, CAUSAL: tl.constexpr, BIAS: tl.constexpr, WIDEN: tl.constexpr):
    """Logits of queries i to columns j, -inf where they do not attend."""
    if WIDEN:
        q, k = q.to(tl.float32), k.to(tl.float32)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    seen = (i[:, None] < m) & (j[None, :] < n)
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None] + first)
    if BIAS:
        s += tl.load(bias_at + j, mask=j < n, other=0.0)[None, :]
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _row_lse(q_at, k_at, bias_at, lse_at, hq, hkv, m, n, d, first, run, scale,
             q_b, q_h, q_m, k_b, k_h, k_n, bias_b, bias_h,
             CAUSAL: tl.constexpr, BIAS: tl.constexpr, WIDEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    tile, bh, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    b, h = bh // hq, bh % hq
    g = h // (hq // hkv)
    i, c = tile * M + tl.arange(0, M), tl.arange(0, D)
    q = tl.load(q_at + b * q_b + h * q_h + i[:, None].to(tl.int64) * q_m + c[None, :],
                mask=(i[:, None] < m) & (c[None, :] < d), other=0.0)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    stop = tl.minimum(n, split * run + run)
    if CAUSAL:
        stop = tl.minimum(stop, first + tile * M + M)
    for at in range(split * run, stop, N):
        j = at + tl.arange(0, N)
        k = tl.load(k_at + b * k_b + g * k_h + j[:, None].to(tl.int64) * k_n + c[None, :],
                    mask=(j[:, None] < n) & (c[None, :] < d), other=0.0)
        s = _logits(q, k, bias_at + b * bias_b + g * bias_h, i, j, m, n, first, scale, CAUSAL, BIAS, WIDEN)
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(s - safe[:, None]), 1)
        top = new
    lse = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(lse_at + (bh * tl.num_programs(2) + split) * m + i, lse, mask=i < m)


@triton.jit
def _column_sums(q_at, k_at, bias_at, weight_at, lse_at, sums_at, hq, hkv, m, n, d, first, scale,
                 q_b, q_h, q_m, k_b, k_h, k_n, bias_b, bias_h, weight_b, weight_h, weight_m,
                 CAUSAL: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr, WIDEN: tl.constexpr,
                 M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    tile, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = bg // hkv, bg % hkv
    group = hq // hkv
    j, c = tile * N + tl.arange(0, N), tl.arange(0, D)
    k = tl.load(k_at + b * k_b + g * k_h + j[:, None].to(tl.int64) * k_n + c[None, :],
                mask=(j[:, None] < n) & (c[None, :] < d), other=0.0)
    sums = tl.zeros((N,), tl.float32)
    start = 0
    if CAUSAL:
        start = tl.maximum(0, tile * N - first) // M * M
    for h in range(g * group, g * group + group):
        for at in range(start, m, M):
            i = at + tl.arange(0, M)
            q = tl.load(q_at + b * q_b + h * q_h + i[:, None].to(tl.int64) * q_m + c[None, :],
                        mask=(i[:, None] < m) & (c[None, :] < d), other=0.0)
            s = _logits(q, k, bias_at + b * bias_b + g * bias_h, i, j, m, n, first, scale, CAUSAL, BIAS, WIDEN)
            lse = tl.load(lse_at + (b * hq + h) * m + i, mask=i < m, other=float("inf"))
            lse = tl.where(lse == float("-inf"), float("inf"), lse)                 # a row that sees nothing gives nothing
            p = tl.exp(s - lse[:, None])
            if WEIGHT:
                p *= tl.load(weight_at + b * weight_b + h * weight_h + i * weight_m, mask=i < m, other=0.0)[:, None]
            sums += tl.sum(p, 0)
    tl.store(sums_at + bg * n + j, sums, mask=j < n)


@on_its_device
def row_lse(q: Tensor, k: Tensor, rows: Rows) -> Tensor:
    """(B, Hq, M) float32"""
    q, k, bias = dense(q), dense(k), given(rows.bias, q)
    (b, hq, m, d), (_, hkv, n, _) = q.shape, k.shape
    tiles = triton.cdiv(m, TILE_M)
    splits = max(1, min(triton.cdiv(PROGRAMS, tiles * b * hq), n // LEAST))
    run = triton.cdiv(triton.cdiv(n, splits), TILE_N) * TILE_N
    lse = torch.empty(b, hq, triton.cdiv(n, run), m, dtype=torch.float32, device=q.device)
    _row_lse[(tiles, b * hq, lse.shape[2])](
        q, k, bias, lse, hq, hkv, m, n, d, rows.first, run, rows.scale, *q.stride()[:3], *k.stride()[:3], *bias.stride()[:2],
        CAUSAL=rows.causal, BIAS=rows.bias is not None, WIDEN=widens(q), M=TILE_M, N=TILE_N, D=wide(d))
    return lse.logsumexp(2) if lse.shape[2] > 1 else lse[:, :, 0]


@on_its_device
def column_sums(q: Tensor, k: Tensor, rows: Rows, lse: Tensor | None) -> Tensor:
    """(B, Hkv, N) float32, summed over the query heads of a KV head"""
    lse = row_lse(q, k, rows) if lse is None else lse.float().contiguous()
    q, k, bias, weights = dense(q), dense(k), given(rows.bias, q), given(rows.weights, q)
    (b, hq, m, d), (_, hkv, n, _) = q.shape, k.shape
    sums = torch.empty(b, hkv, n, dtype=torch.float32, device=q.device)
    _column_sums[(triton.cdiv(n, TILE_N), b * hkv)](
        q, k, bias, weights, lse, sums, hq, hkv, m, n, d, rows.first, rows.scale, *q.stride()[:3], *k.stride()[:3],
        *bias.stride()[:2], *weights.stride(), CAUSAL=rows.causal, BIAS=rows.bias is not None, WIDEN=widens(q),
        WEIGHT=rows.weights is not None, M=TILE_M, N=TILE_N, D=wide(d))
    return sums
