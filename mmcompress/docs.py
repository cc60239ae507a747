"""What the registry offers and what was measured, as the tables of README.md and of `mmcompress list`."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from . import registry


@dataclass(frozen=True)
class Method:
    """One registered reducer."""

    slot: str
    name: str
    target: str                     # "module:Class"
    about: str                      # first line of its module's docstring: title and source
    options: dict[str, Any]         # field -> default


def methods() -> list[Method]:
    """Every registered reducer, in the order of the registry."""
    return [_method(slot, name) for slot in registry.SLOTS for name in registry.available(slot)]


def _method(slot: str, name: str) -> Method:
    cls = registry.reducer_class(slot, name)
    about = (sys.modules[cls.__module__].__doc__ or cls.__doc__ or "").strip().partition("\n")[0]
    options = {f.name: None if f.default is MISSING else f.default for f in fields(cls)}
    return Method(slot, name, registry.available(slot)[name], about, options)


def methods_table() -> str:
    """The reducers as a Markdown table, ending in a newline; README.md holds it word for word."""
    lines = ["| slot | name | class | what it is | options |", "|---|---|---|---|---|"]
    for m in methods():
        options = ", ".join(f"`{k}={_short(v)!r}`" for k, v in m.options.items())
        lines.append(f"| {m.slot} | `{m.name}` | `{m.target.partition(':')[2]}` | {m.about} | {options} |")
    return "\n".join(lines) + "\n"


def accuracy_table(path: str | Path, kinds: Sequence[str] = ("cards", "receipt")) -> str:
    """A CSV of `mmcompress eval pico` as a Markdown table: exact answers in % with 95 % intervals."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    keeps = sorted({float(r["keep"]) for r in rows} - {1.0}, reverse=True)
    asked = {r["kind"]: r["n"] for r in rows}
    cells = {(r["method"], r["positions"], r["kind"], float(r["keep"])): r for r in rows}
    heads = [f"{kind} {keep:g}" for kind in kinds for keep in keeps]
    lines = [f"| {' | '.join(['method', 'positions', *heads])} |", f"|{'---|' * (2 + len(heads))}"]
    for method, positions in dict.fromkeys((r["method"], r["positions"]) for r in rows):
        whole = (method, positions, kinds[0], 1.0) in cells
        found = [cells.get((method, positions, kind, 1.0 if whole else keep)) for kind in kinds for keep in keeps]
        shown = ["" if r is None else _percent(*(float(r[k]) for k in ("accuracy", "low", "high"))) for r in found]
        lines.append(f"| {' | '.join([method, '' if whole else positions, *shown])} |")
    counts = ", ".join(f"{asked[kind]} on {kind}" for kind in kinds)
    return "\n".join(lines) + f"\n\nn = {counts}; {rows[0]['device']}, torch {rows[0]['torch']}, " \
        f"transformers {rows[0]['transformers']}.\n"


def budget_table(path: str | Path, kinds: Sequence[str] = ("cards", "receipt")) -> str:
    """The same CSV, one line a method and budget: the share of tokens that a layer reads, and exact answers in %."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [f"| {' | '.join(['method', 'keep', 'tokens', *kinds])} |", f"|{'---|' * (3 + len(kinds))}"]
    for method, keep, positions in dict.fromkeys((r["method"], r["keep"], r["positions"]) for r in rows):
        found = {r["kind"]: r for r in rows if (r["method"], r["keep"], r["positions"]) == (method, keep, positions)}
        share = float(found["all"]["tokens_after"]) / float(found["all"]["tokens_before"])
        shown = [_percent(*(float(found[kind][k]) for k in ("accuracy", "low", "high"))) for kind in kinds]
        lines.append(f"| {' | '.join([method, keep, f'{100 * share:.0f} %', *shown])} |")
    asked = {r["kind"]: r["n"] for r in rows}
    return "\n".join(lines) + f"\n\nn = {', '.join(f'{asked[k]} on {k}' for k in kinds)}; {rows[0]['device']}, " \
        f"torch {rows[0]['torch']}, transformers {rows[0]['transformers']}.\n"


def _percent(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
