"""One new token's attention to a cache of ragged slots in tiers: exact beside 8, 4 and 2 bits. No gradient.

A slot may be missing (validity, or a length for each row and KV head), stand for many (a log-mass bias on its logit), and
belong to a tier of its own precision. Parts of the softmax are merged by their log-sum-exp as in FlashDecoding (Dao et al.,
2023), so tiers need no copy into one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor

from .kernels import Kernel, use_triton
from .kv_quant import Quantized
from .kv_scores import DTYPES, shaped

BLOCK = 4096                    # slots that the torch version dequantises and holds at a time


@dataclass(frozen=True)
class Slots:
    """One tier of a cache. What missing slots hold is never read, NaN included.

    k, v        (B, Hkv, S, D) and (B, Hkv, S, Dv), each a tensor or `Quantized`
    lengths     (B, Hkv) int: slots [0, length) exist; default S
    valid       (B, S) or (B, Hkv, S) bool: which slots exist, besides
    bias        (B, Hkv, S) float on the logits, such as log-mass; -inf is a missing slot
    balance     (B, Hkv, 1, D): keys were stored times this (MiKV's balancer), so queries are divided by it
    """
    k: Tensor | Quantized
    v: Tensor | Quantized
    lengths: Tensor | None = None
    valid: Tensor | None = None
    bias: Tensor | None = None
    balance: Tensor | None = None

    def seen(self, at: int, stop: int) -> Tensor | None:
        """Which of slots at .. stop - 1 exist. (B, Hkv, stop - at) bool, None for all"""
        device = self.v.codes.device if isinstance(self.v, Quantized) else self.v.device
        b, h, n, _ = self.k.shape
        seen = None if self.bias is None else shaped("bias", self.bias, (b, h, n))[..., at:stop] > -torch.inf
        if self.valid is not None:
            valid = shaped("valid", self.valid, (b, h, n))[..., at:stop].bool()
            seen = valid if seen is None else seen & valid
        if self.lengths is not None:
            inside = torch.arange(at, stop, device=device) < self.lengths[..., None]
            seen = inside if seen is None else seen & inside
        return seen


@torch.no_grad()
def decode_attention(q: Tensor, *tiers: Slots, scale: float | None = None,
                     kernel: Kernel = "auto") -> tuple[Tensor, Tensor]:
    """Attention of one query to the slots of all tiers. (B, Hq, 1, Dv) as q, and its log-sum-exp (B, Hq, 1) float32

    q (B, Hq, 1, D) rotated, float32, bfloat16 or float16; Hkv divides Hq. A row that sees nothing gives 0 and -inf. Default
    scale 1 / sqrt(D). The Triton twin multiplies in q's dtype with float32 sums, as flash kernels do; the torch version in
    float32. Raises ValueError on shapes.
    """
    check_tiers(q, tiers)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if use_triton(kernel, q):
        from .triton.kv_decode import decode_attention as fused

        return fused(q, tiers, scale)
    outs, lses = zip(*(_part(q, tier, at, stop, scale) for tier in tiers for at, stop in _blocks(tier)))
    out, lse = merge_by_lse(torch.stack(outs), torch.stack(lses))
    return out[:, :, None].to(q.dtype), lse[..., None]


@torch.no_grad()
def decode_attention_reference(q: Tensor, *tiers: Slots, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """`decode_attention` by its definition: everything dequantised, keys repeated, one softmax over the slots of all tiers."""
    check_tiers(q, tiers)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    logits, values = [], []
    for tier in tiers:
        k, v, group = _plain(tier.k), _plain(tier.v), q.shape[1] // tier.k.shape[1]
        k = k if tier.balance is None else k / tier.balance
        seen = tier.seen(0, k.shape[2])
        seen = torch.ones(k.shape[:3], dtype=torch.bool, device=q.device) if seen is None else seen
        bias = torch.zeros(1, device=q.device) if tier.bias is None else tier.bias.float()
        logit = torch.einsum("bhqd,bhsd->bhqs", q.float(), k.repeat_interleave(group, 1))[:, :, 0] * scale
        logit = logit + bias.expand(k.shape[:3]).repeat_interleave(group, 1)
        logits.append(logit.masked_fill(~seen.repeat_interleave(group, 1), -torch.inf))
        values.append(v.masked_fill(~seen[..., None], 0).repeat_interleave(group, 1))
    every = torch.cat(logits, 2)
    attention = torch.nan_to_num(every.softmax(-1))
    out = torch.einsum("bhs,bhsd->bhd", attention, torch.cat(values, 2))
    return out[:, :, None].to(q.dtype), every.logsumexp(-1)[..., None]


def merge_by_lse(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over a whole from attention over its parts. outs (P, .., D), lses (P, ..) -> (.., D), (..)

    A part that saw nothing has -inf and counts for nothing; where no part saw anything, out is 0 and the log-sum-exp -inf.
    """
    lse = lses.logsumexp(0)
    share = (lses - lse.masked_fill(lse == -torch.inf, 0)).exp()[..., None]                          # (P, .., 1)
    return (outs * share).sum(0), lse


def check_tiers(q: Tensor, tiers: tuple[Slots, ...]) -> None:
    """Raise ValueError unless q (B, Hq, 1, D) fits every tier, and the tiers each other."""
    if q.dim() != 4 or q.shape[2] != 1 or q.dtype not in DTYPES:
        raise ValueError(f"q {tuple(q.shape)} {q.dtype}: one query (B, Hq, 1, D) of float32, bfloat16 or float16")
    if not tiers:
        raise ValueError("decode_attention got no tier: pass at least one Slots(k, v)")
    (b, hq, _, d), (_, hkv, _, dv) = q.shape, tiers[0].v.shape
    for tier in tiers:
        n = tier.k.shape[2]
        if tuple(tier.k.shape) != (b, hkv, n, d) or tuple(tier.v.shape) != (b, hkv, n, dv) or n == 0 or hq % hkv:
            raise ValueError(f"q {tuple(q.shape)}, k {tuple(tier.k.shape)}, v {tuple(tier.v.shape)}: k is (B, Hkv, S, D), v "
                             "(B, Hkv, S, Dv) with Hkv a divisor of Hq, S > 0; leave empty tiers out")
        for name, size in (("lengths", (b, hkv)), ("valid", (b, hkv, n)), ("bias", (b, hkv, n)), ("balance", (b, hkv, 1, d))):
            if (x := getattr(tier, name)) is not None:
                shaped(name, x, size)


def _plain(x: Tensor | Quantized) -> Tensor:
    return x.dequantize() if isinstance(x, Quantized) else x.float()


def _narrow(x: Tensor | Quantized, at: int, stop: int) -> Tensor:
    """Slots at .. stop - 1 in float32."""
    if not isinstance(x, Quantized):
        return x[:, :, at:stop].float()
    t = x.group[0]
    part = slice(at // t, -(-stop // t))
    return Quantized(x.codes[:, :, at:stop], x.scale[:, :, part], x.zero[:, :, part], x.bits, x.group).dequantize()


def _blocks(tier: Slots) -> Iterator[tuple[int, int]]:
    """Runs of slots that begin where every group of tokens begins."""
    group = lcm(*(x.group[0] for x in (tier.k, tier.v) if isinstance(x, Quantized)))
    step, n = max(1, BLOCK // group) * group, tier.k.shape[2]
    return ((at, min(at + step, n)) for at in range(0, n, step))


def _part(q: Tensor, tier: Slots, at: int, stop: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attention to some slots of a tier alone: (B, Hq, Dv) and log-sum-exp (B, Hq), float32."""
    b, hq, _, d = q.shape
    k, v, seen = _narrow(tier.k, at, stop), _narrow(tier.v, at, stop), tier.seen(at, stop)
    hkv = k.shape[1]
    rows = q.float().view(b, hkv, -1, d) * scale
    if tier.balance is not None:
        rows = rows / tier.balance
    logits = rows @ k.transpose(2, 3)                                                                # (B, Hkv, G, s)
    if tier.bias is not None:
        logits = logits + tier.bias.expand(b, hkv, -1)[:, :, None, at:stop].float()
    if seen is not None:
        logits, v = logits.masked_fill(~seen[:, :, None], -torch.inf), v.masked_fill(~seen[..., None], 0)
    lse = logits.logsumexp(-1)
    attention = (logits - lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]).exp()
    return (attention @ v).view(b, hq, -1), lse.view(b, hq)
