"""Attention that a few tokens of a prompt pay, recomputed at one decoder layer without the map of all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .masks import Columns


def attention_paid(layer: Any, hidden: Tensor, queries: Tensor, kwargs: dict[str, Any], columns: Columns) -> Tensor:
    """What the querying tokens pay each column of a call, averaged over heads and queries. -> (B, L) float32

    layer    a Llama-like decoder layer: input_layernorm, self_attn with q_proj and k_proj, rotary positions
    hidden   (B, L, D) that enter it
    queries  (B, Q) int64 columns, -1 padding
    kwargs   its other arguments: position_embeddings, attention_mask, past_key_values
    columns  which of the L are padding

    The softmax runs over all that a query sees, cached prompts included, as in the layer itself.
    """
    attn = layer.self_attn
    for name in ("attn_logit_softcapping", "sinks"):
        if getattr(attn, name, None) is not None:
            raise UnsupportedModelError(f"{type(attn).__name__} changes its logits ({name}), which FastV and PyramidDrop would "
                                        f"not see; use StagePool or an image reducer")
    if not (hasattr(attn, "q_proj") and hasattr(attn, "k_proj") and hasattr(layer, "input_layernorm")):
        raise UnsupportedModelError(f"{type(attn).__name__} has no separate query and key projections to read attention from; "
                                    f"use StagePool or an image reducer")
    at = queries.clamp_min(0)
    normed = layer.input_layernorm(hidden)
    asking = normed.gather(1, at[..., None].expand(-1, -1, normed.shape[-1]))               # (B, Q, D)
    cos, sin = (e.expand(len(hidden), -1, -1) for e in kwargs["position_embeddings"])
    spread = at[..., None].expand(-1, -1, cos.shape[-1])
    rotate = _rotation_of(attn)
    query = rotate(_heads(attn, "q", asking), cos.gather(1, spread), sin.gather(1, spread))  # (B, H, Q, d)
    keys = rotate(_heads(attn, "k", normed), cos, sin)                                       # (B, H_kv, L, d)
    earlier = _cached_keys(attn, kwargs.get("past_key_values"))
    past = 0 if earlier is None else earlier.shape[2]
    if earlier is not None:
        keys = torch.cat([earlier.to(keys.device, keys.dtype), keys], 2)
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
    logits = query.float() @ keys.float().transpose(2, 3) * attn.scaling                    # (B, H, Q, past + L)
    logits = logits + _seen(kwargs.get("attention_mask"), at, columns, past, logits)
    paid = logits.softmax(-1)[..., past:].mean(1)                                            # (B, Q, L)
    asked = (queries >= 0).float()[..., None]
    return (paid * asked).sum(1) / asked.sum(1).clamp_min(1)


def _heads(attn: Any, kind: str, x: Tensor) -> Tensor:
    """Queries or keys before rotation. (B, L, D) -> (B, H, L, d)"""
    out = getattr(attn, f"{kind}_proj")(x).unflatten(-1, (-1, attn.head_dim))
    norm = getattr(attn, f"{kind}_norm", None)
    return (out if norm is None else norm(out)).transpose(1, 2)


def _rotation_of(attn: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The model's own rotary rotation of one tensor (B, H, L, d) by cos and sin (B, L, d)."""
    module = sys.modules[type(attn).__module__]
    both = getattr(module, "apply_rotary_pos_emb", None)
    if both is None:
        raise UnsupportedModelError(f"{module.__name__} has no apply_rotary_pos_emb, so the attention of {type(attn).__name__} "
                                    f"cannot be recomputed; use StagePool or an image reducer")
    return lambda x, cos, sin: both(x, x, cos, sin)[0]


def _cached_keys(attn: Any, cache: Any) -> Tensor | None:
    """The rotated keys that a layer's cache holds already. (B, H_kv, C, d)"""
    if cache is None or (length := int(cache.get_seq_length(attn.layer_idx))) == 0:
        return None
    keys = getattr(cache.layers[attn.layer_idx], "keys", None)
    if not isinstance(keys, Tensor) or keys.ndim != 4 or keys.shape[2] < length:
        raise UnsupportedModelError(f"{type(cache.layers[attn.layer_idx]).__name__} does not show the keys it holds, which a "
                                    f"new picture is ranked against; use a dynamic or static cache, or a fresh one")
    return keys[:, :, :length]


def _seen(mask: Any, queries: Tensor, columns: Columns, past: int, logits: Tensor) -> Tensor:
    """0 where a query sees a column, -inf elsewhere. (B, 1, Q, past + L)"""
    length = logits.shape[-1] - past
    if isinstance(mask, Tensor) and mask.ndim == 4:
        rows = mask[..., :past + length].expand(len(queries), 1, -1, -1)
        rows = rows.gather(2, queries[:, None, :, None].expand(-1, -1, -1, rows.shape[-1]))
        seen = rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
    else:
        key = torch.arange(past + length, device=queries.device)
        seen = (key <= past + queries[:, None, :, None])
        if isinstance(mask, Tensor):                                                        # FlashAttention's
            seen = seen & mask.bool()[:, None, None]
        elif columns.index is not None:
            own = torch.nn.functional.pad(columns.index >= 0, (past, 0), value=True)
            seen = seen & own[:, None, None]
    return torch.zeros(seen.shape, device=logits.device).masked_fill(~seen, -torch.inf)
