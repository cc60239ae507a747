"""Loss and accuracy of a run, against seconds of training and against steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..viz.figure import INK, new_figure, quiet
from ..viz.pareto import COLORS, MARKERS

AXES = {"seconds": "seconds of training, evaluation not counted", "step": "step",
        "cpu_seconds": "processor seconds of training, evaluation not counted"}


def plot_training(runs: Mapping[str, Sequence[Mapping[str, Any]]], clock: str = "seconds") -> Any:
    """Two rows (loss, accuracy on held-out scenes with 95 % intervals), two columns (time, steps), one colour a run.

    runs    label -> the rows of its log.jsonl
    clock   "seconds", or "cpu_seconds" where a shared machine makes the wall's clock unfair
    -> matplotlib Figure
    """
    if clock not in AXES:
        raise ValueError(f"clock={clock!r}: 'seconds' or 'cpu_seconds'")
    if not any(runs.values()):
        raise ValueError("no rows to draw; a log.jsonl has one row per event, starting with the first step")
    fig = new_figure(10.4, 6.2)
    panels = fig.subplots(2, 2, sharex="col", sharey="row")
    for column, x in enumerate((clock, "step")):
        for i, (label, rows) in enumerate(runs.items()):
            _loss(panels[0, column], rows, x, label, i)
            _accuracy(panels[1, column], rows, x, label, i)
        panels[1, column].set_xlabel(AXES[x], color=INK, fontsize=9)
    n = max((r["n"] for rows in runs.values() for r in rows if r["event"] == "eval"), default=0)
    panels[0, 0].set_title("loss of the language model, smoothed", fontsize=10.5, color=INK, loc="left")
    panels[1, 0].set_title(f"exact answers on held-out scenes, all tokens (n = {n})", fontsize=10.5, color=INK, loc="left")
    for ax in panels.flat:
        quiet(ax)
    if len(runs) > 1:
        panels[0, 1].legend(frameon=False, fontsize=9)
    fig.tight_layout()
    return fig


def _loss(ax: Any, rows: Sequence[Mapping[str, Any]], x: str, label: str, number: int) -> None:
    """One run; dotted lines where its stage changes."""
    from matplotlib.ticker import FixedLocator, NullLocator

    steps = [r for r in rows if r["event"] == "step"]
    color, at = COLORS[number % len(COLORS)], [r[x] for r in steps]
    ax.plot(at, [r["lm"] for r in steps], color=color, alpha=0.25, linewidth=0.9)
    ax.plot(at, _smooth([r["lm"] for r in steps]), color=color, linewidth=1.6, label=label)
    for before, after in pairwise(steps):
        if before.get("stage") != after.get("stage"):
            ax.axvline(after[x], color=color, linewidth=0.8, linestyle=(0, (2, 3)))
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(FixedLocator([0.01, 0.03, 0.1, 0.3, 1, 3, 10]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")


def _accuracy(ax: Any, rows: Sequence[Mapping[str, Any]], x: str, label: str, number: int) -> None:
    evals = [r for r in rows if r["event"] == "eval" and r["kind"] == "all"]
    error = [[max(0.0, r["accuracy"] - r["low"]) for r in evals], [max(0.0, r["high"] - r["accuracy"]) for r in evals]]
    ax.errorbar([r[x] for r in evals], [r["accuracy"] for r in evals], yerr=error, label=label,
                color=COLORS[number % len(COLORS)], marker=MARKERS[number % len(MARKERS)], markersize=5, linewidth=1.6,
                elinewidth=0.9, capsize=2, markeredgecolor="white", markeredgewidth=0.6)
    ax.set_ylim(0, 1.03)
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")


def _smooth(values: Sequence[float], weight: float = 0.6) -> list[float]:
    """Exponential moving average, corrected for its start."""
    out, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(total / norm)
    return out
