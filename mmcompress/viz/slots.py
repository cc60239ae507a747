"""The picture of a compressed cache: which tokens every layer and head still holds, exactly, in few bits or in others."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..registry import label
from .figure import ACCENT, INK, SOFT, axes_at, new_figure, quiet, text_at

LEFT, RIGHT, TOP, BOTTOM, WIDTH = 0.72, 0.25, 0.86, 0.62, 11.0              # inches
STATES = (("not held", "#eceef1"), ("stands for several", "#2b6f9e"), ("in few bits", "#f3b8a4"), ("exact", ACCENT))
DROPPED, FOLDED, ROUNDED, EXACT = range(4)


def slot_maps(cache: Any, row: int = 0) -> dict[int, np.ndarray]:
    """What became of every token of one row: layer -> (H_kv, L) uint8, an index into `STATES`. Padding is "not held".

    A token that was merged into another is not held; the one that stands for both is "stands for several".
    """
    out = {}
    for number, layer in enumerate(cache.layers):
        if not hasattr(layer, "parts") or layer.seen == 0:
            continue                                        # another kind of layer, or nothing has come
        if layer.whole:
            out[number] = np.full((layer.keys.shape[1], layer.seen), EXACT, np.uint8)
            continue
        heads = 1 + max(max(part.heads or range(part.column.shape[1])) for part in layer.parts)
        state = np.full((heads, layer.seen), DROPPED, np.uint8)
        for part in layer.parts:
            value = np.full(part.column.shape[1:], EXACT if part.exact else ROUNDED, np.uint8)
            if part.bias is not None:
                value[part.bias[row].cpu().numpy() > 1e-3] = FOLDED
            column, valid = part.column[row].cpu().numpy(), part.valid[row].cpu().numpy()
            for at, head in enumerate(part.heads or range(len(column))):
                state[head, column[at][valid[at]]] = value[at][valid[at]]
        out[number] = state
    return out


def plot_slots(cache: Any, row: int = 0, tokens: Sequence[str] | None = None, title: str | None = None) -> Any:
    """A line a key head, layers from the top down, tokens from left to right: what the cache still holds of each.

    cache    `CompressedCache`, after a prompt
    row      of the batch
    tokens   a word for every column, written under the picture where there are 60 or fewer
    title    above it; None: the plan's name
    -> matplotlib Figure; raises ValueError where the cache holds nothing
    """
    maps = slot_maps(cache, row)
    if not maps:
        raise ValueError("the cache is empty: run a prompt through the model with past_key_values=cache first")
    lengths = {state.shape[1] for state in maps.values()}
    if tokens is not None and {len(tokens)} != lengths:
        raise ValueError(f"{len(tokens)} tokens for {max(lengths)} columns: one for each")
    lines = sum(len(state) for state in maps.values())
    height = min(6.0, max(1.2, 0.11 * lines))
    written = tokens is not None and len(tokens) <= 60
    fig = new_figure(WIDTH, TOP + height + BOTTOM + (0.5 if written else 0))
    text_at(fig, LEFT, 0.16, title or _name(cache.slot_layers[0].plan), color=INK, fontsize=11, weight="bold")
    held, stock = cache.nbytes, cache.stock_nbytes
    text_at(fig, LEFT, 0.42, f"{max(lengths):,} tokens, {held / 2**20:.2f} of {stock / 2**20:.2f} MiB ({held / stock:.1%})",
            color=SOFT, fontsize=8.5)
    ax = axes_at(fig, LEFT, TOP, WIDTH - LEFT - RIGHT, height)
    colors = np.array([_rgb(color) for _, color in STATES])
    ax.imshow(colors[np.concatenate(list(maps.values()))], aspect="auto", interpolation="nearest")
    ax.set_axis_on()
    quiet(ax)
    ax.grid(False)
    edges = np.cumsum([0, *(len(state) for state in maps.values())]) - 0.5
    for edge in edges[1:-1]:
        ax.axhline(edge, color="white", linewidth=1.0)
    shown = max(1, -(-len(maps) // 16))                     # no more than sixteen numbers
    ax.set_yticks(((edges[:-1] + edges[1:]) / 2)[::shown], [str(n) for n in maps][::shown])
    ax.tick_params(axis="both", length=0, labelsize=7.5, labelcolor=SOFT)
    if written and tokens is not None:
        ax.set_xticks(range(len(tokens)), [word.strip() or "·" for word in tokens], rotation=90, fontsize=6.5)
    else:
        ax.set_xticks(np.unique(np.linspace(0, max(lengths) - 1, 9).round().astype(int)))
    text_at(fig, 0.12, TOP + height / 2, "layer", color=SOFT, fontsize=8, rotation=90, va="center")
    _legend(fig, maps)
    return fig


def _legend(fig: Any, maps: dict[int, np.ndarray]) -> None:
    from matplotlib.patches import Rectangle

    width, height = fig.get_size_inches()
    counts = np.bincount(np.concatenate([state.ravel() for state in maps.values()]), minlength=len(STATES))
    at = LEFT
    for (name, color), count in reversed(list(zip(STATES, counts))):
        if not count:
            continue
        fig.add_artist(Rectangle((at / width, 1 - 0.76 / height), 0.13 / width, 0.11 / height, color=color))
        label = f"{name} {count / counts.sum():.0%}"
        text_at(fig, at + 0.19, 0.64, label, color=SOFT, fontsize=8)
        at += 0.45 + 0.062 * len(label)


def _name(plan: Any) -> str:
    """A plan, or the plans of a chain, in one line."""
    return textwrap.shorten(" + ".join(label(one) for one in getattr(plan, "plans", (plan,))), 110, placeholder=" ...")


def _rgb(color: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(color)
