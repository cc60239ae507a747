"""What the registry offers, in words: for `mmcompress list` and the README's table."""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass, fields
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
    lines = ["| name | class | what it is | options |", "|---|---|---|---|"]
    for m in methods():
        options = ", ".join(f"`{k}={_short(v)!r}`" for k, v in m.options.items())
        lines.append(f"| `{m.name}` | `{m.target.partition(':')[2]}` | {m.about} | {options} |")
    return "\n".join(lines) + "\n"


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
