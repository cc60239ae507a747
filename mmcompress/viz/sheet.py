"""A contact sheet: several pictures with what was kept of them, and what was asked and answered about each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from .figure import SOFT, axes_at, new_figure, text_at
from .overlay import canvas_view, draw_view

HEIGHT, GAP, TOP, LINE = 2.9, 0.3, 0.68, 0.19           # inches
GOOD, BAD = "#2a7f3f", "#b3261e"


def contact_sheet(images: Sequence[Any], items: Sequence[Any], notes: Sequence[Sequence[tuple[str, str, bool]]],
                  title: str = "") -> Any:
    """One column a picture: its kept tokens, then lines of (question, answer, whether it is right).

    images   as `plot_kept` takes them
    items    the `Item` of each
    -> matplotlib Figure
    """
    views = [canvas_view(image, item) for image, item in zip(images, items)]
    widths = [HEIGHT * v.picture.shape[1] / v.picture.shape[0] for v in views]
    widths = [min(4.6, w) for w in widths]
    heights = [w * v.picture.shape[0] / v.picture.shape[1] for w, v in zip(widths, views)]
    columns = [max(w, 2.4) for w in widths]
    asked = [[(textwrap.wrap(q, max(16, int(w / 0.075))), a, right) for q, a, right in n] for n, w in zip(notes, columns)]
    lines = max((sum(len(q) + 1.4 for q, _, _ in n) for n in asked), default=0)
    below = TOP + max(heights) + 0.42
    fig = new_figure(sum(columns) + GAP * (len(columns) + 1), below + LINE * lines + 0.1)
    text_at(fig, GAP, 0.13, title, fontsize=13, fontweight="bold")
    text_at(fig, GAP, 0.37, "in colour: what the language model still reads of the crops", color=SOFT)
    left = GAP
    for view, item, width, height, column, note in zip(views, items, widths, heights, columns, asked):
        top = TOP + max(heights) - height
        draw_view(axes_at(fig, left, top, width, height), view)
        text_at(fig, left, TOP + max(heights) + 0.07, f"{item.before} → {item.after} tokens", fontsize=9, color=SOFT)
        at = below
        for question, answer, right in note:
            for part in question:
                text_at(fig, left, at, part, fontsize=9)
                at += LINE
            mark, color = ("✓", GOOD) if right else ("✗", BAD)
            text_at(fig, left, at, f"{mark} {answer}", fontsize=10, fontweight="bold", color=color)
            at += 1.4 * LINE
        left += column + GAP
    return fig
