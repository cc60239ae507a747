"""Attention that tokens of a prompt pay and receive, recomputed at one decoder layer without the map of all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .masks import Columns

INSTEAD = "use StagePool, or a reducer before the language model"
ROOM = 2**24            # logits held at a time where all tokens of a prompt are asked


@dataclass(frozen=True, eq=False)
class Reading:
    """One decoder layer's rotated queries and keys in one call, without its attention map.

    layer    a Llama-like decoder layer: input_layernorm, self_attn with q_proj and k_proj, rotary positions
    hidden   (B, L, D) that enter it
    kwargs   its other arguments: position_embeddings, attention_mask, past_key_values
    columns  which of the L are padding

    Softmaxes run over all that a query sees, cached prompts included, as in the layer itself.
    """

    layer: Any
    hidden: Tensor
    kwargs: dict[str, Any]
    columns: Columns

    def __post_init__(self) -> None:
        attn = self.layer.self_attn
        for name in ("attn_logit_softcapping", "sinks"):
            if getattr(attn, name, None) is not None:
                raise UnsupportedModelError(f"{type(attn).__name__} changes its logits ({name}), which a reducer that reads "
                                            f"attention would not see; {INSTEAD}")
        if not (hasattr(attn, "q_proj") and hasattr(attn, "k_proj") and hasattr(self.layer, "input_layernorm")):
            raise UnsupportedModelError(f"{type(attn).__name__} has no separate query and key projections to read attention "
                                        f"from; {INSTEAD}")

    @cached_property
    def normed(self) -> Tensor:
        return self.layer.input_layernorm(self.hidden)

    @cached_property
    def keys(self) -> Tensor:
        """Of the call's own columns. (B, H_kv, L, d)"""
        cos, sin = (e.expand(len(self.hidden), -1, -1) for e in self.kwargs["position_embeddings"])
        return _rotation_of(self.layer.self_attn)(_heads(self.layer.self_attn, "k", self.normed), cos, sin)

    @cached_property
    def past(self) -> Tensor | None:
        """Keys that the cache holds already. (B, H_kv, C, d)"""
        return _cached_keys(self.layer.self_attn, self.kwargs.get("past_key_values"))

    @cached_property
    def all_keys(self) -> Tensor:
        """(B, H_kv, C + L, d) float32"""
        keys = self.keys if self.past is None else torch.cat([self.past.to(self.keys.device, self.keys.dtype), self.keys], 2)
        return keys.float()

    def probabilities(self, queries: Tensor) -> Tensor:
        """What some columns pay the call's own. queries (B, Q) int64 -> (B, H_kv, H / H_kv, Q, L) float32"""
        attn, past = self.layer.self_attn, 0 if self.past is None else self.past.shape[2]
        asking = self.normed.gather(1, queries[..., None].expand(-1, -1, self.normed.shape[-1]))    # (B, Q, D)
        cos, sin = (e.expand(len(asking), -1, -1) for e in self.kwargs["position_embeddings"])
        spread = queries[..., None].expand(-1, -1, cos.shape[-1])
        query = _rotation_of(attn)(_heads(attn, "q", asking), cos.gather(1, spread), sin.gather(1, spread))
        groups = query.unflatten(1, (self.keys.shape[1], -1))                                       # (B, H_kv, G, Q, d)
        logits = groups.flatten(2, 3).float() @ self.all_keys.transpose(2, 3) * attn.scaling        # (B, H_kv, G Q, C + L)
        logits = logits.unflatten(2, groups.shape[2:4])
        seen = _seen(self.kwargs.get("attention_mask"), queries, self.columns, past, logits)[:, :, None]
        return (logits + seen).softmax(-1)[..., past:]

    def paid(self, queries: Tensor) -> Tensor:
        """What the querying columns pay each, averaged over heads and queries. (B, Q) int64, -1 padding -> (B, L) float32"""
        paid = self.probabilities(queries.clamp_min(0)).mean((1, 2))                                # (B, Q, L)
        asked = (queries >= 0).float()[..., None]
        return (paid * asked).sum(1) / asked.sum(1).clamp_min(1)

    def received(self, asking: Tensor, room: int = ROOM) -> Tensor:
        """What each column receives from those that are `asking` (B, L) bool, summed over heads and queries. (B, L) float32

        Exact, in tiles of as many queries as make about `room` logits, so memory is linear in L.
        """
        batch, length = asking.shape
        heads = self.keys.shape[1] * getattr(self.layer.self_attn, "num_key_value_groups", 1)
        tile = max(1, room // (batch * heads * self.all_keys.shape[2]))
        total = torch.zeros(batch, length, dtype=torch.float32, device=asking.device)
        for at in range(0, length, tile):
            asked = asking[:, at:at + tile]
            queries = torch.arange(at, at + asked.shape[1], device=asking.device).expand(batch, -1)
            paid = self.probabilities(queries)
            total += paid.masked_fill(~asked[:, None, None, :, None], 0).sum((1, 2, 3))             # padding sees nothing: NaN
        return total


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
                                    f"cannot be recomputed; {INSTEAD}")
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
