"""The consistency loss: a reduced run learns to say what the full run says, so that a model loses less when tokens go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import from_inside
from ..config import WrapConfig, build_layers
from ..tokens import KeepAll
from ..wrap import Wrapped


@dataclass(frozen=True, eq=False)
class Consistency:
    """One batch seen twice. Losses are scalars with gradients; `kl` has none towards the full run."""

    full_loss: Tensor           # cross entropy with all tokens
    reduced_loss: Tensor        # cross entropy with few
    kl: Tensor                  # KL(full, stopped || reduced), mean over answer tokens
    full: Any                   # the stock outputs
    reduced: Any


def consistency(model: Any, batch: Mapping[str, Any], *, image: Any = None, layers: Any = (), positions: Any = None,
                temperature: float = 1.0) -> Consistency:
    """Run a batch with few and with all image tokens; the pictures are encoded once.

    model        not wrapped; may be inside DDP, FSDP or PEFT
    batch        processor inputs with labels (B, L), -100 outside answers
    image, layers, positions    what is reduced, as in `wrap`
    temperature  of both distributions; the loss is multiplied by its square

    The usual objective is full_loss + reduced_loss + weight * kl.
    """
    if batch.get("labels") is None:
        raise ValueError("consistency() compares answers: the batch needs labels, -100 outside answers")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: must be positive")
    config = WrapConfig(image=image, layers=build_layers(layers), positions=positions)
    with Wrapped(from_inside(model), config) as handle, handle.encoding_shared():
        reduced = model(**batch)
        prompt = handle.prompt
        handle.configure(WrapConfig(image=KeepAll()))
        full = model(**batch)
    labels = batch["labels"]
    said = torch.zeros_like(labels, dtype=torch.bool)
    said[:, :-1] = labels[:, 1:] != -100                                        # logits here predict an answer's token
    target = full.logits.detach()
    if prompt is not None:
        said = prompt.select(said.long(), 0).bool()
        column = prompt.column.to(target.device).clamp_min(0)
        target = target.gather(1, column[..., None].expand(-1, -1, target.shape[-1]))
    return Consistency(full.loss, reduced.loss, answer_kl(target, reduced.logits, said, temperature), full, reduced)


def answer_kl(target: Tensor, logits: Tensor, said: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(target || logits), mean over the tokens where `said`. target, logits (B, L, V), said (B, L) bool -> scalar"""
    p = F.log_softmax(target.float() / temperature, -1)
    q = F.log_softmax(logits.float() / temperature, -1)
    each = (p.exp() * (p - q)).sum(-1)                                          # (B, L)
    return temperature**2 * (each * said).sum() / said.sum().clamp_min(1)
