"""The command line's tables on a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

if TYPE_CHECKING:
    from .docs import Method
    from .eval import Row


def methods_shown(found: list[Method]) -> Group:
    """One table a slot; class names are in the Markdown table."""
    return Group(*(_slot_shown(slot, [m for m in found if m.slot == slot]) for slot in dict.fromkeys(m.slot for m in found)))


def _slot_shown(slot: str, found: list[Method]) -> Table:
    table = Table(show_lines=True, expand=True, title=f"slot: {slot}", title_justify="left", title_style="bold")
    table.add_column("name", no_wrap=True, width=22)
    table.add_column("what it is", ratio=1)
    table.add_column("options", width=21, overflow="fold")
    for m in found:
        options = "\n".join(f"{k}={v!r}" for k, v in m.options.items())
        table.add_row(f"[bold]{m.name}[/bold]", m.about.replace("[", "\\["), options)
    return table


def accuracies(rows: list[Row]) -> Table:
    kinds = list(dict.fromkeys(r.kind for r in rows))
    table = Table()
    table.add_column("method", no_wrap=True)
    table.add_column("keep", justify="right")
    table.add_column("tokens", justify="right")
    for kind in kinds:
        table.add_column(f"{kind} ({next(r.n for r in rows if r.kind == kind)})", justify="right")
    for r in rows:
        if r.kind == "all":
            same = {s.kind: s for s in rows if (s.method, s.keep) == (r.method, r.keep)}
            table.add_row(r.method, "" if math.isnan(r.keep) else str(r.keep), f"{r.tokens_after:.0f}",
                          *(f"{100 * same[k].accuracy:.1f} ({100 * same[k].low:.0f}-{100 * same[k].high:.0f})" for k in kinds))
    return table


def differences(rows: list[Row], against: str) -> Table:
    from .eval import paired

    kinds = list(dict.fromkeys(r.kind for r in rows))
    table = Table("method", "keep", *kinds)
    base = {(r.keep, r.kind): r.right for r in rows if r.method == against}
    for method, keep in dict.fromkeys((r.method, r.keep) for r in rows if r.method != against):
        mine = {r.kind: r.right for r in rows if (r.method, r.keep) == (method, keep)}
        if (keep, "all") in base:
            found = [paired(mine[k], base[keep, k]) if len(mine[k]) > 1 else None for k in kinds]
            table.add_row(method, str(keep), *("" if f is None else f"{100 * f[0]:+.1f} ± {100 * f[1]:.1f}" for f in found))
    return table


def answers_by_kind(rows: list[dict[str, Any]]) -> Table:
    """What a training run answers at its end, with 95 % intervals."""
    table = Table("question", "right", "of", "%", "95 % interval")
    for row in rows:
        table.add_row(row["kind"], str(row["hits"]), str(row["n"]), f"{100 * row['accuracy']:.1f}",
                      f"{100 * row['low']:.0f}-{100 * row['high']:.0f}")
    return table


def codec_measured(evals: list[dict[str, Any]]) -> Group:
    """The errors of the last evaluation, then a row a book."""
    found = evals[-1]
    semantic = "" if found["semantic"] is None else f", semantic {found['semantic']:.3f}"
    table = Table("book", "codes that occur", "perplexity")
    for i, (used, perplexity) in enumerate(zip(found["used"], found["perplexity"])):
        table.add_row(str(i + 1), f"{used:.1%}", f"{perplexity:.1f}")
    return Group(f"held-out sound ({found['segments']} segments, {found['frames']} frames): log spectrum {found['log']:.3f}, "
                 f"waveform {found['error']:.3f}{semantic}", table)
