"""Decode attention split over slots: one launch a tier, codes dequantised in registers, one merge. Twin of `ops.kv_decode`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kv_decode import Slots
from ..kv_quant import Quantized
from .shapes import dense, given, on_its_device, wide, widens

TILE = 64                       # slots a tile; untuned: no GPU has run these yet
PROGRAMS = 512                  # programs wanted, so that every multiprocessor has work at batch 1
LEAST = 256                     # slots that are worth a program


@triton.jit
def _tile(x_at, scale_at, zero_at, at, s, seen, stop, d, x_n, scale_n, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
          BITS: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
    """Slots s = at .. at + S - 1 of keys or values (S, D), 0 where missing: as they are (BITS 16), or as float32."""
    c = tl.arange(0, D)
    inside = seen[:, None] & (c[None, :] < d)
    if BITS == 16:
        x = tl.load(x_at + s[:, None].to(tl.int64) * x_n + c[None, :], mask=inside, other=0.0)
    else:
        PER: tl.constexpr = 8 // BITS
        w = tl.arange(0, D // PER)
        code = tl.load(x_at + s[:, None].to(tl.int64) * x_n + w[None, :], mask=seen[:, None] & (w[None, :] < d // PER), other=0)
        code = code.to(tl.int32)
        if BITS == 4:
            code = tl.interleave(code & 15, code >> 4)
        if BITS == 2:
            code = tl.interleave(tl.interleave(code & 3, (code >> 4) & 3), tl.interleave((code >> 2) & 3, code >> 6))
        if (S % TOKENS == 0) & (D % CHANNELS == 0):                                 # groups fill the tile: one load a group
            R: tl.constexpr = S // TOKENS
            N: tl.constexpr = D // CHANNELS
            r, g = at // TOKENS + tl.arange(0, R), tl.arange(0, N)
            place = r[:, None] * scale_n + g[None, :]
            there = (r[:, None] * TOKENS < stop) & (g[None, :] * CHANNELS < d)
            scale = tl.load(scale_at + place, mask=there, other=0.0).to(tl.float32)[:, None, :, None]
            zero = tl.load(zero_at + place, mask=there, other=0.0).to(tl.float32)[:, None, :, None]
            x = tl.reshape(zero + tl.reshape(code.to(tl.float32), (R, TOKENS, N, CHANNELS)) * scale, (S, D))
        else:
            place = (s // TOKENS)[:, None] * scale_n + (c // CHANNELS)[None, :]
            scale = tl.load(scale_at + place, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(zero_at + place, mask=inside, other=0.0).to(tl.float32) + code.to(tl.float32) * scale
        x = tl.where(inside, x, 0.0)                                                # the scale of a missing slot may be NaN
    return x


@triton.jit
def _decode(q_at, k_at, k_scale_at, k_zero_at, v_at, v_scale_at, v_zero_at, length_at, valid_at, bias_at, balance_at,
            out_at, lse_at, hkv, group, n, d, dv, run, part, parts, scale, q_b, q_h, k_b, k_h, k_n, ks_b, ks_h, ks_n,
            v_b, v_h, v_n, vs_b, vs_h, vs_n, valid_b, valid_h, bias_b, bias_h, K_TOKENS: tl.constexpr, K_CHANNELS: tl.constexpr,
            K_BITS: tl.constexpr, V_TOKENS: tl.constexpr, V_CHANNELS: tl.constexpr, V_BITS: tl.constexpr,
            LENGTH: tl.constexpr, VALID: tl.constexpr, BIAS: tl.constexpr, BALANCE: tl.constexpr, WIDEN: tl.constexpr,
            G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, DV: tl.constexpr):
    split, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // hkv, bh % hkv
    r, c, cv = tl.arange(0, G), tl.arange(0, D), tl.arange(0, DV)
    q = tl.load(q_at + b * q_b + (h * group + r[:, None]) * q_h + c[None, :],
                mask=(r[:, None] < group) & (c[None, :] < d), other=0.0)
    if BALANCE:
        balance = tl.load(balance_at + bh * d + c, mask=c < d, other=1.0)
        q = (q.to(tl.float32) / balance[None, :]).to(q.dtype)
    if WIDEN:
        q = q.to(tl.float32)
    k_at += b * k_b + h * k_h
    v_at += b * v_b + h * v_h
    stop = n
    if LENGTH:
        stop = tl.minimum(n, tl.load(length_at + bh).to(tl.int32))
    stop = tl.minimum(stop, split * run + run)
    top, total = tl.full((G,), float("-inf"), tl.float32), tl.zeros((G,), tl.float32)
    out = tl.zeros((G, DV), tl.float32)
    for at in range(split * run, stop, S):
        s = at + tl.arange(0, S)
        seen = s < stop
        if VALID:
            seen = seen & (tl.load(valid_at + b * valid_b + h * valid_h + s, mask=s < stop, other=0) != 0)
        bias = tl.zeros((S,), tl.float32)
        if BIAS:
            bias = tl.load(bias_at + b * bias_b + h * bias_h + s, mask=seen, other=0.0).to(tl.float32)
            seen = seen & (bias > float("-inf"))
        k = _tile(k_at, k_scale_at + b * ks_b + h * ks_h, k_zero_at + b * ks_b + h * ks_h, at, s, seen, stop, d, k_n, ks_n,
                  K_TOKENS, K_CHANNELS, K_BITS, S, D).to(q.dtype)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]
        logits = tl.where(seen[None, :], logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p, shrink = tl.exp(logits - safe[:, None]), tl.exp(top - safe)
        v = _tile(v_at, v_scale_at + b * vs_b + h * vs_h, v_zero_at + b * vs_b + h * vs_h, at, s, seen, stop, dv, v_n, vs_n,
                  V_TOKENS, V_CHANNELS, V_BITS, S, DV).to(q.dtype)
        out = out * shrink[:, None] + tl.dot(p.to(q.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        top = new
    some = tl.where(total > 0, total, 1.0)
    row = (bh * group + r) * parts + part + split
    tl.store(out_at + row[:, None] * dv + cv[None, :], out / some[:, None], mask=(r[:, None] < group) & (cv[None, :] < dv))
    tl.store(lse_at + row, tl.where(total > 0, top + tl.log(some), float("-inf")), mask=r < group)


@triton.jit
def _merge(outs_at, lses_at, out_at, lse_at, parts, dv, P: tl.constexpr, DV: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p, c = tl.arange(0, P), tl.arange(0, DV)
    lses = tl.load(lses_at + row * parts + p, mask=p < parts, other=float("-inf"))
    top = tl.max(lses, 0)
    share = tl.exp(lses - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(share, 0)
    some = tl.where(total > 0, total, 1.0)
    inside = (p[:, None] < parts) & (c[None, :] < dv)
    outs = tl.load(outs_at + (row * parts + p[:, None]) * dv + c[None, :], mask=inside, other=0.0)
    tl.store(out_at + row * dv + c, (tl.sum(outs * share[:, None], 0) / some).to(out_at.dtype.element_ty), mask=c < dv)
    tl.store(lse_at + row, tl.where(total > 0, top + tl.log(some), float("-inf")))


@on_its_device
def decode_attention(q: Tensor, tiers: tuple[Slots, ...], scale: float) -> tuple[Tensor, Tensor]:
    """(B, Hq, 1, Dv) as q and (B, Hq, 1) float32"""
    q = dense(q)
    (b, hq, _, _), (_, hkv, _, dv) = q.shape, tiers[0].v.shape
    runs = [_run(tier.k.shape[2], b * hkv) for tier in tiers]
    splits = [triton.cdiv(tier.k.shape[2], run) for tier, run in zip(tiers, runs)]
    parts = sum(splits)
    outs = torch.empty(b, hq, parts, dv, dtype=torch.float32, device=q.device)
    lses = torch.empty(b, hq, parts, dtype=torch.float32, device=q.device)
    for i, tier in enumerate(tiers):
        _launch(q, tier, outs, lses, runs[i], splits[i], sum(splits[:i]), scale)
    out = torch.empty(b, hq, 1, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, hq, 1, dtype=torch.float32, device=q.device)
    _merge[(b * hq,)](outs, lses, out, lse, parts, dv, P=triton.next_power_of_2(parts), DV=wide(dv))
    return out, lse


def _run(n: int, heads: int) -> int:
    """Slots of one program, a multiple of a tile."""
    splits = max(1, min(triton.cdiv(PROGRAMS, heads), n // LEAST))
    return triton.cdiv(triton.cdiv(n, splits), TILE) * TILE


def _launch(q: Tensor, tier: Slots, outs: Tensor, lses: Tensor, run: int, splits: int, part: int, scale: float) -> None:
    (b, hq, _, d), (_, hkv, n, dv) = q.shape, tier.v.shape
    k, k_strides, k_options = _stored(tier.k, "K")
    v, v_strides, v_options = _stored(tier.v, "V")
    lengths = given(tier.lengths if tier.lengths is None else tier.lengths.expand(b, hkv).contiguous(), q)
    valid, bias = given(_slots(tier.valid, (b, hkv, n)), q), given(_slots(tier.bias, (b, hkv, n)), q)
    balance = given(tier.balance if tier.balance is None else tier.balance.expand(b, hkv, 1, d).float().contiguous(), q)
    _decode[(splits, b * hkv)](
        q, *k, *v, lengths, valid.view(torch.uint8) if valid.dtype == torch.bool else valid, bias, balance, outs, lses,
        hkv, hq // hkv, n, d, dv, run, part, outs.shape[2], scale, *q.stride()[:2], *k_strides, *v_strides,
        *valid.stride()[:2], *bias.stride()[:2], LENGTH=tier.lengths is not None, VALID=tier.valid is not None,
        BIAS=tier.bias is not None, BALANCE=tier.balance is not None, WIDEN=widens(q),
        G=max(16, triton.next_power_of_2(hq // hkv)), S=TILE, D=wide(d), DV=wide(dv), **k_options, **v_options)


def _slots(x: Tensor | None, shape: tuple[int, int, int]) -> Tensor | None:
    return None if x is None else (x[:, None] if x.dim() == 2 else x).expand(shape)


def _stored(x: Tensor | Quantized, name: str) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """Pointers, strides and constants of keys or values."""
    if not isinstance(x, Quantized):
        x = dense(x)
        tensors, strides, sizes = (x, x, x), (*x.stride()[:3], 0, 0, 0), (1, 1, 16)
    else:
        codes, scale, zero = dense(x.codes), x.scale.contiguous(), x.zero.contiguous()
        tensors, strides, sizes = (codes, scale, zero), (*codes.stride()[:3], *scale.stride()[:3]), (*x.group, x.bits)
    return tensors, strides, dict(zip((f"{name}_TOKENS", f"{name}_CHANNELS", f"{name}_BITS"), sizes))
