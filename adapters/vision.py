"""Reading single layers of a vision tower while it runs: queries, keys and the attention that tokens receive, through hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.errors import SignalError


@dataclass(frozen=True)
class Captures:
    """What reducers read of the vision tower, by layer: queries and keys, and of some the attention that tokens receive."""

    layers: tuple[int, ...] = ()
    receives: tuple[int, ...] = ()
    merging: Any = None                 # the reducer that works inside the audio encoder, if one does


@dataclass(frozen=True, eq=False)
class VisionLayer:
    """One captured vision layer of all tiles of a call, end to end."""

    query: Tensor                       # (tiles, H, d): the first token's
    keys: Tensor                        # (tiles, S, H, d)
    received: Tensor | None = None      # (tiles, S) float32

    def at(self, tiles: Tensor) -> VisionLayer:
        """Some of the tiles."""
        return VisionLayer(self.query[tiles], self.keys[tiles], None if self.received is None else self.received[tiles])


@contextmanager
def capture(tower: Any, layers: Sequence[int], receives: Sequence[int] = ()) -> Iterator[dict[int, VisionLayer | None]]:
    """Fill the yielded dict with the named vision layers while the tower runs."""
    got: dict[int, VisionLayer | None] = {}
    wanted = tuple(dict.fromkeys((*layers, *receives)))
    handles, queries = [], {}
    try:
        for layer in wanted:
            q_proj, k_proj, heads = vision_projections(tower, layer)

            def take_query(_m: Any, _i: Any, out: Tensor, layer: int = layer, heads: int = heads) -> None:
                queries[layer] = out.detach().unflatten(-1, (heads, -1))

            def take_keys(_m: Any, _i: Any, out: Tensor, layer: int = layer, heads: int = heads) -> None:
                query, keys = queries.pop(layer), out.detach().unflatten(-1, (heads, -1))
                received = attention_received(query, keys) if layer in receives else None
                got[layer] = VisionLayer(query[:, 0], keys, received)

            handles += [q_proj.register_forward_hook(take_query), k_proj.register_forward_hook(take_keys)]
        yield got
    finally:
        for handle in handles:
            handle.remove()
    if missing := sorted(set(wanted) - set(got)):
        raise SignalError(f"the hooks on vision layers {missing} never ran; a tower compiled before it was hooked "
                          f"ignores them: compile the language model instead, or use a reducer without [CLS] scores")


def attention_received(query: Tensor, keys: Tensor) -> Tensor:
    """Mean attention that each token receives over heads and querying tokens. (tiles, S, H, d) twice -> (tiles, S) float32

    Tile by tile: the maps of one tile are held at a time, not those of a clip.
    """
    scale = query.shape[-1] ** -0.5
    rows = []
    for q, k in zip(query, keys):
        logits = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
        rows.append(logits.softmax(-1).mean((0, 1)))
    return torch.stack(rows)


def vision_projections(tower: Any, layer: int) -> tuple[nn.Module, nn.Module, int]:
    """Query and key projections of one vision layer's attention, and its number of heads."""
    count = getattr(tower.config, "num_hidden_layers", 0)
    stacks = [m for name, m in tower.named_modules()
              if isinstance(m, nn.ModuleList) and name.rpartition(".")[2] in ("layers", "layer") and len(m) == count]
    if not stacks:
        raise SignalError(f"{type(tower).__name__}: no list of {count} vision layers found to read [CLS] attention from; "
                          f"use a reducer that does without (AveragePool, Uniform, Random)")
    if not -count <= layer < count:
        raise SignalError(f"vision layer {layer}: the tower has {count} layers, counted from 0, or from the end by -1")
    block = stacks[0][layer]
    for q_name, k_name in (("q_proj", "k_proj"), ("query", "key")):
        for module in block.modules():
            if hasattr(module, q_name) and hasattr(module, k_name):
                return getattr(module, q_name), getattr(module, k_name), tower.config.num_attention_heads
    raise SignalError(f"{type(tower).__name__}: its attention has no separate query and key projections to read; "
                      f"use a reducer that does without [CLS] scores (AveragePool, Uniform, Random)")
