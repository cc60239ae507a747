"""A reducer inside the audio encoder (`ATome`): hooks on its layers for the duration of one encode.

What each layer leaves of each window is settled before the encoder runs. Behind a merging layer its output is merged by that
layer's own keys, rows are padded on the right where they end with different counts, and later layers get a mask to match, or
none. Positions are added in front of the first layer, so there is nothing to do about them. Padding of the caller's goes at the
first merging layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

from mmcompress.compat import check_hooks_recomputed
from mmcompress.errors import SignalError
from mmcompress.layout import AudioLayout
from mmcompress.tokens import Reduction


class Window(NamedTuple):
    """One row of `input_features`: the tokens it becomes, its encoder states as (sound,) or (sound, silence behind it)."""

    tokens: int
    parts: tuple[int, ...]


class Merging:
    """One encode: `with` hooks the encoder, `reductions` then says of each recording what went where."""

    def __init__(self, reducer: Any, tower: Any, items: Sequence[Sequence[Window]], kept: Sequence[Sequence[int]],
                 states_per_token: int) -> None:
        self.reducer, self.tower, self.items, self.kept = reducer, tower, items, kept
        self.states_per_token = states_per_token
        self.after = reducer.after(len(tower.layers))
        rows = [reducer.lengths(window.parts, k * states_per_token if k < window.tokens else sum(window.parts), len(self.after))
                for windows, ks in zip(items, kept) for window, k in zip(windows, ks)]
        self.lengths = [list(step) for step in zip(*rows)]                  # before the first merging layer, after each
        self.slot: Tensor | None = None                                     # (rows, states) where each went so far
        self.keys: Tensor | None = None                                     # (rows, states, H, d) of the layer that runs
        self.size: Tensor | None = None                                     # (rows, states) original states in each
        self.step = 0                                                       # merging layers done
        self._hooks: list[Any] = []

    def __enter__(self) -> Merging:
        self.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.stop()
        if kind is None:
            self.check()

    def start(self) -> None:
        """Hook the layers."""
        if self.tower.training and getattr(self.tower, "layerdrop", 0) > 0:
            raise ValueError(f"{type(self.reducer).__name__} counts on every layer, and encoder_layerdrop="
                             f"{self.tower.layerdrop} skips some in training; set the encoder's layerdrop to 0")
        check_hooks_recomputed(self.tower.layers[0], type(self.reducer).__name__)
        self.step = 0
        masks = [self._mask(step) for step in self.lengths]
        for number, layer in enumerate(self.tower.layers):
            done = sum(i < number for i in self.after)
            if done:
                self._hooks.append(layer.register_forward_pre_hook(partial(_with_mask, masks[done]), with_kwargs=True))
            if number in self.after:
                self._hooks += [layer.self_attn.k_proj.register_forward_hook(partial(self._hear, layer.self_attn.num_heads)),
                                layer.register_forward_hook(self._merge)]

    def stop(self) -> None:
        """Unhook them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.keys = self.size = None

    def check(self) -> None:
        if self.step < len(self.after):
            raise SignalError("the hooks inside the audio encoder never ran; an encoder compiled before it was hooked ignores "
                              "them: compile the language model instead, or use a reducer that works behind the encoder")

    def _hear(self, heads: int, _module: Any, _args: Any, out: Tensor) -> None:
        self.keys = out.detach().unflatten(-1, (heads, -1))

    def _merge(self, _layer: Any, _args: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        now, then = (torch.tensor(x, device=hidden.device) for x in self.lengths[self.step:self.step + 2])
        if self.size is None:
            self.size = torch.ones(hidden.shape[:2], dtype=torch.float32, device=hidden.device)
        width = max(map(sum, self.lengths[self.step + 1]))
        hidden, self.size, slot = self.reducer.merge(hidden, self.keys, self.size, now, then, width)
        self.slot = slot if self.step == 0 or self.slot is None else slot.gather(1, self.slot.to(slot.device))
        self.step, self.keys = self.step + 1, None
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    def _mask(self, lengths: Sequence[tuple[int, ...]]) -> Any:
        """The attention mask, in the encoder's attention's own form, over rows of these lengths; None: none is padded."""
        totals = [sum(parts) for parts in lengths]
        width, device = max(totals), self.tower.device
        if min(totals) == width:
            return None
        valid = torch.arange(width, device=device) < torch.tensor(totals, device=device)[:, None]
        shape = torch.zeros(len(totals), width, 1, dtype=self.tower.dtype, device=device)
        return create_bidirectional_mask(config=self.tower.config, attention_mask=valid.long(), inputs_embeds=shape)

    def reductions(self, features: Tensor) -> list[Reduction]:
        """A batch of one for each recording. features (windows, ., D): the tokens of each window, padding behind them.

        A token goes where the last of its states went, and what it went to stands at the middle of all that went there.
        """
        assert self.slot is not None
        out, row, each = [], 0, self.states_per_token
        for windows, ks in zip(self.items, self.kept):
            tokens, sources = [], []
            for window, k, before in zip(windows, ks, accumulate(ks, initial=0)):
                tokens.append(features[row, :k])
                sources.append(self.slot[row, each - 1:window.tokens * each:each] // each + before)
                row += 1
            source = torch.cat(sources).to(features.device)
            mass = torch.zeros_like(source[:sum(ks)]).index_add(0, source, torch.ones_like(source))
            index = mass.cumsum(0) - mass + (mass - 1) // 2
            out.append(Reduction(tokens=torch.cat(tokens)[None], index=index[None], source=source[None],
                                 mass=mass[None].float()))
        return out


def plan_merging(reducer: Any, tower: Any, windows: Sequence[Window], layouts: Sequence[AudioLayout], states_per_token: int
                 ) -> Merging | None:
    """What a reducer does inside the encoder in one call; None if it leaves all as it is.

    windows  of all recordings, end to end
    """
    if reducer is None or all(reducer.count(layout) == layout.tokens for layout in layouts):
        return None
    left, items, kept = list(windows), [], []
    for layout in layouts:
        item: list[Window] = []
        while left and sum(w.tokens for w in item) < layout.tokens:
            item.append(left.pop(0))
        items.append(item)
        kept.append(_kept(reducer, tower, item, layout, states_per_token))
    return Merging(reducer, tower, items, kept, states_per_token)


def _kept(reducer: Any, tower: Any, windows: Sequence[Window], layout: AudioLayout, states_per_token: int) -> list[int]:
    """A recording's tokens divided over its windows: each what it cannot do without, the rest in proportion."""
    k, steps = reducer.count(layout), len(reducer.after(len(tower.layers)))
    floor = [min(w.tokens, -(-reducer.least(w.parts, steps) // states_per_token)) for w in windows]
    if k < sum(floor):
        short = -(-1000 * sum(floor) // layout.tokens) / 1000
        raise ValueError(f"{type(reducer).__name__}(keep={reducer.keep}) leaves a recording {k} of {layout.tokens} tokens, and "
                         f"{steps} merging layers of this encoder can leave {sum(floor)}; pass keep={short} or more, or more "
                         f"layers (it has {len(tower.layers)})")
    room = [0, *accumulate(w.tokens - least for w, least in zip(windows, floor))]
    edges = [(k - sum(floor)) * x // max(room[-1], 1) for x in room]
    return [least + b - a for least, (a, b) in zip(floor, pairwise(edges))]


def _with_mask(mask: Any, _layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's call with another attention mask."""
    if len(args) > 1:
        return (args[0], mask, *args[2:]), kwargs
    return args, {**kwargs, "attention_mask": mask}


__all__ = ["Merging", "Window", "plan_merging"]
