"""AdamW, or Muon for the layers' matrices beside it; one learning-rate curve for both."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .recipe import Optim


def build_optimizers(learner: Any, how: Optim) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters that learn, or Muon for the matrices and AdamW for the rest.

    Muon (Jordan 2024) makes every update of a matrix nearly orthogonal, which is meant for maps between hidden states:
    embeddings, the output layer, the helper heads, norms and biases stay with AdamW. Its step is scaled by
    0.2 sqrt(max(rows, columns)), so that both optimizers' learning rates mean about the same (Moonlight, arXiv 2502.16982).
    Decay does not touch vectors.
    """
    named = [(n, p) for n, p in learner.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if how.name == "muon" and _is_map(n, p)]
    taken = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [{"params": [p for p in rest if p.ndim > 1], "weight_decay": how.weight_decay},
              {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0}]
    on_gpu = any(p.is_cuda for p in rest)
    out: list[torch.optim.Optimizer] = [torch.optim.AdamW([g for g in groups if g["params"]], lr=how.lr,
                                                          betas=(how.betas[0], how.betas[1]), fused=on_gpu)]
    if matrices:
        out.append(_muon()(matrices, lr=how.muon_lr, weight_decay=how.weight_decay, adjust_lr_fn="match_rms_adamw"))
    for optimizer in out:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return out


def _is_map(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and (".layers." in name or "multi_modal_projector" in name)


def _muon() -> Any:
    try:
        return torch.optim.Muon
    except AttributeError:
        raise ImportError(f"optim.name='muon' needs torch 2.9 or newer, this is {torch.__version__}; "
                          f"upgrade torch, or use optim.name=adamw") from None


def rate(step: int, steps: int, how: Optim) -> float:
    """Share of the base learning rate at a 0-based step: a linear warm-up times a cosine from 1 to `floor`."""
    warm = min(1.0, (step + 1) / how.warmup) if how.warmup else 1.0
    return warm * (how.floor + (1 - how.floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def set_rate(optimizers: list[Any], share: float) -> float:
    """Set every group's learning rate; -> that of the first."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * share
    return optimizers[0].param_groups[0]["lr"]
