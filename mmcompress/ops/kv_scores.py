"""How much each key is attended to, without attention maps: column sums of attention in memory linear in the keys.

The sum over queries of attention to a key is H2O's score (Zhang et al., 2023, arXiv 2306.14048), over all queries, and SnapKV's
(Li et al., 2024, arXiv 2404.14469), over the last few. Under grouped queries both papers' codes repeat keys for every query
head; here a KV head has one score, the sum or the mean over its query heads. No gradient: scores only rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .kernels import Kernel, use_triton

Heads = Literal["sum", "mean"]
ROWS = 1024             # rows of logits that the torch version holds at a time, over batch and heads
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Rows:
    """What a call says, checked and in one form."""
    first: int                  # the column of query 0
    bias: Tensor | None         # (B, Hkv, N) float32 on the logits, -inf where a column does not exist
    weights: Tensor | None      # (B, Hq, M) float32
    causal: bool
    scale: float


@torch.no_grad()
def column_sums(q: Tensor, k: Tensor, *, first: int | None = None, valid: Tensor | None = None, bias: Tensor | None = None,
                weights: Tensor | None = None, lse: Tensor | None = None, heads: Heads = "sum", causal: bool = True,
                scale: float | None = None, kernel: Kernel = "auto") -> Tensor:
    """Attention that each column receives from the queries given. (B, Hkv, N) float32, 0 at columns that do not exist.

    q       (B, Hq, M, D) rotated queries, float32, bfloat16 or float16. A window is a slice: SnapKV's is q[:, :, -w:]
    k       (B, Hkv, N, D) rotated keys; Hkv divides Hq
    first   the column of query 0: query i attends to columns up to first + i. Default N - M, the last M columns
    valid   (B, N) or (B, Hkv, N) bool: which columns exist. A causal query whose own column does not exist counts for nothing
    bias    (B, Hkv, N) float on the logits, such as the log-mass of merged slots
    weights (B, M) or (B, Hq, M): a factor for each query
    lse     (B, Hq, M) float32, log of the sum of exp(logits) of each row, if attention left it (flash kernels do); saves a pass
    heads   over the query heads of a KV head: "sum" (each query head adds 1 a query) or "mean"
    causal  False: every query attends to every column, wherever it comes from; `first` has no meaning
    scale   factor of the logits, default 1 / sqrt(D)
    kernel  "auto" (Triton on a GPU where it is installed), "torch", "triton"

    Memory is linear in N: the torch version holds `ROWS` rows of logits, the Triton twin one tile. Raises ValueError on shapes.
    """
    rows = prepare(q, k, first, valid, bias, weights, lse, causal, scale, heads)
    if use_triton(kernel, q):
        from .triton.kv_scores import column_sums as fused

        sums = fused(q, k, rows, lse)
    else:
        sums = _tiled(q, k, rows, lse)
    return sums / (q.shape[1] // k.shape[1]) if heads == "mean" else sums


def add_column_sums(sums: Tensor | None, q: Tensor, k: Tensor, *, first: int | None = None, valid: Tensor | None = None,
                    bias: Tensor | None = None, weights: Tensor | None = None, lse: Tensor | None = None, heads: Heads = "sum",
                    scale: float | None = None, kernel: Kernel = "auto") -> Tensor:
    """Running column sums when a chunk of queries arrives: `sums` of the columns before, plus this chunk's. (B, Hkv, N) float32

    sums (B, Hkv, P), P <= N, or None before the first chunk; q the chunk, whose own keys are the last of k (B, Hkv, N, D); the
    rest as in `column_sums`. A causal row is complete when its own prefix is there, so chunks add up to the whole, up to
    rounding, however they are cut. Where columns were evicted in between, gather `sums` as the keys were gathered.
    """
    new = column_sums(q, k, first=first, valid=valid, bias=bias, weights=weights, lse=lse, heads=heads, scale=scale,
                      kernel=kernel)
    if sums is None:
        return new
    if sums.shape[:2] != new.shape[:2] or sums.shape[2] > new.shape[2]:
        raise ValueError(f"sums {tuple(sums.shape)} for keys {tuple(k.shape)}: sums are (B, Hkv, P) of the first P <= N keys")
    new[..., :sums.shape[2]] += sums
    return new


@torch.no_grad()
def row_lse(q: Tensor, k: Tensor, *, first: int | None = None, valid: Tensor | None = None, bias: Tensor | None = None,
            causal: bool = True, scale: float | None = None, kernel: Kernel = "auto") -> Tensor:
    """Log of the sum of exp(logits) of each query. (B, Hq, M) float32, -inf where a query sees nothing. As in `column_sums`."""
    rows = prepare(q, k, first, valid, bias, None, None, causal, scale, "sum")
    if use_triton(kernel, q):
        from .triton.kv_scores import row_lse as fused

        return fused(q, k, rows)
    tiles = [_logits(q[:, :, at:stop], k, rows, at).logsumexp(-1).flatten(1, 2) for at, stop in _blocks(q)]
    return torch.cat(tiles, 2)


@torch.no_grad()
def column_sums_reference(q: Tensor, k: Tensor, *, first: int | None = None, valid: Tensor | None = None,
                          bias: Tensor | None = None, weights: Tensor | None = None, heads: Heads = "sum", causal: bool = True,
                          scale: float | None = None) -> Tensor:
    """`column_sums` by its definition, with the whole attention map in float32: O(M N) memory."""
    rows = prepare(q, k, first, valid, bias, weights, None, causal, scale, heads)
    attention = torch.nan_to_num(_logits(q, k, rows, 0, whole=True).softmax(-1))                     # (B, Hkv, G, M, N)
    if rows.weights is not None:
        attention = attention * rows.weights.view(*attention.shape[:4], 1)
    return attention.sum((2, 3)) if heads == "sum" else attention.sum(3).mean(2)


def prepare(q: Tensor, k: Tensor, first: int | None, valid: Tensor | None, bias: Tensor | None, weights: Tensor | None,
            lse: Tensor | None, causal: bool, scale: float | None, heads: str) -> Rows:
    """Check a call and bring masks, biases and weights into one form."""
    if heads not in ("sum", "mean"):
        raise ValueError(f"heads={heads!r}: 'sum' or 'mean' over the query heads of a KV head")
    check_heads(q, k)
    (b, hq, m, d), (_, hkv, n, _) = q.shape, k.shape
    first = n - m if first is None else first
    if causal and not 0 <= first <= n - m:
        raise ValueError(f"first={first} for {m} queries and {n} keys: causal queries stand at columns first .. first + "
                         f"{m - 1}, all of them keys; pass causal=False for queries that stand elsewhere")
    if weights is not None:
        weights = shaped("weights", weights, (b, hq, m)).float()
    if lse is not None:
        shaped("lse", lse, (b, hq, m))
    if bias is not None:
        bias = shaped("bias", bias, (b, hkv, n)).float()
    if valid is not None:
        valid = shaped("valid", valid, (b, hkv, n)).bool()
        bias = torch.zeros_like(valid, dtype=torch.float32).masked_fill(~valid, -torch.inf) if bias is None else \
            bias.masked_fill(~valid, -torch.inf)
        if causal:
            own = valid[..., first:first + m].repeat_interleave(hq // hkv, 1).float()                # (B, Hq, M)
            weights = own if weights is None else weights * own
    return Rows(first, bias, weights, causal, d ** -0.5 if scale is None else scale)


def check_heads(q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless q (B, Hq, M, D) and k (B, Hkv, N, D) fit together."""
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}: q is (B, Hq, M, D) and k (B, Hkv, N, D), none of them empty")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads, {k.shape[1]} KV heads: KV heads divide query heads")
    if q.dtype != k.dtype or q.dtype not in DTYPES:
        raise ValueError(f"q {q.dtype}, k {k.dtype}: both float32, bfloat16 or float16; convert one with .to()")


def shaped(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x as a view of this shape (B, H, L), from it, from (B, L) or from sizes of 1; ValueError if it is neither."""
    wide = x[:, None] if x.dim() == 2 and len(shape) == 3 else x
    if wide.dim() != len(shape) or any(have not in (1, want) for have, want in zip(wide.shape, shape)):
        raise ValueError(f"{name} {tuple(x.shape)}: expected {shape} or {(shape[0], shape[-1])}")
    return wide.expand(shape)


def _blocks(q: Tensor) -> list[tuple[int, int]]:
    """Runs [at, stop) of queries, so that about `ROWS` rows of logits exist at a time."""
    size = max(1, ROWS // (q.shape[0] * q.shape[1]))
    return [(at, min(at + size, q.shape[2])) for at in range(0, q.shape[2], size)]


def _logits(q: Tensor, k: Tensor, rows: Rows, at: int, whole: bool = False) -> Tensor:
    """Logits of queries at, at + 1, .. to the columns that one of them sees, or to the whole. (B, Hkv, G, R, n) float32"""
    b, _, r, d = q.shape
    n = min(k.shape[2], rows.first + at + r) if rows.causal and not whole else k.shape[2]
    wide = q.float().reshape(b, k.shape[1], -1, d)
    logits = (wide * rows.scale @ k[:, :, :n].float().transpose(2, 3)).view(b, k.shape[1], -1, r, n)
    if rows.bias is not None:
        logits = logits + rows.bias[:, :, None, None, :n]
    if rows.causal:
        place = torch.arange(n, device=k.device)
        logits.masked_fill_(place > rows.first + at + torch.arange(r, device=k.device)[:, None], -torch.inf)
    return logits


def _tiled(q: Tensor, k: Tensor, rows: Rows, lse: Tensor | None) -> Tensor:
    """Column sums, a block of queries at a time with all it sees; so a row is complete at once and one pass is enough."""
    sums = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
    k = k.float()
    for at, stop in _blocks(q):
        logits = _logits(q[:, :, at:stop], k, rows, at)                                              # (B, Hkv, G, R, n)
        total = logits.logsumexp(-1) if lse is None else lse[:, :, at:stop].float().view(logits.shape[:4])
        total = total.masked_fill(total == -torch.inf, torch.inf)                   # a row that sees nothing gives nothing
        attention = logits.sub_(total[..., None]).exp_()
        if rows.weights is not None:
            attention.mul_(rows.weights[:, :, at:stop].reshape(logits.shape[:4])[..., None])
        sums[..., :attention.shape[-1]] += attention.sum((2, 3))
    return sums
