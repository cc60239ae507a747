"""What held-out sound says of a codec."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...audio.codec import relative_error
from ...audio.xcodec.losses import spectral_loss


@torch.no_grad()
def measure(model: Any, batches: Iterable[Tensor]) -> dict[str, Any]:
    """Over batches (B, 1, T), with all books:

    convergence, log    the two full-band spectral losses, means over segments
    error               squared error of the waveform as a share of its energy; 1 is as bad as silence
    semantic            share of the teacher's variance that the semantic decoder does not explain; None without semantics
    used, perplexity    of each book: share of its codes that occur, 2 ** entropy
    frames              how many were counted
    """
    was_training = model.training
    model.eval()
    try:
        return _measure(model, batches)
    finally:
        model.train(was_training)


def _measure(model: Any, batches: Iterable[Tensor]) -> dict[str, Any]:
    size = model.config.codebook_size
    counts = torch.zeros(model.quantizer.num_quantizers, size, dtype=torch.float64)
    sums = {"convergence": 0.0, "log": 0.0, "error": 0.0}
    segments, said, moments = 0, 0.0, torch.zeros(3, model.config.semantic_hidden_size, dtype=torch.float64)
    for audio in batches:
        device = next(model.parameters()).device
        out = model(audio.to(device))
        for one, made in zip(audio.flatten(0, 1), out.waveform.flatten(0, 1).float().cpu()):
            convergence, log = spectral_loss(made[None], one[None])
            sums["convergence"] += convergence.item()
            sums["log"] += log.item()
            sums["error"] += relative_error(one, made)
        segments += len(audio)
        for book, codes in enumerate(out.codes.transpose(0, 1).flatten(1).cpu()):
            counts[book] += torch.bincount(codes, minlength=size)
        teacher = out.teacher.transpose(1, 2).flatten(0, 1).double().cpu()
        moments += torch.stack([torch.ones_like(teacher[0]) * len(teacher), teacher.sum(0), teacher.square().sum(0)])
        said += (out.semantic - out.teacher).double().square().sum().item()
    share = counts / counts.sum(1, keepdim=True)
    entropy = -torch.special.xlogy(share, share).sum(1)
    n, total, squares = moments
    spread = float((squares - total.square() / n.clamp_min(1)).sum())
    return {"segments": segments, **{name: value / segments for name, value in sums.items()},
            "semantic": said / spread if model.semantic else None, "frames": int(counts[0].sum()),
            "used": (counts > 0).double().mean(1).tolist(), "perplexity": entropy.exp().tolist()}
