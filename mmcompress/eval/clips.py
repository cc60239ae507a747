"""How much of pico's accuracy on clips survives a reducer, on freshly drawn clips; the twin of `eval.pico`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..adapters import adapter_for
from ..compat import base_of
from ..config import WrapConfig
from ..pico import clips
from ..video import UniformFrames
from .pico import Question, Row, _checked, _inputs, measure

FRAMES = 16

CONTROLS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "first frame": lambda frames: np.repeat(frames[:1], len(frames), 0),
    "last frame": lambda frames: np.repeat(frames[-1:], len(frames), 0),
    "first and last frame": lambda frames: frames[[0] * (len(frames) // 2) + [-1] * (len(frames) - len(frames) // 2)],
    "shuffled frames": lambda frames: frames[np.random.default_rng(int(frames.sum(dtype=np.int64))).permutation(len(frames))],
    "reversed frames": lambda frames: frames[::-1].copy(),
    "gray frames": lambda frames: np.full_like(frames, 127),
}       # what a clip's frames (T, H, W, 3) are replaced by to see what time is worth; another permutation for every clip


def clip_questions(n: int, seed: str = "eval", frames: int = FRAMES) -> list[Question]:
    """n questions about n clips; question i depends on `seed`, `frames` and i alone."""
    return [_question(seed, i, frames) for i in range(n)]


def _question(seed: str, i: int, frames: int) -> Question:
    rng = random.Random(f"{seed}/clips/{i}")
    pixels, story = clips.clip(rng, frames)
    [(kind, question, answer)] = clips.questions(rng, story, 1)
    return Question(pixels, kind, question, answer, pixels.shape[:3])


def evaluate_clips(model: Any, processor: Any, reducers: Mapping[str, WrapConfig | None], n: int, seed: str = "eval",
                   batch: int = 8, frames: int = FRAMES, show: Callable[[np.ndarray], np.ndarray] | None = None,
                   progress: bool = True) -> list[Row]:
    """Exact match of whole answers about clips under each configuration. -> Rows as `evaluate` returns them

    Every configuration sees the same questions and the same encoded clips, so that rows can be compared in pairs
    (`eval.paired` on their `right`). A clip and its features are held for one batch only.

    model, processor   as `pico.load_video()` gives them
    reducers           label -> WrapConfig, such as WrapConfig(video=...), or None for all tokens. What precedes an "@" in a
                       label is the row's method.
    frames             of a clip
    show               what is shown of the clips' frames, such as one of `CONTROLS`; None: all of them as they are
    """
    model = base_of(model)
    adapter = adapter_for(model)
    whole = WrapConfig(video=UniformFrames(keep=1.0))
    configs = {label: whole if config is None else config for label, config in reducers.items()}
    layers = sorted({layer for config in configs.values() for layer in config.captures(adapter.depth, "video")})
    receives = sorted({layer for config in configs.values() for layer in config.receives(adapter.depth, "video")})

    def batches() -> Iterator[list[Question]]:
        for start in range(0, n, batch):
            some = [_question(seed, i, frames) for i in range(start, min(n, start + batch))]
            yield some if show is None else [replace(q, image=show(q.image)) for q in some]

    return measure(model, configs, batches(), _checked(n), partial(_inputs, processor, videos=True),
                   lambda inputs: {"video": adapter.encode_video(inputs, layers, receives)}, progress)
