"""Figures without pyplot: nothing global is touched, and a notebook shows them all the same."""

from __future__ import annotations

from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

INK, SOFT, ACCENT = "#20242b", "#6b7280", "#e4572e"     # text, secondary text, what stands out


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of this size in inches; raises ImportError with the next step without matplotlib."""
    return _figure_class()(figsize=(width, height), dpi=150, facecolor="white")


@cache
def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError('plots need matplotlib: pip install "mmcompress[viz]"') from e

    class NotebookFigure(Figure):
        """A Figure that shows itself where pyplot has not told IPython how."""

        def _repr_png_(self) -> bytes:
            buffer = BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue()

    return NotebookFigure


def save(figure: Any, path: str | Path) -> None:
    """Write a figure, making its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def axes_at(fig: Any, left: float, top: float, width: float, height: float) -> Any:
    """Bare axes at a place in inches from the figure's upper left corner."""
    w, h = fig.get_size_inches()
    ax = fig.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))
    ax.set_axis_off()
    return ax


def text_at(fig: Any, left: float, top: float, text: str, **style: Any) -> None:
    """Text whose upper left corner (or as `ha` and `va` say) lies at a place in inches."""
    w, h = fig.get_size_inches()
    fig.text(left / w, 1 - top / h, text, **{"va": "top", "color": INK, "fontsize": 9, **style})


def quiet(ax: Any) -> None:
    """Axes with horizontal lines only: no frame at the top and right, pale elsewhere."""
    ax.tick_params(colors=SOFT, labelsize=9, length=3, which="both")
    ax.grid(axis="y", color="#e6e8ec", linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#c9ced6")
