"""Which loop runs a recipe: its `kind`, a LLaVA-NeXT if there is none."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .plain import override_in

KINDS = {"llava_next": (".recipe", "Recipe", ".loop"), "xcodec": (".codec.recipe", "CodecRecipe", ".codec.loop")}


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe's YAML file as plain data; each override is 'a.b=value', its value read as YAML."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}; pass a YAML file such as configs/pico.yaml")
    data = yaml.safe_load(path.read_text())
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a mapping such as 'steps: 1000' was expected")
    for override in overrides:
        override_in(data, override)
    return data


def load(path: str | Path, overrides: Sequence[str] = ()) -> tuple[str, Any, Any]:
    """-> (kind, recipe, the `train` function that runs it)"""
    data = read(path, overrides)
    kind = data.get("kind", "llava_next")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: recipes are of kind {', '.join(KINDS)}")
    recipe, name, loop = KINDS[kind]
    cls = getattr(import_module(recipe, __package__), name)
    return kind, cls.from_dict(data), import_module(loop, __package__).train
