"""Attention over slots: one function under a name of our own, exact for every layer's and every head's slots.

Where a layer holds every column it calls the stock function, so that nothing differs by a bit. Elsewhere the stock model's own
mask (padding, blocks of pictures, a mask the caller gave) is looked up by each slot's column; in the static form (`static.py`)
causality and validity say all. One new token goes through `ops.kv_decode` where slots are in few bits, in several parts, or on
a GPU with Triton; more of them through torch, over slots restored for this layer alone.

FlashAttention as the stock implementation runs whole layers; slots are attended as with SDPA. No flash package was at hand:
what was run is a stand-in of the same signature, and the 2-D masks that transformers makes for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedModelError
from ..ops import kv_decode
from ..ops.kernels import use_triton
from ..ops.kv_scores import DTYPES
from .parts import Parts, by_heads, joined
from .slots import Heads, Slots, exactly, tensor
from .stores import InBits
from .view import Sight, weights

LAYER = "_mmcompress_slots"     # on the keys that a layer's `update` returns: the layer
OPEN = "_mmcompress_open"       # likewise: a layer of the static form
ROOM = 2**24                    # logits held at a time where queries are many
FLASH = ("flash_attention_2", "flash_attention_3")
STOCK = ("sdpa", "eager", *FLASH)   # the implementations that a compressed cache can stand on


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
    still = getattr(key, OPEN, None)
    if still is not None:
        _refuse_sinks(module, kwargs)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend_parts(stock, query, still.parts, still.sight(query.shape[2]), scaling, dropout, kwargs.get("softcap"),
                            still.routes)
    layer = getattr(key, LAYER, None)
    if layer is None or layer.whole:
        given = {} if scaling is None else {"scaling": scaling}
        called = _as_stock(module, stock) if stock in FLASH else module
        out = _stock(stock, module)(called, query, key, value, attention_mask, dropout=dropout, **given, **kwargs)
        if layer is None:
            return out                                      # no cache, or a layer of another kind
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    sight = Sight(attention_mask, layer.seen - query.shape[2])
    layer.note(sight, kwargs.get("position_ids"), len(query), query.device)
    if not layer.whole:
        _refuse_sinks(module, kwargs)
        out = attend_parts(stock, query, layer.parts, sight, scaling, dropout, kwargs.get("softcap"), layer.routes)
    layer.settle(query, sight, scaling, kwargs.get("softcap"))
    return out


@dataclass(frozen=True, eq=False)
class Routes:
    """Where the groups of heads are: the index of each, and the order that puts their outputs, joined, back."""

    heads: dict[Heads | None, Tensor]
    order: Tensor


def routes_of(parts: Parts, device: torch.device) -> Routes | None:
    """The routes of parts of some heads each; None where a part has all."""
    groups = list(by_heads(parts))
    if None in groups:
        return None
    heads: dict[Heads | None, Tensor] = {own: torch.tensor(own, device=device) for own in groups}
    return Routes(heads, torch.cat(list(heads.values())).argsort())


def attend_parts(stock: str, query: Tensor, parts: Parts, sight: Sight, scaling: float, dropout: float = 0.0,
                 softcap: float | None = None, routes: Routes | None = None) -> tuple[Tensor, Tensor | None]:
    """Attention of each group of heads over its own parts. -> (B, Q, H, d_v), and with eager the weights (B, H, Q, N)

    routes  `routes_of(parts)`, where they are known from before
    """
    groups = by_heads(parts)
    if None in groups:
        return _attend(stock, query, groups[None], sight, scaling, dropout, softcap)
    routes = routes_of(parts, query.device) if routes is None else routes
    assert routes is not None
    order = routes.order
    grouped = query.unflatten(1, (len(order), -1))                                                  # (B, H_kv, G, Q, d)
    outs, maps = zip(*[_attend(stock, grouped.index_select(1, routes.heads[heads]).flatten(1, 2), own, sight, scaling, dropout,
                               softcap) for heads, own in groups.items()])
    by_head = lambda x, dim: x.unflatten(dim, (-1, grouped.shape[2])).index_select(dim, order).flatten(dim, dim + 1)  # noqa: E731
    out = by_head(torch.cat(outs, 2), 2).contiguous()
    if maps[0] is None:
        return out, None
    most = max([m.shape[-1] for m in maps])
    return out, by_head(torch.cat([F.pad(m, (0, most - m.shape[-1])) for m in maps], 1), 1)


def _attend(stock: str, query: Tensor, parts: Parts, sight: Sight, scaling: float, dropout: float, softcap: float | None
            ) -> tuple[Tensor, Tensor | None]:
    """Attention of some heads over all their parts."""
    fused = query.shape[2] == 1 and stock != "eager" and not dropout and softcap is None and query.dtype in DTYPES
    if fused and not _learns(query, parts) and (len(parts) > 1 or not parts[0].exact or use_triton("auto", query)):
        tiers = [tier_of(part, sight, query.dtype) for part in parts]
        return kv_decode.decode_attention(query, *tiers, scale=scaling)[0].transpose(1, 2), None
    attend = attend_explicit if stock == "eager" else attend_sdpa
    return attend(query, joined(parts, query.dtype), sight, scaling, dropout, softcap)


def _learns(query: Tensor, parts: Parts) -> bool:
    """Whether a gradient is wanted, of the model or of a store's parameters; the decode kernel has none."""
    if not torch.is_grad_enabled() or query.requires_grad:
        return torch.is_grad_enabled()
    return any(tensor(x, query.dtype).requires_grad for part in parts for x in (part.keys, part.values))


def tier_of(slots: Slots, sight: Sight, dtype: torch.dtype) -> kv_decode.Slots:
    """A part as the decode kernel takes it; what it does not read in its own form is restored."""
    valid = sight.newest(slots)
    k, v = (x.codes if isinstance(x, InBits) and (x.balance is None or x is slots.keys) else tensor(x, dtype)
            for x in (slots.keys, slots.values))
    balance = slots.keys.balance if isinstance(slots.keys, InBits) else None
    return kv_decode.Slots(k, v, valid=valid, bias=slots.bias, balance=balance)


def attend_sdpa(query: Tensor, slots: Slots, sight: Sight, scaling: float, dropout: float = 0.0, softcap: float | None = None
                ) -> tuple[Tensor, None]:
    """Attention over slots by torch's fused kernels; with masses explicitly, since their logits need float32."""
    if slots.bias is not None or softcap is not None:
        return attend_explicit(query, slots, sight, scaling, dropout, softcap)[0], None
    batch, heads, length, _ = query.shape
    groups = heads // slots.valid.shape[1]
    seen = sight.seen(slots, torch.arange(length, device=query.device).expand(batch, -1))           # (B, H_kv, Q, N)
    seen = seen[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)
    out = F.scaled_dot_product_attention(query.unflatten(1, (-1, groups)).flatten(2, 3), exactly(slots.keys),
                                         exactly(slots.values), attn_mask=seen, dropout_p=dropout, scale=scaling)
    return _by_token(out.unflatten(2, (groups, length))), None


def attend_explicit(query: Tensor, slots: Slots, sight: Sight, scaling: float, dropout: float = 0.0,
                    softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention over slots with its weights (B, H, Q, N), in tiles of queries."""
    batch, heads, length, _ = query.shape
    grouped = query.unflatten(1, (slots.column.shape[1], -1))                                       # (B, H_kv, G, Q, d)
    tile = max(1, ROOM // (batch * heads * slots.count))
    outs, maps = [], []
    for at in range(0, length, tile):
        rows = torch.arange(at, min(at + tile, length), device=query.device).expand(batch, -1)
        paid = weights(grouped[..., at:at + tile, :], slots, sight.seen(slots, rows), scaling, softcap).to(query.dtype)
        paid = F.dropout(paid, dropout)
        outs.append((paid.flatten(2, 3) @ exactly(slots.values)).unflatten(2, paid.shape[2:4]))
        maps.append(paid)
    return _by_token(torch.cat(outs, 3)), torch.cat(maps, 3).flatten(1, 2)


def _by_token(out: Tensor) -> Tensor:
    """(B, H_kv, G, Q, d) -> (B, Q, H, d)"""
    return out.flatten(1, 2).transpose(1, 2).contiguous()


def _refuse_sinks(module: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("s_aux") is not None:
        raise UnsupportedModelError(f"{type(module).__name__} has attention sinks of its own (s_aux), which a compressed "
                                    f"cache does not know; detach(model) and run it stock")


class _Instead:
    """An object with some attributes instead of its own."""

    def __init__(self, wrapped: Any, **instead: Any) -> None:
        vars(self).update(instead, _wrapped=wrapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_wrapped"], name)


def _as_stock(module: Any, stock: str) -> Any:
    """An attention module whose config names the stock implementation: flash attention looks its kernels up by that name."""
    return _Instead(module, config=_Instead(module.config, _attn_implementation=stock))


def _stock(name: str, module: Any) -> Callable[..., Any]:
    """The stock attention function: a registered one, or the eager one of the module's own file."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Callable[..., Any] | None = ALL_ATTENTION_FUNCTIONS.get(name, own)
    if found is None:
        raise UnsupportedModelError(f"{type(module).__module__} has no eager_attention_forward; load the model with "
                                    f"attn_implementation='sdpa'")
    return found
