"""Between a tree of dataclasses and the plain data of YAML: strict, and every error names the key by its whole path."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

NAMES = {int: "a whole number", float: "a number", str: "text", dict: "a mapping", bool: "true or false"}


def override_in(data: dict[str, Any], override: str) -> None:
    """Apply "a.b=value" to nested mappings; the value is read as YAML."""
    import yaml

    key, equals, value = override.partition("=")
    *path, last = key.split(".")
    if not equals or not all([*path, last]):
        raise ValueError(f"--set {override}: key=value was expected, such as optim.lr=1e-3")
    for part in path:
        if data.get(part) is None:
            data[part] = {}
        data = data[part]
        if not isinstance(data, dict):
            raise ValueError(f"--set {override}: {part} is {data!r}, which has no keys")
    data[last] = yaml.safe_load(value)


def from_plain(cls: type, data: Any, where: str = "") -> Any:
    """A dataclass from nested dicts; errors name the key by its whole path."""
    if not isinstance(data, dict):
        raise ValueError(f"{where.rstrip('.') or 'the recipe'}: {data!r}; a mapping was expected")
    known = {f.name: f for f in fields(cls)}
    if unknown := sorted(set(map(str, data)) - set(known)):
        raise ValueError(f"no key {', '.join(where + u for u in unknown)}; there are {', '.join(where + k for k in known)}")
    needed = [k for k, f in known.items() if f.default is MISSING and f.default_factory is MISSING and k not in data]
    if needed:
        raise ValueError(f"the recipe lacks {', '.join(where + k for k in needed)}")
    hints = get_type_hints(cls)
    return cls(**{k: _value(hints[k], v, f"{where}{k}") for k, v in data.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as its field's type: dataclasses from mappings, tuples from lists, numbers from numbers."""
    options = get_args(hint)
    if type(None) in options:                           # X | None
        return None if value is None else _value(next(a for a in options if a is not type(None)), value, where)
    if is_dataclass(hint):
        return from_plain(hint, value, f"{where}.")     # type: ignore[arg-type]
    if hint is Any:
        return value
    kind = get_origin(hint) or hint
    if kind is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}={value!r}: a list was expected")
        return tuple(_value(options[0], v, where) for v in value)
    if kind is float and isinstance(value, str):        # YAML reads 1e-3 as text
        with suppress(ValueError):
            return float(value)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise ValueError(f"{where}={value!r}: {NAMES[kind]} was expected")
    return value


def to_plain(value: Any) -> Any:
    """Nested dicts and lists, as YAML and JSON hold them."""
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    return [to_plain(v) for v in value] if isinstance(value, (tuple, list)) else value
