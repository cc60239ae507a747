"""A wrap's configuration: what YAML files, `save_pretrained` and the command line speak."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import registry
from .layers.base import Positions, Step, steps_of

FILE_NAME = "mmcompress.json"


@dataclass(frozen=True)
class WrapConfig:
    """What is reduced and how the shorter prompt is laid out.

    image        reduces pictures before the language model; None: not there
    layers       reducers inside the language model, such as (FastV(2, 0.5),)
    positions    "closed": kept tokens close up, as if the picture had been that small; "original": each keeps the
                 position it had in the full prompt, and the text after it too; None: what the reducer was made for, its
                 attribute `positions`
    """

    image: Any = None
    positions: Positions | None = None
    layers: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.image is None and not self.layers:
            raise ValueError("nothing to reduce: pass image=..., for example image=GlobalCom2(keep=0.25), or layers=[...]")
        if self.positions is None:
            object.__setattr__(self, "positions", getattr(self.image, "positions", "closed"))
        if self.positions not in ("closed", "original"):
            raise ValueError(f"positions={self.positions!r}: 'closed' or 'original'")

    def to_dict(self) -> dict[str, Any]:
        return {"image": None if self.image is None else registry.describe("image", self.image), "positions": self.positions,
                "layers": [registry.describe("layers", reducer) for reducer in self.layers]}

    def steps(self, depth: int) -> tuple[Step, ...]:
        """The reductions inside a language model of `depth` layers, by layer."""
        return steps_of(self.layers, depth)

    def captures(self, depth: int) -> tuple[int, ...]:
        """The vision layers that some reducer reads."""
        reducers = [self.image, *(step.reducer for step in self.steps(depth))]
        return tuple(dict.fromkeys(layer for r in reducers for layer in getattr(r, "captures", ())))

    @property
    def label(self) -> str:
        """What is reduced, in short."""
        return " + ".join(registry.label(r) for r in (self.image, *self.layers) if r is not None)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> WrapConfig:
        data = dict(data)
        data.pop("mmcompress_version", None)
        if unknown := sorted(set(data) - {"image", "positions", "layers"}):
            raise ValueError(f"unknown keys {', '.join(unknown)}; a configuration has image, layers and positions")
        return cls(image=registry.build("image", data["image"]) if data.get("image") is not None else None,
                   positions=data.get("positions"), layers=build_layers(data.get("layers") or ()))

    @classmethod
    def load(cls, path: str | Path) -> WrapConfig:
        """From a YAML or JSON file, or a folder that `save_pretrained` wrote."""
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(f"no configuration at {path}; pass a YAML file such as configs/globalcom2-25.yaml, "
                                    f"or a folder that save_pretrained wrote")
        import yaml

        data = yaml.safe_load(path.read_text())             # YAML reads JSON too
        if not isinstance(data, dict):
            raise ValueError(f"{path}: a mapping such as 'image: {{name: globalcom2, keep: 0.25}}' was expected")
        return cls.from_dict(data)

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        data = {"mmcompress_version": version("mmcompress"), **self.to_dict()}
        (folder / FILE_NAME).write_text(json.dumps(data, indent=2) + "\n")


def build_layers(layers: Any) -> tuple[Any, ...]:
    """Layer reducers from what the user gave: one or several of them, their names, or dicts with `name` and the fields."""
    several = isinstance(layers, Iterable) and not isinstance(layers, (str, dict))
    return tuple(registry.build("layers", one) for one in (layers if several else [layers]))
