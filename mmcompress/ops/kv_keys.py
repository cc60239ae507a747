"""Scores of keys by themselves, and SnapKV's pooling of scores along the sequence. Higher is kept; no gradient."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import Kernel, use_triton
from .kv_scores import shaped

Pool = Literal["avg", "max"]
BLOCK = 4096                    # keys that the torch version holds in float32 at a time


@torch.no_grad()
def pool_scores(scores: Tensor, kernel_size: int = 5, kind: Pool = "avg", valid: Tensor | None = None) -> Tensor:
    """Scores smoothed along the sequence, so that neighbours of a wanted key come along. (B, H, N) float32, -inf if not valid

    scores (B, H, N), valid (B, N) or (B, H, N) bool. As in SnapKV's code, a window that reaches over an edge counts zeros there
    ("avg") or nothing ("max"); columns that do not exist count the same, so a padded row equals the row alone. 5 and "avg" are
    its code's defaults, 7 and "max" other settings in use. Gather ragged slots first: neighbours are neighbours in memory.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}: an odd number of columns, such as 5 or 7")
    if kind not in ("avg", "max"):
        raise ValueError(f"kind={kind!r}: 'avg' or 'max'")
    scores, pad = scores.float(), kernel_size // 2
    if valid is not None:
        valid = shaped("valid", valid, tuple(scores.shape)).bool()
        scores = scores.masked_fill(~valid, 0 if kind == "avg" else -torch.inf)
    pooled = F.avg_pool1d(scores, kernel_size, 1, pad) if kind == "avg" else F.max_pool1d(scores, kernel_size, 1, pad)
    return pooled if valid is None else pooled.masked_fill(~valid, -torch.inf)


@torch.no_grad()
def key_norm(k: Tensor, valid: Tensor | None = None, kernel: Kernel = "auto") -> Tensor:
    """-||k||: keys of small norm are attended to most (Devoto et al., 2024, arXiv 2406.11430). (B, H, N) float32

    -inf where a key does not exist. k (B, H, N, D), valid (B, N) or (B, H, N) bool; kernel as in `column_sums`.
    """
    if use_triton(kernel, k):
        from .triton.kv_keys import key_norm as fused

        return fused(k, _mask(k, valid))
    return _hide(-torch.linalg.vector_norm(k, dim=-1, dtype=torch.float32), _mask(k, valid))


@torch.no_grad()
def key_diversity(k: Tensor, valid: Tensor | None = None, kernel: Kernel = "auto") -> Tensor:
    """-cos(k, mean of the unit keys): keys unlike the others stay (KeyDiff, Park et al., 2025, arXiv 2504.15364). As `key_norm`

    The mean is over the valid keys of the row and head; a key of zero counts as zero, and its own cosine is 0.
    """
    mask = _mask(k, valid)
    if use_triton(kernel, k):
        from .triton.kv_keys import key_diversity as fused

        return fused(k, mask)
    total = torch.zeros(*k.shape[:2], 1, k.shape[3], device=k.device)
    for at in range(0, k.shape[2], BLOCK):
        unit = F.normalize(k[:, :, at:at + BLOCK].float(), dim=-1)
        total += (unit if mask is None else unit.masked_fill(~mask[:, :, at:at + BLOCK, None], 0)).sum(2, keepdim=True)
    anchor = F.normalize(total, dim=-1).transpose(2, 3)                                              # (B, H, D, 1)
    cosine = [(F.normalize(k[:, :, at:at + BLOCK].float(), dim=-1) @ anchor)[..., 0] for at in range(0, k.shape[2], BLOCK)]
    return _hide(-torch.cat(cosine, 2), mask)


def key_diversity_reference(k: Tensor, valid: Tensor | None = None) -> Tensor:
    """`key_diversity` by its definition, all keys in float32 at once."""
    mask = torch.ones(k.shape[:3], dtype=torch.bool, device=k.device) if valid is None else shaped("valid", valid, k.shape[:3])
    unit = F.normalize(k.float(), dim=-1)
    mean = (unit * mask[..., None]).sum(2, keepdim=True) / mask.sum(2)[..., None, None].clamp_min(1)
    return -F.cosine_similarity(k.float(), mean, dim=-1).masked_fill(~mask, torch.inf)


def _mask(k: Tensor, valid: Tensor | None) -> Tensor | None:
    if k.dim() != 4 or 0 in k.shape:
        raise ValueError(f"k {tuple(k.shape)}: (B, H, N, D), not empty")
    return None if valid is None else shaped("valid", valid, tuple(k.shape[:3])).bool()


def _hide(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)
