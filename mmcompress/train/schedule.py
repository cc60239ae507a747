"""Compression schedules: which reducer works at which optimizer step, after LLaVolta (Chen et al., NeurIPS 2024).

A schedule is a pure function of the optimizer step and the length of training. It counts nothing, so gradient
accumulation, evaluations and restarts cannot move it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .. import registry
from ..budget import check_keep
from ..config import WrapConfig
from ..layers import InLayer, StagePool, StridedPool
from ..tokens import KeepAll


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one way of reducing pictures.

    until   where it ends: a share of training (float in (0, 1]) or an optimizer step (int), exclusive
    layer   decoder layer at whose input it works; 0: the projector's output
    stride  average-pool runs of so many tokens (`StagePool`); 1: nothing is reduced
    keep    or: keep this share of a picture's tokens (float), or this count (int), by `method`
    method  a registered reducer's name, image or layer; a dict {"name": ..., fields}; or a reducer itself, which then needs
            neither layer, stride nor keep. Image reducers work inside layer `layer` if it is not 0
    """

    until: float | int
    layer: int = 0
    stride: int | None = None
    keep: float | int | None = None
    method: Any = "stage_pool"

    def __post_init__(self) -> None:
        if isinstance(self.until, bool) or not isinstance(self.until, (int, float)) or self.until <= 0 \
                or (isinstance(self.until, float) and self.until > 1):
            raise ValueError(f"until={self.until!r}: a share of training in (0, 1], or the optimizer step at which it ends")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise ValueError(f"layer={self.layer!r}: a decoder layer, or 0 for the projector's output")
        if self.stride is not None and self.keep is not None:
            raise ValueError(f"stride={self.stride} and keep={self.keep}: a stage has one of them")
        if self.keep is not None:
            check_keep(self.keep)
            if self.method == "stage_pool":
                raise ValueError(f"keep={self.keep} with stage_pool: it pools by a stride; pass stride=..., or another method")
        if self.stride is not None:
            StridedPool(self.stride)
        if self.stride is not None and self.method != "stage_pool":
            raise ValueError(f"stride={self.stride} belongs to stage_pool; {self.method!r} takes keep")
        self.config                                                             # noqa: B018  # raises what building it raises

    @property
    def config(self) -> WrapConfig:
        """What a model is wrapped with during this stage; one that keeps everything where nothing is reduced."""
        if self.stride is not None and self.stride > 1 and self.layer == 0:
            return WrapConfig(image=StridedPool(self.stride), positions="original")
        if self.stride is not None and self.stride > 1:
            return WrapConfig(layers=(StagePool(self.layer, self.stride),))
        if self.stride is not None or (self.keep is None and self.method == "stage_pool"):
            return WrapConfig(image=KeepAll())
        return self._by_method()

    def _by_method(self) -> WrapConfig:
        options = self.method if isinstance(self.method, dict) else {"name": self.method}
        name = options.get("name") if isinstance(self.method, (str, dict)) else None
        if name is None:
            is_layer = callable(getattr(self.method, "steps", None))
            return WrapConfig(layers=(self.method,)) if is_layer else WrapConfig(image=registry.build("image", self.method))
        budget = {} if self.keep is None else {"keep": self.keep}
        if name in registry.available("layers"):
            at = {"layer": self.layer} if self.layer else {}
            return WrapConfig(layers=(registry.build("layers", {**options, **at, **budget}),))
        reducer = registry.build("image", {**options, **budget})
        return WrapConfig(layers=(InLayer(self.layer, reducer),)) if self.layer else WrapConfig(image=reducer)

    @property
    def reduces(self) -> bool:
        """Whether anything is reduced during this stage."""
        return not isinstance(self.config.image, KeepAll)

    def label(self) -> str:
        """What the stage does, in short."""
        return self.config.label if self.reduces else "no compression"

    def compression_ratio(self, depth: int = 32, tokens: int = 576) -> float:
        """Visual tokens of all layers without compression over those with it: CR = N L / ((N - K) L_out + K L).

        depth   N, decoder layers
        tokens  L, visual tokens of a picture
        """
        from ..layout import SequenceLayout

        config, layout = self.config, SequenceLayout(tokens, tokens)
        entering = tokens if config.image is None else config.image.count(layout)
        total, at, held = 0, 0, entering
        for step in config.steps(depth):
            total, at = total + (step.layer - at) * held, step.layer
            held = step.reducer.count(SequenceLayout(held, entering))
        return depth * tokens / (total + (depth - at) * held)

    def to_dict(self) -> dict[str, Any]:
        """What YAML says of it: fields that differ from their defaults."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.name == "until" or getattr(self, f.name) != f.default}
        if not isinstance(self.method, (str, dict)):
            slot = "layers" if callable(getattr(self.method, "steps", None)) else "image"
            said["method"] = registry.describe(slot, self.method)
        return said


@dataclass(frozen=True)
class Schedule:
    """Stages in the order of training; the last one lasts to the end.

    depth  decoder layers of the model that the stages' layers were chosen for; a model of another depth gets them in
           proportion. None: layers are meant as they stand
    """

    stages: tuple[Stage, ...]
    depth: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ValueError("a schedule has one stage at least, such as Stage(until=1.0, layer=2, stride=8)")
        for kind in (int, float):
            ends = [s.until for s in self.stages if isinstance(s.until, kind)]
            if sorted(set(ends)) != ends:
                raise ValueError(f"stages end at {[s.until for s in self.stages]}: each must end after the one before")

    def boundaries(self, total: int) -> list[int]:
        """The optimizer step at which each stage ends, exclusive, in a training of `total` steps; the last is `total`."""
        if total < 1:
            raise ValueError(f"total={total}: a training has one optimizer step at least")
        ends = [s.until if isinstance(s.until, int) else round(s.until * total) for s in self.stages]
        if ends != sorted(ends):
            raise ValueError(f"stages end at steps {ends} of {total}: each must end after the one before")
        return [min(end, total) for end in ends[:-1]] + [total]

    def at(self, step: int, total: int) -> Stage:
        """The stage of optimizer step `step`, counted from 0, in a training of `total` steps."""
        return self.stages[self.number(step, total)]

    def number(self, step: int, total: int) -> int:
        """Which stage that is, counted from 0. Steps past the end belong to the last one."""
        return next((i for i, end in enumerate(self.boundaries(total)) if step < end), len(self.stages) - 1)

    def for_depth(self, depth: int) -> Schedule:
        """The schedule for a language model of `depth` decoder layers."""
        if self.depth is None or self.depth == depth:
            return self
        scale = lambda layer: max(1, round(layer * depth / self.depth)) if layer else 0  # noqa: E731
        return Schedule(tuple(replace(s, layer=scale(s.layer)) for s in self.stages), depth)

    def to_dict(self) -> dict[str, Any]:
        return {"depth": self.depth, "stages": [s.to_dict() for s in self.stages]}

    @classmethod
    def build(cls, config: Any) -> Schedule:
        """A schedule from what the user gave: one itself, a preset's name, a YAML file, or a list of stages or dicts."""
        if isinstance(config, Schedule):
            return config
        if isinstance(config, str) and config in PRESETS:
            return PRESETS[config]
        if isinstance(config, (str, Path)):
            return cls._load(Path(config))
        if isinstance(config, dict):
            if unknown := sorted(set(config) - {"depth", "stages"}):
                raise ValueError(f"unknown keys {', '.join(unknown)}; a schedule has depth and stages")
            return replace(cls.build(config.get("stages")), depth=config.get("depth"))
        if isinstance(config, Sequence):
            return cls(tuple(s if isinstance(s, Stage) else _stage(s) for s in config))
        raise ValueError(f"schedule={config!r}: a Schedule, a preset ({', '.join(PRESETS)}), a YAML file, or a list of stages")

    @classmethod
    def _load(cls, path: Path) -> Schedule:
        if not path.is_file():
            raise FileNotFoundError(f"no schedule at {path}; pass a YAML file, or a preset: {', '.join(PRESETS)}")
        import yaml

        return cls.build(yaml.safe_load(path.read_text()))


def _stage(options: Any) -> Stage:
    if not isinstance(options, dict):
        raise ValueError(f"stage {options!r}: a mapping such as {{until: 0.25, layer: 2, stride: 8}}")
    known = [f.name for f in fields(Stage)]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"a stage has no {', '.join(unknown)}; it has {', '.join(known)}")
    if "until" not in options:
        raise ValueError(f"stage {options}: say where it ends, until=0.25 or until=1300")
    return Stage(**options)


# LLaVolta's: layers 2, 2, 16, 0 and strides 8, 2, 2, 1 of 32 layers, changed at steps 1,300, 2,600 and 3,900 of 5,197; heavy
# and light reduce through all of training. The published code changes one forward call later (it counts calls).
STEPS = 5197
PRESETS = {
    "llavolta-4stage": Schedule((Stage(1300 / STEPS, layer=2, stride=8), Stage(2600 / STEPS, layer=2, stride=2),
                                 Stage(3900 / STEPS, layer=16, stride=2), Stage(1.0, layer=0, stride=1)), depth=32),
    "llavolta-heavy": Schedule((Stage(1.0, layer=2, stride=8),), depth=32),
    "llavolta-light": Schedule((Stage(1.0, layer=16, stride=8),), depth=32),
}
