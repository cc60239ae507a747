"""The recipe of a codec: `kind: xcodec` in YAML. `loop.train` runs it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ...audio.xcodec.losses import LossWeights
from ...audio.xcodec.quantizer import RVQ
from ..plain import from_plain, to_plain
from ..recipe import _not_negative, _positive


@dataclass(frozen=True)
class Shape:
    """An X-Codec from scratch, as audio/xcodec/teacher.py builds it. The defaults are the published sizes."""

    width: int = 64                 # channels of the acoustic encoder's first layer
    acoustic: int = 256             # channels that it gives
    decoder: int = 1024             # channels of the acoustic decoder's first layer
    codes: int = 1024               # of each book
    books: tuple[int, ...] = (1, 2, 3, 4, 8)        # of the bandwidths; a step draws one of them (quantiser dropout)
    ratios: tuple[int, ...] = (8, 5, 4, 2)
    sample_rate: int = 16_000

    def __post_init__(self) -> None:
        _positive("model.", width=self.width, acoustic=self.acoustic, decoder=self.decoder, codes=self.codes,
                  sample_rate=self.sample_rate)
        if not self.books or not self.ratios:
            raise ValueError("model.books and model.ratios: give at least one number each")


@dataclass(frozen=True)
class Speech:
    """What is heard: sound files, or English synthesised by espeak-ng (extra `speech`)."""

    files: tuple[str, ...] = ()     # sound files, and folders of them; none: synthesised sentences
    sentences: int = 1500           # how many of these there are, each made when first drawn
    seconds: float = 1.0            # of a segment, to whole frames; shorter sounds are filled up with silence
    gain: float = 6.0               # decibels: each segment is made louder or softer by up to so many
    every: int = 5                  # one file of so many is held out, chosen by its name; 0: none
    workers: int = 0                # processes that read; 0: the training process reads

    def __post_init__(self) -> None:
        _positive("data.", sentences=self.sentences, seconds=self.seconds)
        _not_negative("data.", gain=self.gain, every=self.every, workers=self.workers)
        if self.every == 1:
            raise ValueError("data.every=1 holds out every file: take 2 or more, or 0 for none")


@dataclass(frozen=True)
class Optim:
    """AdamW for codec and judge, alike; the learning rate falls by `gamma` a step."""

    lr: float = 2e-4
    betas: tuple[float, float] = (0.8, 0.99)
    eps: float = 1e-6
    weight_decay: float = 0.01
    gamma: float = 0.99999
    warmup: int = 0                 # steps
    clip: float = 2.0               # largest norm of the codec's gradient, and of the judge's

    def __post_init__(self) -> None:
        _positive("optim.", lr=self.lr, eps=self.eps, clip=self.clip)
        _not_negative("optim.", warmup=self.warmup, weight_decay=self.weight_decay)
        if not 0 < self.gamma <= 1:
            raise ValueError(f"optim.gamma={self.gamma}: a factor in (0, 1]")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"optim.betas={list(self.betas)}: two numbers in [0, 1)")


@dataclass(frozen=True)
class Judge:
    """The multi-frequency discriminator, one network a spectrogram. The defaults are the published sizes."""

    hops: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)       # samples
    hidden: tuple[int, ...] = (64, 128, 256, 512, 512, 512)     # channels of each one's last layer
    start: int = 0                  # the step from which it learns and counts

    def __post_init__(self) -> None:
        _not_negative("judge.", start=self.start)


@dataclass(frozen=True)
class Measuring:
    """Evaluation on held-out sound with all books."""

    every: int = 250                # steps; 0: only at the end
    n: int = 64                     # segments
    seconds: float = 2.0            # of each

    def __post_init__(self) -> None:
        _not_negative("eval.", every=self.every)
        _positive("eval.", n=self.n, seconds=self.seconds)


@dataclass(frozen=True)
class CodecRecipe:
    """Everything the training of a codec depends on."""

    steps: int
    batch: int                              # segments a step and process
    kind: str = "xcodec"
    seed: int = 0
    init: str | None = None                 # None: from scratch by `model` and `teacher`; else a folder or Hub id of an X-Codec
    model: Shape | None = None
    teacher: str = "embedded"               # of a codec from scratch: "embedded", or a folder or Hub id of a HuBERT or WavLM
    semantic: bool = True                   # False: the ablation at equal size, a codec that hears no teacher
    weight_norm: bool = True                # of the acoustic layers while they train, as in the released code
    precision: str = "fp32"                 # 'bf16': autocast; codebooks and spectrograms stay in float32
    rvq: RVQ = field(default_factory=RVQ)
    weights: LossWeights = field(default_factory=LossWeights)
    data: Speech = field(default_factory=Speech)
    optim: Optim = field(default_factory=Optim)
    judge: Judge | None = field(default_factory=Judge)
    eval: Measuring = field(default_factory=Measuring)
    log_every: int = 10                     # steps
    save_every: int = 250                   # steps

    def __post_init__(self) -> None:
        _positive("", steps=self.steps, batch=self.batch, log_every=self.log_every, save_every=self.save_every)
        if self.kind != "xcodec":
            raise ValueError(f"kind={self.kind!r}: a codec's recipe is of kind 'xcodec'")
        if (self.init is None) == (self.model is None):
            raise ValueError(f"init={self.init!r} and model={'a shape' if self.model else None}: give 'model:' to train from "
                             f"scratch, or 'init:' to start from weights, not both")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision={self.precision!r}: 'bf16' or 'fp32'")
        judged = self.weights.adversarial or self.weights.features
        if bool(judged) != (self.judge is not None):
            raise ValueError("judge and weights: a judge needs weights.adversarial or weights.features above 0, and they need "
                             "a judge; set 'judge: null' and both to 0 for none")
        if self.judge is not None and self.data.seconds * self.rate < 8 * max(self.judge.hops):
            raise ValueError(f"data.seconds={self.data.seconds}: the judge's longest window needs "
                             f"{8 * max(self.judge.hops) / self.rate:g} s; take longer segments or shorter judge.hops")
        if not self.semantic and self.init is None and self.weights.semantic:
            raise ValueError("semantic=false has no semantic loss: set weights.semantic to 0 too")

    @property
    def rate(self) -> int:
        """Hz; of published weights 16,000."""
        return self.model.sample_rate if self.model else 16_000

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CodecRecipe:
        return from_plain(cls, data)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what YAML and JSON hold, the inverse of `from_dict`."""
        return to_plain(asdict(self))
