"""Attention over slots: one function under a name of our own, exact for every layer's and every head's slots.

Where a layer holds every column it calls the stock function, so that nothing differs by a bit. Elsewhere the stock model's own
mask (padding, blocks of pictures, a mask the caller gave) is looked up by each slot's column. Pure torch: the reference of what
a fused kernel has to compute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedModelError
from .slots import Slots
from .view import Sight, weights

LAYER = "_mmcompress_slots"     # on the keys that a layer's `update` returns: the layer
ROOM = 2**24                    # logits held at a time where queries are many
STOCK = ("sdpa", "eager")       # the implementations that a compressed cache can stand on


def name_of(stock: str) -> str:
    """Our name for attention that falls back to a stock implementation."""
    return f"mmcompress_{stock}"


def is_ours(implementation: str | None) -> bool:
    """Whether a config's attention looks at slots."""
    return implementation in {name_of(stock) for stock in STOCK}


def register() -> None:
    """Make our names known to transformers; the masks under them are the stock ones."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for stock in STOCK:
        masks: Any = AttentionMaskInterface()[stock]
        AttentionInterface.register(name_of(stock), partial(slot_attention, stock))
        AttentionMaskInterface.register(name_of(stock), masks)


def slot_attention(stock: str, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                   scaling: float | None = None, dropout: float = 0.0, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """As transformers calls an attention function. query (B, H, Q, d) -> (B, Q, H, d_v), and weights or None"""
    layer = getattr(key, LAYER, None)
    if layer is None or layer.whole:
        given = {} if scaling is None else {"scaling": scaling}
        out = _stock(stock, module)(module, query, key, value, attention_mask, dropout=dropout, **given, **kwargs)
        if layer is None:
            return out                                      # no cache, or a layer of another kind
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    sight = Sight(attention_mask, layer.seen - query.shape[2])
    layer.note(sight, kwargs.get("position_ids"))
    if not layer.whole:
        if kwargs.get("s_aux") is not None:
            raise UnsupportedModelError(f"{type(module).__name__} has attention sinks of its own (s_aux), which a compressed "
                                        f"cache does not know; detach(model) and run it stock")
        attend = attend_explicit if stock == "eager" else attend_sdpa
        out = attend(query, layer.slots, sight, scaling, dropout, kwargs.get("softcap"))
    layer.settle(query, sight, scaling)
    return out


def attend_sdpa(query: Tensor, slots: Slots, sight: Sight, scaling: float, dropout: float = 0.0, softcap: float | None = None
                ) -> tuple[Tensor, None]:
    """Attention over slots by torch's fused kernels; with masses explicitly, since their logits need float32."""
    if slots.bias is not None or softcap is not None:
        return attend_explicit(query, slots, sight, scaling, dropout, softcap)[0], None
    batch, heads, length, _ = query.shape
    groups = heads // slots.keys.shape[1]
    seen = sight.seen(slots, torch.arange(length, device=query.device).expand(batch, -1))           # (B, H_kv, Q, N)
    seen = seen[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)
    out = F.scaled_dot_product_attention(query.unflatten(1, (-1, groups)).flatten(2, 3), slots.keys, slots.values,
                                         attn_mask=seen, dropout_p=dropout, scale=scaling)          # (B, H_kv, G Q, d_v)
    return _by_token(out.unflatten(2, (groups, length))), None


def attend_explicit(query: Tensor, slots: Slots, sight: Sight, scaling: float, dropout: float = 0.0,
                    softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention over slots with its weights (B, H, Q, N), in tiles of queries."""
    batch, heads, length, _ = query.shape
    grouped = query.unflatten(1, (slots.keys.shape[1], -1))                                         # (B, H_kv, G, Q, d)
    tile = max(1, ROOM // (batch * heads * slots.count))
    outs, maps = [], []
    for at in range(0, length, tile):
        rows = torch.arange(at, min(at + tile, length), device=query.device).expand(batch, -1)
        paid = weights(grouped[..., at:at + tile, :], slots, sight.seen(slots, rows), scaling, softcap).to(query.dtype)
        paid = F.dropout(paid, dropout)
        outs.append((paid.flatten(2, 3) @ slots.values).unflatten(2, paid.shape[2:4]))
        maps.append(paid)
    return _by_token(torch.cat(outs, 3)), torch.cat(maps, 3).flatten(1, 2)


def _by_token(out: Tensor) -> Tensor:
    """(B, H_kv, G, Q, d) -> (B, Q, H, d)"""
    return out.flatten(1, 2).transpose(1, 2).contiguous()


def _stock(name: str, module: Any) -> Callable[..., Any]:
    """The stock attention function: a registered one, or the eager one of the module's own file."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Callable[..., Any] | None = ALL_ATTENTION_FUNCTIONS.get(name, own)
    if found is None:
        raise UnsupportedModelError(f"{type(module).__module__} has no eager_attention_forward; load the model with "
                                    f"attn_implementation='sdpa'")
    return found
