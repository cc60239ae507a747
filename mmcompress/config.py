"""A wrap's configuration: what YAML files, `save_pretrained` and the command line speak."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import registry
from .budget import check_keep
from .layers.base import Positions, Step, steps_of
from .tokens import KeepAll

FILE_NAME = "mmcompress.json"
MODALITIES = ("image", "video", "audio")        # what is reduced before the language model; each has its slot


@dataclass(frozen=True)
class WrapConfig:
    """What is reduced and how the shorter prompt is laid out.

    image        reduces pictures before the language model; None: not there
    video        reduces clips before the language model; None: not there
    audio        reduces recordings before the language model, or before Whisper's decoder; None: not there
    budget       tokens (int) or share of the tokens (float) that the pictures, clips and recordings of one prompt may cost
                 together. It is divided by what each has to say (`ops.redundancy`), and the reducers' own `keep` does not
                 count; None: each reducer keeps what its `keep` says
    floor        with a budget, what each item keeps at least: a share of its tokens, or a count
    layers       reducers inside the language model, such as (FastV(2, 0.5),)
    cache        plans that keep the key-value cache small, one after the other, such as (SnapKV(keep=0.25),); empty: stock.
                 Their shares are of the tokens of the stock prompt, before `image` and the like have shortened it
    positions    "closed": kept tokens close up, as if the picture had been that small; "original": each keeps the
                 position it had in the full prompt, and the text after it too; None: what the reducers were made for, their
                 attribute `positions`, "original" if one of them asks for it. Models with multi-dimensional rotary positions
                 (M-RoPE) keep the original ones whatever this says.
    """

    image: Any = None
    positions: Positions | None = None
    layers: tuple[Any, ...] = ()
    video: Any = None
    audio: Any = None
    budget: float | int | None = None
    floor: float | int = 0.05
    cache: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "cache", build_cache(self.cache))
        for slot in MODALITIES:
            if isinstance(given := getattr(self, slot), (str, dict)):
                object.__setattr__(self, slot, registry.build(slot, given))
        if not self.before and not self.layers and not self.cache:
            raise ValueError("nothing to reduce: pass image=..., for example image=GlobalCom2(keep=0.25), video=..., "
                             "audio=..., layers=[...] or cache=...")
        if self.layers and self.cache:
            raise ValueError("layers=[...] and cache=...: reducers inside the language model leave each layer of the cache "
                             "another length before a plan sees it; pass one of them, beside image=..., video=... or audio=...")
        if self.budget is not None:
            self._check_budget()
        if self.positions is None:
            wanted = [getattr(r, "positions", "closed") for r in self.before.values()]
            object.__setattr__(self, "positions", "original" if "original" in wanted else "closed")
        if self.positions not in ("closed", "original"):
            raise ValueError(f"positions={self.positions!r}: 'closed' or 'original'")

    def _check_budget(self) -> None:
        check_keep(self.budget, "budget")
        check_keep(self.floor, "floor")
        if not self.before:
            raise ValueError("budget=... divides tokens among pictures, clips and recordings before the language model: pass "
                             "image=..., video=... or audio=... with it")
        for reducer in self.before.values():
            if not is_dataclass(reducer) or "keep" not in {f.name for f in fields(reducer)} \
                    or getattr(reducer, "in_encoder", False) or getattr(reducer, "count_is_bound", False):
                raise ValueError(f"budget=... sets each item's keep from what its features hold, which "
                                 f"{registry.label(reducer)} cannot take; choose another reducer, or leave budget out")

    def to_dict(self) -> dict[str, Any]:
        slots = {slot: None if getattr(self, slot) is None else registry.describe(slot, getattr(self, slot))
                 for slot in MODALITIES}
        return {**slots, "positions": self.positions, "budget": self.budget, "floor": self.floor,
                "layers": [registry.describe("layers", reducer) for reducer in self.layers],
                "cache": [registry.describe("cache", plan) for plan in self.cache]}

    @property
    def before(self) -> dict[str, Any]:
        """The reducers that work before the language model, by modality."""
        return {slot: getattr(self, slot) for slot in MODALITIES if getattr(self, slot) is not None}

    @property
    def reducers(self) -> dict[str, Any]:
        """What reduces each modality before the language model."""
        return {slot: self.before.get(slot, KeepAll()) for slot in MODALITIES}

    def steps(self, depth: int) -> tuple[Step, ...]:
        """The reductions inside a language model of `depth` layers, by layer."""
        return steps_of(self.layers, depth)

    def captures(self, depth: int, modality: str = "image") -> tuple[int, ...]:
        """The vision layers whose queries and keys some reducer of a modality reads."""
        return self._layers_read("captures", depth, modality)

    def receives(self, depth: int, modality: str = "image") -> tuple[int, ...]:
        """The vision layers of which some reducer reads the attention that tokens receive."""
        return self._layers_read("receives", depth, modality)

    def _layers_read(self, name: str, depth: int, modality: str) -> tuple[int, ...]:
        reducers = [self.reducers[modality], *(step.reducer for step in self.steps(depth))]
        return tuple(dict.fromkeys(layer for r in reducers for layer in getattr(r, name, ())))

    @property
    def label(self) -> str:
        """What is reduced, in short."""
        label = " + ".join(registry.label(r) for r in (*self.before.values(), *self.layers, *self.cache))
        return label if self.budget is None else f"{label}, budget={self.budget}"

    @property
    def cache_label(self) -> str:
        """What keeps the cache small, in short."""
        return " + ".join(map(registry.label, self.cache))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> WrapConfig:
        data = dict(data)
        data.pop("mmcompress_version", None)
        if unknown := sorted(set(data) - {*MODALITIES, "positions", "layers", "budget", "floor", "cache"}):
            raise ValueError(f"unknown keys {', '.join(unknown)}; a configuration has image, video, audio, layers, budget, "
                             f"cache and positions")
        slots = {slot: registry.build(slot, data[slot]) for slot in MODALITIES if data.get(slot) is not None}
        return cls(**slots, positions=data.get("positions"), layers=build_layers(data.get("layers") or ()),
                   budget=data.get("budget"), floor=data.get("floor", cls.floor), cache=build_cache(data.get("cache")))

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


def build_cache(plans: Any) -> tuple[Any, ...]:
    """Cache plans from what the user gave: one or several, their names, dicts, or a YAML file that has some; None: none."""
    if plans is None:
        return ()
    if _is_file(plans):
        found = WrapConfig.load(plans).cache
        if not found:
            raise ValueError(f"{plans} configures no cache plan; pass it as wrap(model, {plans!r})")
        return found
    several = isinstance(plans, Iterable) and not isinstance(plans, (str, dict))
    return tuple(registry.build("cache", one) for one in (plans if several else [plans]))


def given_reducers(**given: Any) -> dict[str, Any]:
    """Each slot's reducer from what the user gave: as `registry.build` takes it, a YAML file that configures one, or None."""
    return {slot: None if one is None else _given(slot, one) for slot, one in given.items()}


def _given(slot: str, given: Any) -> Any:
    if not _is_file(given):
        return registry.build(slot, given)
    found = getattr(WrapConfig.load(given), slot)
    if found is None:
        raise ValueError(f"{given} configures no {slot} reducer; pass it as wrap(model, {given!r})")
    return found


def _is_file(given: Any) -> bool:
    return isinstance(given, str) and given.endswith((".yaml", ".yml"))
