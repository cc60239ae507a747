"""One forward call's way through the decoder layers, and what its cache must remember of it.

The call's `LayerRun` travels to every decoder layer as a keyword argument and a pre-hook takes it out again. So hooks
hold no state: recomputation under gradient checkpointing, two forwards before one backward and copies of the model are
right by construction.

From layer K on, hidden states, rotary embeddings, position ids and masks are those of the tokens that are left. Masks
are cut from the stock one, so packed rows stay packed. Caches then hold fewer columns in deeper layers; `Held` says
which of them are padding, and decoding masks are fitted layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..tokens import LayerState, Reduction, Tokens
from .attention import Reading
from .base import Signal
from .held import Held
from .masks import Columns, fit_mask
from .plan import Group, LayerPlan, Stage

KEY = "mmcompress_layers"       # the keyword argument that carries a call's LayerRun


@dataclass(frozen=True, eq=False)
class LayerItem:
    """What one stage left of one picture, in terms of the tokens that its layout counts."""

    layer: int                  # from this decoder layer on
    layout: Any
    index: Tensor               # (K,) int64
    source: Tensor              # (N,) int64
    mass: Tensor | None         # (K,)

    @property
    def before(self) -> int:
        return self.layout.tokens

    @property
    def after(self) -> int:
        return len(self.index)


State = Callable[[Sequence[int]], Mapping[int, LayerState]]     # numbers of pictures -> their captured vision layers


class LayerRun:
    """The state of one forward call. Not a dataclass: wrappers that copy dataclasses among arguments must leave it alone."""

    def __init__(self, plan: LayerPlan | None, held: dict[int, Held], rotary: Callable[..., Any], implementation: str,
                 mask: Tensor | None, past: int, columns: int, vision: State | None = None, items: Sequence[Any] = ()) -> None:
        self.plan, self.held, self.rotary = plan, held, rotary
        self.flash = "flash" in implementation
        self.mask, self.past, self.columns = mask, past, columns        # 2-D mask of layer 0 or None; cached and new columns
        self.vision, self.items = vision, items
        self.stages: list[Stage] = plan.stages if plan is not None else []
        self.chosen: dict[int, Tensor] = {}         # stage -> (B, L') column among those that reach its layer, -1 padding
        self.whole: dict[int, Tensor] = {}          # stage -> the same among the columns of the call
        self.read: dict[int, dict[Signal, Tensor]] = {}     # stage -> what it needs of the columns that reach its layer
        self.fitted: dict[tuple[Any, ...], dict[str, Any]] = {}

    # entering a layer ---------------------------------------------------------------------------------------------

    def enter(self, layer: int, module: Any, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states and keyword arguments of a decoder layer's call, cut to what is left there."""
        if kwargs.get("position_embeddings") is None:
            raise UnsupportedModelError(f"{type(module).__name__} takes no position_embeddings, so its rotary positions cannot "
                                        f"be cut; layers=[...] works on Llama-like decoders")
        for number, stage in enumerate(self.stages):
            if stage.step.layer == layer:
                if stage.step.reads == layer:
                    self._read(number, module, hidden, self._fit(layer, number, hidden, kwargs))
                hidden = self._reduce(number, hidden)
        now = self._fit(layer, sum(s.step.layer <= layer for s in self.stages), hidden, kwargs)
        for number, stage in enumerate(self.stages):
            if stage.step.reads == layer < stage.step.layer:
                self._read(number, module, hidden, now)
        return hidden, now

    def _read(self, number: int, module: Any, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Keep the signals that a stage needs of this layer: (B, L) float32, keys (B, L, H_kv, d)."""
        if number in self.read:
            return
        stage = self.stages[number]
        with torch.no_grad():
            of = Reading(module, hidden, kwargs, self._new_columns(number, hidden.device))
            how: dict[Signal, Callable[[], Tensor]] = {
                "paid": lambda: of.paid(stage.queries.to(hidden.device)),
                "received": lambda: of.received(stage.prompt.to(hidden.device)),
                "keys": lambda: of.keys.transpose(1, 2)}
            self.read[number] = {signal: how[signal]() for signal in stage.step.signals}

    def _reduce(self, number: int, hidden: Tensor) -> Tensor:
        """The tokens that stay, gathered; merged ones put in their place. (B, L, D) -> (B, L', D)"""
        stage = self.stages[number]
        column = stage.column.to(hidden.device).clone()
        merged = []
        for group in stage.groups:
            row, before, after = (x.to(hidden.device) for x in (group.row, group.before, group.after))
            reduction = self._reduction(number, group, row, before, hidden)
            column[row, after] = before.gather(1, reduction.index)
            self._record(stage, group, reduction)
            if reduction.mass is not None:
                merged.append((row, after, reduction.tokens.to(hidden.dtype)))
        self.chosen[number] = column
        earlier = self.whole.get(number - 1)
        self.whole[number] = column if earlier is None else take(earlier, column)
        batch, length, width = hidden.shape
        flat = column.clamp_min(0) + length * torch.arange(batch, device=column.device)[:, None]
        out = hidden.reshape(-1, width).index_select(0, flat.flatten()).view(batch, -1, width)
        for row, after, tokens in merged:
            out = out.index_put((row, after), tokens)
        return out

    def _reduction(self, number: int, group: Group, row: Tensor, before: Tensor, hidden: Tensor) -> Reduction:
        reducer = self.stages[number].step.reducer
        read = {signal: held.to(hidden.device)[row, before] for signal, held in self.read.get(number, {}).items()}
        x = Tokens(features=hidden[row, before], layout=group.layout,
                   vision=self.vision(group.items) if self.vision is not None else {},
                   attention=read.get("paid"), received=read.get("received"), decoder_keys=read.get("keys"))
        reduction = reducer(x)
        if tuple(reduction.index.shape) != (len(row), group.count):
            raise ValueError(f"{type(reducer).__name__} returned {tuple(reduction.index.shape)} tokens where count() promised "
                             f"{(len(row), group.count)}; fix the reducer")
        return reduction

    def _record(self, stage: Stage, group: Group, reduction: Reduction) -> None:
        """Note on each picture which of its tokens stay; of repeated rows (beams) the first speaks."""
        for j, number in enumerate(group.items if self.items else ()):
            item = self.items[number]
            last = item.layers[-1] if item.layers else item
            if (j and group.items[j - 1] == number) or (item.layers and last.layer >= stage.step.layer):
                continue                                            # a beam, a step without cache, or a recomputation
            index, source = reduction.index[j], reduction.source[j]
            mass = None
            if reduction.mass is not None or last.mass is not None:
                weight = torch.ones(len(source), device=source.device) if last.mass is None else last.mass.float()
                mass = torch.zeros(len(index), device=source.device).index_add(0, source.clamp_min(0), weight * (source >= 0))
            item.layers.append(LayerItem(stage.step.layer, item.layout, last.index[index],
                                         torch.where(last.source < 0, -1, source[last.source.clamp_min(0)]), mass))

    # what goes with the hidden states -------------------------------------------------------------------------------

    def _fit(self, layer: int, stages: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Position embeddings, position ids and mask of a layer after the first `stages` stages."""
        held = self.held.get(layer)
        if not stages and held is None:
            return kwargs
        key = (stages, id(held), hidden.device)
        if key not in self.fitted:
            new = self._new_columns(stages, hidden.device)
            positions = self._positions(stages, held, kwargs["position_ids"], hidden.device)
            cache = kwargs.get("past_key_values")
            self.fitted[key] = {
                "attention_mask": fit_mask(kwargs.get("attention_mask"), new, held, self.past, self.columns,
                                           None if cache is None else cache.get_mask_sizes(new.count, layer)[0],
                                           self.flash, hidden.device),
                "position_embeddings": self._embeddings(stages, held, kwargs["position_embeddings"], positions, hidden),
                # FlashAttention takes gaps in the positions of one prompt for packed sequences; it needs none here
                "position_ids": None if self.flash else positions,
            }
        if self.flash and any(k.startswith("cu_seq_lens") and kwargs[k] is not None for k in kwargs):
            raise UnsupportedModelError("packed sequences under FlashAttention cannot be cut inside the language model; use "
                                        "attn_implementation='sdpa', or one sequence a row")
        return {**kwargs, **self.fitted[key]}

    def _new_columns(self, stages: int, device: torch.device) -> Columns:
        """The call's own columns that are left after some stages."""
        if not stages:
            return Columns(None, self.columns, True)
        column = self.whole[stages - 1].to(device)
        return Columns(column, column.shape[1], self.stages[stages - 1].full)

    def _positions(self, stages: int, held: Held | None, position_ids: Tensor, device: torch.device) -> Tensor:
        """Position ids (B, L') from layer 0's (B or 1, L), moved down where tokens close up."""
        out = position_ids.to(device)
        if held is not None and held.moved:
            out = out - held.shift.to(device)
        for number in range(stages):
            column = self.chosen[number].to(device)
            out = out.expand(len(column), -1).gather(1, column.clamp_min(0))
            if self.stages[number].step.positions == "closed":
                out = out - closed_gaps(column, self._tokens_before(number, device), out)
        return out

    def _tokens_before(self, number: int, device: torch.device) -> Tensor | None:
        """Which columns that reach a stage are tokens, not padding; None: all. (B, L) bool"""
        if number:
            return self.chosen[number - 1].to(device) >= 0
        return None if self.mask is None else self.mask[:, self.past:].to(device)

    def _embeddings(self, stages: int, held: Held | None, embeddings: Any, positions: Tensor, hidden: Tensor) -> Any:
        """Rotary embeddings of the columns that are left: cut from layer 0's, or computed anew where positions moved."""
        if (held is not None and held.moved) or any(s.step.positions == "closed" for s in self.stages[:stages]):
            return self.rotary(hidden, positions)
        if not stages:
            return embeddings
        column = self.whole[stages - 1].to(hidden.device).clamp_min(0)
        return tuple(e.to(hidden.device).expand(len(column), -1, -1).gather(1, column[..., None].expand(-1, -1, e.shape[-1]))
                     for e in embeddings)

    # leaving the model ----------------------------------------------------------------------------------------------

    def hold(self, depth: int, device: torch.device) -> dict[int, Held]:
        """What the cache's layers hold after this call."""
        total = self.past + self.columns
        rows = self.plan.rows if self.plan is not None else 0
        mask = torch.ones(rows, total, dtype=torch.bool, device=device) if self.mask is None else self.mask[:, :total].bool()
        out: dict[int, Held] = {}
        made: dict[tuple[int, int], Held] = {}
        for layer in range(depth):
            stages, held = sum(s.step.layer <= layer for s in self.stages), self.held.get(layer)
            if not stages and held is None:
                continue
            if (key := (stages, id(held))) not in made:
                made[key] = self._holds(stages, held, mask)
            out[layer] = made[key]
        return out

    def _holds(self, stages: int, held: Held | None, mask: Tensor) -> Held:
        new = self.whole[stages - 1].to(mask.device) >= 0 if stages else mask[:, self.past:]
        before, shift, moved = mask[:, :self.past], torch.zeros(len(mask), 1, dtype=torch.int64, device=mask.device), False
        if held is not None:
            before = torch.cat([held.valid.to(mask.device), mask[:, held.base:self.past]], 1)
            shift, moved = held.shift.to(mask.device), held.moved
        for number in range(stages):
            if self.stages[number].step.positions == "closed":
                column, moved = self.chosen[number].to(mask.device), True
                last = torch.where(column >= 0, torch.arange(column.shape[1], device=mask.device), 0).amax(1)
                shift = shift + closed_gaps(column, self._tokens_before(number, mask.device)).gather(1, last[:, None])
        full = (held is None or held.full) and self.mask is None and (not stages or self.stages[stages - 1].full)
        return Held(torch.cat([before, new], 1), self.past + self.columns, shift, full, moved)


def take(column: Tensor, at: Tensor) -> Tensor:
    """column (B, L) at (B, L') -> (B, L'), -1 where `at` is padding."""
    return column.gather(1, at.clamp_min(0)).masked_fill(at < 0, -1)


def closed_gaps(column: Tensor, valid: Tensor | None, positions: Tensor | None = None) -> Tensor:
    """How many tokens before each one that is left were dropped. column (B, L') int64, -1 padding -> (B, L') int64.

    valid      (B, L) which of the columns it counts in are tokens, not padding; None: all
    positions  (B, L') of the columns that are left: where they begin again at 0 another packed sequence begins, and
               the count with it
    """
    real = column >= 0
    before = column if valid is None else (valid.long().cumsum(1) - 1).gather(1, column.clamp_min(0))
    gap = torch.where(real, before - (real.long().cumsum(1) - 1), 0)
    if positions is None:
        return gap
    place = torch.arange(column.shape[1], device=column.device)
    start = torch.where(real & (positions == 0), place, -1).cummax(1).values                # (B, L'): of its own sequence
    return torch.where(real & (start >= 0), gap - gap.gather(1, start.clamp_min(0)), gap)


def enter_layer(layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
                ) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The pre-hook of every decoder layer: take the call's LayerRun out of its arguments and let it cut the others."""
    run: LayerRun | None = kwargs.pop(KEY, None)
    if run is None:
        return args, kwargs
    if args:
        hidden, kwargs = run.enter(layer, module, args[0], kwargs)
        return (hidden, *args[1:]), kwargs
    hidden, kwargs = run.enter(layer, module, kwargs["hidden_states"], kwargs)
    return args, {**kwargs, "hidden_states": hidden}
