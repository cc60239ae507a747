"""A training recipe: one tree of frozen dataclasses, read from YAML. `loop.train` runs it.

Unknown keys are errors, and every value is checked here, before anything is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .clips import Clips
from .data import WORLDS, Mix
from .plain import from_plain, to_plain

PARTS = {"vision_tower": "model.vision_tower", "projector": "model.multi_modal_projector",
         "language_model": "model.language_model", "newline": "model.image_newline"}


def _positive(where: str, **values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{where}{name}={value}: must be above 0")


def _not_negative(where: str, **values: float) -> None:
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{where}{name}={value}: must not be below 0")


@dataclass(frozen=True)
class Vision:
    """The CLIP-style vision tower; the language model reads its last layer but one, [CLS] leaves by the last."""

    width: int = 256
    layers: int = 6
    heads: int = 4
    mlp: int = 1024

    def __post_init__(self) -> None:
        _positive("model.vision.", width=self.width, heads=self.heads, mlp=self.mlp)
        if self.layers < 2:
            raise ValueError(f"model.vision.layers={self.layers}: two at least, the last is read by [CLS] only")
        if self.width % self.heads:
            raise ValueError(f"model.vision: width={self.width} is no multiple of heads={self.heads}")


@dataclass(frozen=True)
class Text:
    """The Llama that reads the picture's tokens."""

    width: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 704

    def __post_init__(self) -> None:
        _positive("model.text.", width=self.width, layers=self.layers, heads=self.heads, kv_heads=self.kv_heads, mlp=self.mlp)
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"model.text: width={self.width}, heads={self.heads}, kv_heads={self.kv_heads}: "
                             f"each must be a multiple of the next")


@dataclass(frozen=True)
class ModelShape:
    """A LLaVA-NeXT built from scratch; `data.canvases` become its grid pinpoints."""

    tile: int = 168
    patch: int = 14
    vocabulary: int = 768           # tokens at most
    vision: Vision = field(default_factory=Vision)
    text: Text = field(default_factory=Text)

    def __post_init__(self) -> None:
        _positive("model.", tile=self.tile, patch=self.patch)
        if self.tile % self.patch:
            raise ValueError(f"model.tile={self.tile} is no multiple of model.patch={self.patch}")
        if self.vocabulary < 300:
            raise ValueError(f"model.vocabulary={self.vocabulary}: bytes and special tokens alone take 261; use 300 or more")


@dataclass(frozen=True)
class Data:
    """Which pictures are drawn and what is asked about them."""

    world: str = "pico"
    canvases: tuple[tuple[int, int], ...] = ((168, 336), (336, 168), (336, 336), (168, 504), (504, 168))  # height, width
    weights: tuple[float, ...] = (1, 1, 5, 1, 1)
    odd: float = 0.15               # share of batches whose pictures are of another size: resized and padded
    mix: Mix = field(default_factory=Mix)
    clips: Clips = field(default_factory=Clips)     # of world 'clips'
    workers: int = 0                # processes that draw; 0: the training process draws

    def __post_init__(self) -> None:
        if self.world not in WORLDS:
            raise ValueError(f"data.world={self.world!r}; known: {', '.join(WORLDS)}")
        if len(self.canvases) != len(self.weights) or not self.canvases or any(len(c) != 2 for c in self.canvases):
            raise ValueError(f"data: {len(self.canvases)} canvases and {len(self.weights)} weights; "
                             f"give each [height, width] one weight")
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ValueError(f"data.weights={list(self.weights)}: none below 0, and one above")
        if not 0 <= self.odd < 1:
            raise ValueError(f"data.odd={self.odd}: a share in [0, 1)")
        _not_negative("data.", workers=self.workers)


@dataclass(frozen=True)
class Optim:
    """AdamW, or Muon for the layers' matrices beside AdamW for the rest; linear warm-up, then a cosine to `floor`."""

    name: str = "adamw"
    lr: float = 1e-3
    muon_lr: float = 2e-3
    warmup: int = 200               # steps
    floor: float = 0.01             # last learning rate as a share of the first
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0               # largest norm of the gradient

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optim.name={self.name!r}: 'adamw' or 'muon'")
        _positive("optim.", lr=self.lr, muon_lr=self.muon_lr, clip=self.clip)
        _not_negative("optim.", warmup=self.warmup, weight_decay=self.weight_decay)
        if not 0 <= self.floor <= 1:
            raise ValueError(f"optim.floor={self.floor}: a share in [0, 1]")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"optim.betas={list(self.betas)}: two numbers in [0, 1)")


@dataclass(frozen=True)
class Heads:
    """Weights of the helper objectives, dropped after training; 0: without.

    cls     [CLS] of each tile tells what the tile shows
    cells   each patch tells what it lies on
    """

    cls: float = 2.0
    cells: float = 1.0

    def __post_init__(self) -> None:
        _not_negative("heads.", cls=self.cls, cells=self.cells)


@dataclass(frozen=True)
class Consistency:
    """Loss = full * (all tokens) + reduced * (a reducer's tokens) + kl * (the reduced run's distance from the full one).

    image   a registered reducer; its keep is drawn anew each step, a pure function of (seed, step)
    """

    image: dict[str, Any] = field(default_factory=lambda: {"name": "global_rank"})
    keep: tuple[float, ...] = (0.1, 0.25, 0.5)
    full: float = 1.0
    reduced: float = 1.0
    kl: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        from .. import registry

        if not self.keep:
            raise ValueError("consistency.keep is empty: give the budgets to draw from, such as [0.1, 0.25, 0.5]")
        if "keep" in self.image:
            raise ValueError("consistency.image has a keep; budgets are drawn from consistency.keep")
        for keep in self.keep:
            registry.build("image", {**self.image, "keep": keep})
        _not_negative("consistency.", full=self.full, reduced=self.reduced, kl=self.kl)
        _positive("consistency.", temperature=self.temperature)


@dataclass(frozen=True)
class Asking:
    """Evaluation without compression, on scenes that no training step sees."""

    every: int = 500                # steps; 0: only at the end
    n: int = 512                    # questions
    batch: int = 32

    def __post_init__(self) -> None:
        _not_negative("eval.", every=self.every)
        _positive("eval.", n=self.n, batch=self.batch)


@dataclass(frozen=True)
class Recipe:
    """Everything a training run depends on."""

    steps: int
    batch: int                              # pictures a step and process
    seed: int = 0
    init: str | None = None                 # None: from scratch; 'pico': the embedded weights; 'pico-video': the same
                                            # in a video model; else a folder or Hub id
    average: float = 1.0                    # share of the trained weights in the final ones; the rest is init's (WiSE-FT)
    model: ModelShape | None = None         # from scratch only
    precision: str = "bf16"                 # 'bf16': autocast; 'fp32'
    attention: str = "sdpa"                 # transformers' attn_implementation; 'eager' is faster for tiny models on a CPU
    freeze: tuple[str, ...] = ()
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    heads: Heads = field(default_factory=Heads)
    schedule: Any = None                    # mmcompress.train.Schedule: a preset's name, a YAML file or a list of stages
    consistency: Consistency | None = None
    eval: Asking = field(default_factory=Asking)
    log_every: int = 20                     # steps
    save_every: int = 500                   # steps

    def __post_init__(self) -> None:
        _positive("", steps=self.steps, batch=self.batch, log_every=self.log_every, save_every=self.save_every)
        if not 0 < self.average <= 1 or (self.average < 1 and self.init is None):
            raise ValueError(f"average={self.average}: a share in (0, 1], and 1 where there is no init to average with")
        if (self.init is None) == (self.model is None):
            raise ValueError(f"init={self.init!r} and model={'a shape' if self.model else None}: give 'model:' to train from "
                             f"scratch, or 'init:' to start from weights, not both")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision={self.precision!r}: 'bf16' or 'fp32'")
        if unknown := sorted(set(self.freeze) - set(PARTS)):
            raise ValueError(f"freeze: no part named {', '.join(unknown)}; there are {', '.join(PARTS)}")
        if self.consistency is not None and (self.heads.cls or self.heads.cells or self.schedule is not None):
            raise ValueError("consistency: set heads.cls and heads.cells to 0 and schedule to null; "
                             "its two runs are the objective")
        for_pictures = self.model, self.heads.cls, self.heads.cells, self.schedule, self.consistency
        if self.data.world == "clips" and any(for_pictures):
            raise ValueError("data.world=clips: give an init such as 'pico-video' instead of a model, set heads.cls and "
                             "heads.cells to 0, and leave out schedule and consistency, which are for pictures")
        tile = self.model.tile if self.model else 1
        if wrong := [list(c) for c in self.data.canvases if c[0] % tile or c[1] % tile]:
            raise ValueError(f"data.canvases {wrong}: both sides must be multiples of model.tile={tile}")

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """From a YAML file; each override is 'a.b=value', its value read as YAML."""
        from .kinds import read

        return cls.from_dict(read(path, overrides))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        if data.get("kind", "llava_next") != "llava_next":
            raise ValueError(f"kind={data['kind']!r}: mmcompress.train.kinds.load reads recipes of every kind")
        return from_plain(cls, {k: v for k, v in data.items() if k != "kind"})

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what YAML and JSON hold, the inverse of `from_dict`."""
        return to_plain(asdict(self))
