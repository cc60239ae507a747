"""RazorAttention's probe (Tang et al., ICLR 2025, arXiv 2407.15891): which key heads look things up far back in the prompt.

The paper's: random tokens repeated, 2,500 of them four times; a head echoes as much as it attends to earlier copies of the
token it is at, and inducts as much as it attends to the tokens after these; a key head counts as its best query head; the top
14 % of a model's heads by induction and the top 1 % by echo are retrieval heads. Chosen by us, where text and codes differ:
attention is summed over all earlier copies and averaged over the queries from the second repetition on, shares are rounded up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .attach import attach
from .parts import Parts
from .plan import CachePlan
from .scores import ROOM
from .slots import Slots
from .view import CacheView


def echo_and_induction(x: CacheView, period: int, room: int = ROOM) -> Tensor:
    """How much each key head echoes and inducts over a prompt of period P that repeats. -> (2, B, H_kv) float32"""
    batch, kv_heads, groups, length, _ = x.queries.shape
    tile = max(1, room // (batch * kv_heads * groups * x.slots.count))
    total = torch.zeros(2, batch, kv_heads, groups, device=x.keys.device)
    for at in range(period, length, tile):
        rows = torch.arange(at, min(at + tile, length), device=total.device)
        paid = x.probabilities(rows.expand(batch, -1))                                              # (B, H, G, q, N)
        column = torch.arange(length, device=total.device)
        back = rows[:, None] - column                                                               # (q, N)
        earlier = (back > 0) & (back % period == 0)
        after = (back > 0) & ((back + 1) % period == 0) & (column > 0)                              # a copy is before it
        total += torch.stack([(paid * which).sum((-2, -1)) for which in (earlier, after)])
    return (total / (length - period)).amax(-1)


@dataclass(frozen=True)
class _Probe(CachePlan):
    """Notes what each layer's heads do, and drops nothing."""

    period: int = 1
    found: dict[int, Tensor] = field(default_factory=dict)

    def scores(self, x: CacheView) -> Tensor:
        raise AssertionError("a probe keeps everything")

    def __call__(self, x: CacheView) -> Slots | Parts:
        self.found[x.layer] = echo_and_induction(x, self.period).mean(1)                            # (2, H_kv)
        return x.slots


@torch.no_grad()
def find_retrieval_heads(model: Any, induction: float = 0.14, echo: float = 0.01, period: int = 2500, repeats: int = 4,
                         seed: int = 0) -> tuple[tuple[int, int], ...]:
    """The retrieval heads of a model, for `RazorAttention(retrieval=...)`. -> (layer, key head) pairs in order

    induction, echo  the shares of the model's key heads (those of sliding layers not counted) that are taken by each
    period, repeats  so many random tokens, so many times: one forward of their product, its attention in tiles
    """
    if not (0 <= induction <= 1 and 0 <= echo <= 1):
        raise ValueError(f"induction={induction}, echo={echo}: shares of the heads lie in [0, 1]")
    if period < 2 or repeats < 2:
        raise ValueError(f"period={period}, repeats={repeats}: two tokens, twice, are the least that can show a copy")
    vocabulary = model.get_input_embeddings().weight
    draw = torch.randint(len(vocabulary), (1, period), generator=torch.Generator().manual_seed(seed))
    probe = _Probe(period=period)
    with attach(model, probe) as attached:
        attached.model(input_ids=draw.repeat(1, repeats).to(vocabulary.device), past_key_values=attached.cache(),
                       logits_to_keep=1)
    pairs = [(layer, head) for layer in sorted(probe.found) for head in range(probe.found[layer].shape[1])]
    scores = torch.cat([probe.found[layer] for layer in sorted(probe.found)], 1)                    # (2, heads)
    chosen = set()
    for row, share in zip(scores, (echo, induction)):
        chosen |= {pairs[i] for i in row.topk(math.ceil(len(pairs) * share - 1e-9)).indices.tolist()}
    return tuple(sorted(chosen))
