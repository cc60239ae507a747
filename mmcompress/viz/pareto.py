"""Accuracy against tokens kept: the picture of what a token costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .figure import INK, new_figure, quiet

COLORS = ("#e4572e", "#1f6fb2", "#2a9d63", "#8e5bb5", "#c79100", "#17a2a2", "#a14a6b", "#5b6b7a", "#7a5c3e", "#3d405b")
MARKERS = "osD^vPXd<>"
TITLES = {"all": "all questions", "cards": "cards: most of the picture is empty",
          "receipt": "receipts: most of the picture matters", "order": "order: what came first, next, last",
          "count": "count: how many at the start, at the end", "change": "change: what turned, from what, to what"}


def plot_pareto(rows: Sequence[Any], kinds: Sequence[str] = ("cards", "receipt"), log: bool = True) -> Any:
    """One panel a kind of question, one line a method, 95 % intervals, all tokens as a dashed line.

    rows    `mmcompress.eval.Row`; those that kept every token are drawn as the dashed line
    kinds   which of "all", "cards", "receipt" to draw
    -> matplotlib Figure
    """
    if unknown := sorted(set(kinds) - {r.kind for r in rows}):
        raise ValueError(f"no rows of kind {', '.join(map(repr, unknown))}; there are "
                         f"{', '.join(sorted({repr(r.kind) for r in rows})) or 'none'}")
    methods = list(dict.fromkeys(r.method for r in rows if not _whole(r)))
    legend = max(1.5, 0.6 + 0.075 * max((len(m) for m in methods), default=0))         # inches
    fig = new_figure(4.6 * len(kinds) + legend + 0.1, 4.1)
    panels = fig.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for ax, kind in zip(panels, kinds):
        here = [r for r in rows if r.kind == kind]
        for i, method in enumerate(methods):
            _line(ax, sorted((r for r in here if r.method == method and not _whole(r)), key=_share), i, len(methods), log)
        for row in here[:]:
            if _whole(row):
                ax.axhline(row.accuracy, color=INK, linestyle=(0, (5, 3)), linewidth=1, label="all tokens", zorder=1)
                ax.axhspan(row.low, row.high, color=INK, alpha=0.06, linewidth=0, zorder=0)
                break
        _dress(ax, kind, here, log)
    panels[0].set_ylabel("exact answers, 95 % intervals", color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    fig.tight_layout(rect=(0, 0, 1 - legend / fig.get_size_inches()[0], 1))
    fig.legend(handles, labels, loc="center right", frameon=False, fontsize=9)
    return fig


def _share(row: Any) -> float:
    return row.tokens_after / row.tokens_before


def _whole(row: Any) -> bool:
    return row.tokens_after == row.tokens_before


def _line(ax: Any, rows: list[Any], number: int, of: int, log: bool) -> None:
    """One method; lines are moved aside by a hair so that error bars of equal budgets do not hide each other."""
    aside = number - (of - 1) / 2
    x = [_share(r) * (1.012 ** aside if log else 1) + (0 if log else 0.0025 * aside) for r in rows]
    y = [r.accuracy for r in rows]
    error = [[max(0.0, r.accuracy - r.low) for r in rows], [max(0.0, r.high - r.accuracy) for r in rows]]
    ax.errorbar(x, y, yerr=error, label=rows[0].method if rows else None, color=COLORS[number % len(COLORS)],
                marker=MARKERS[number % len(MARKERS)], markersize=5, linewidth=1.6, elinewidth=0.9, capsize=2,
                markeredgecolor="white", markeredgewidth=0.6, zorder=3)


def _dress(ax: Any, kind: str, rows: list[Any], log: bool) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ax.set_title(TITLES.get(kind, kind), fontsize=10.5, color=INK, loc="left")
    ax.set_xlabel(f"tokens kept, newlines included (n = {max((r.n for r in rows), default=0)})", color=INK, fontsize=9)
    ax.set_ylim(0, 1.03)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
    if log:
        ax.set_xscale("log")
    ticks = sorted({round(_share(r), 2) for r in rows if not _whole(r)})
    ticks = [t for i, t in enumerate(ticks) if i == 0 or t - ticks[i - 1] > 0.02]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
    quiet(ax)
