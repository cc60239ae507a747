"""A codec's training in three panels: its losses, what held-out sound says, how its books are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...viz.figure import INK, SOFT, new_figure, quiet
from ...viz.pareto import COLORS, MARKERS
from ..plots import _smooth

TERMS = {"full": "spectrum", "sub": "sub-bands", "semantic": "semantic", "commit": "commitment", "features": "features",
         "adversarial": "adversarial", "judge": "judge"}
HELD_OUT = {"log": "log spectrum", "convergence": "spectral convergence", "error": "waveform", "semantic": "semantic"}


def plot_codec(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """One row a run: unweighted terms by step, held-out errors, share of each book's codes that occur in held-out sound.

    runs    label -> the rows of its log.jsonl
    -> matplotlib Figure
    """
    if not any(runs.values()):
        raise ValueError("no rows to draw; a log.jsonl has one row per event, starting with the first step")
    fig = new_figure(13.2, 3.9 * len(runs))
    for panels, (label, rows) in zip(fig.subplots(len(runs), 3, squeeze=False), runs.items()):
        _losses(panels[0], [r for r in rows if r["event"] == "step"], label)
        evals = [r for r in rows if r["event"] == "eval"]
        _errors(panels[1], evals)
        _books(panels[2], evals)
        for ax in panels:
            ax.set_xlabel("step" if ax is not panels[2] else "book", color=INK, fontsize=9)
            quiet(ax)
    fig.tight_layout()
    return fig


def _losses(ax: Any, rows: Sequence[Mapping[str, Any]], label: str) -> None:
    for i, (term, name) in enumerate(TERMS.items()):
        at = [r["step"] for r in rows if r.get(term, 0) > 0]
        values = [r[term] for r in rows if r.get(term, 0) > 0]
        if at:
            ax.plot(at, values, color=COLORS[i], alpha=0.2, linewidth=0.8)
            ax.plot(at, _smooth(values, 0.8), color=COLORS[i], linewidth=1.6, label=name)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    ax.set_title(f"{label}: training losses, unweighted", fontsize=10.5, color=INK, loc="left")
    ax.legend(frameon=False, fontsize=8, ncols=2)


def _errors(ax: Any, evals: Sequence[Mapping[str, Any]]) -> None:
    for i, (key, name) in enumerate(HELD_OUT.items()):
        at = [(r["step"], r[key]) for r in evals if r[key] is not None]
        if at:
            ax.plot(*zip(*at), color=COLORS[i], marker=MARKERS[i], markersize=5, linewidth=1.6, label=name,
                    markeredgecolor="white", markeredgewidth=0.6)
    n = evals[-1]["segments"] if evals else 0
    ax.set_ylim(0, 1.3 * ax.dataLim.y1)
    ax.set_title(f"held-out sound, all books (n = {n} segments)", fontsize=10.5, color=INK, loc="left")
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")


def _books(ax: Any, evals: Sequence[Mapping[str, Any]]) -> None:
    """The last evaluation in bars, the first one as dots."""
    if not evals:
        return
    books = range(1, len(evals[-1]["used"]) + 1)
    ax.bar(books, evals[-1]["used"], color=COLORS[1], width=0.7, label=f"step {evals[-1]['step']}")
    if len(evals) > 1:
        ax.scatter(books, evals[0]["used"], color=INK, s=16, zorder=3, label=f"step {evals[0]['step']}")
    ax.axhline(0.8, color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.set_ylim(0, 1.22)
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    ax.set_xticks(list(books))
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    ax.set_title(f"codes that occur ({evals[-1]['frames']:,} frames)", fontsize=10.5, color=INK, loc="left")
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
