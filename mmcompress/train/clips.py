"""Clips as training batches, for models that read video; some batches may be pictures, so that these are not forgotten."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..pico import clips
from .data import Batch, Batches, Canvas, Geometry, Mix, _padded

POOL = 2                                # the video model's 2 x 2 pooling, along one side
ASKED = (3, 1, 3)                       # shares of order, count and change in training: counting is learned first


@dataclass(frozen=True)
class Clips:
    """Which clips are drawn: their lengths by weight, and the share of training batches that are pico's pictures instead."""

    frames: tuple[int, ...] = (8, 12, 16, 24, 32)
    weights: tuple[float, ...] = (2, 1, 6, 0.5, 0.5)
    pictures: float = 0.0

    def __post_init__(self) -> None:
        if not self.frames or len(self.frames) != len(self.weights) or min(self.frames) < clips.LEAST:
            raise ValueError(f"data.clips: frames={list(self.frames)}, weights={list(self.weights)}; give each length, "
                             f"{clips.LEAST} frames or more, one weight")
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ValueError(f"data.clips.weights={list(self.weights)}: none below 0, and one above")
        if not 0 <= self.pictures < 1:
            raise ValueError(f"data.clips.pictures={self.pictures}: a share in [0, 1)")


class ClipBatches(Batches):
    """Batch number -> Batch, a pure function of (seed, rank, number); `inputs["frames"]` is (B, T, H, W, 3) uint8.

    The clips of a batch have one length. With `mix=None`, for evaluation, all have 16 frames and get one question.
    """

    def __init__(self, how: Clips, tokenizer: Any, geometry: Geometry, size: int, seed: str, rank: int = 0,
                 canvases: tuple[tuple[int, int], ...] = (), weights: tuple[float, ...] | None = None, odd: float = 0.0,
                 mix: Mix | None = None) -> None:
        super().__init__("clips", tokenizer, geometry, size, seed, rank, canvases, weights, odd, mix)
        self.how = how
        self.pictures = Batches("pico", tokenizer, geometry, size, f"{seed}/pictures", rank, canvases, weights, odd, mix)

    def __getitem__(self, number: int) -> Batch:
        rng = random.Random(f"{self.seed}/{self.rank}/{number}")
        if self.mix is not None and rng.random() < self.how.pictures:
            return self.pictures[number]
        frames = 16 if self.mix is None else rng.choices(self.how.frames, self.how.weights)[0]
        tile, cell = self.geometry.tile, POOL * self.geometry.patch
        canvas = Canvas((tile, tile), tile, tile, (0, 0, tile, tile), frames * (tile // cell) ** 2)
        drawn = [self._clip(rng, frames, canvas) for _ in range(self.size)]
        inputs = _padded([d[1] for d in drawn], [d[2] for d in drawn], self.tokenizer.pad_token_id)
        inputs["frames"] = torch.from_numpy(np.stack([d[0] for d in drawn]))
        nothing = torch.empty(self.size, 0)
        return Batch(canvas, inputs, nothing, nothing, tuple(d[3] for d in drawn))

    def _clip(self, rng: random.Random, frames: int, canvas: Canvas) -> tuple[Any, list[int], list[int], str]:
        """frames, ids, labels, first question"""
        pixels, story = clips.clip(rng, frames, *canvas.size)
        turns = self._asked(rng, story)
        ids, labels = self._prompt(turns, canvas.tokens, "<video>")
        return pixels, ids, labels, turns[0][0]

    def _asked(self, rng: random.Random, story: clips.Story) -> list[tuple[str, list[int], list[int]]]:
        """(question, answer ids, answer labels) of each turn; shares as in `Mix`"""
        if self.mix is None:
            return [self._answered(*clips.questions(rng, story, 1)[0][1:])]
        mix, roll = self.mix, rng.random()
        dense = [self._given(*clips.lookup(rng, story, "shape")), self._given(*clips.lookup(rng, story, "color")),
                 self._answered(*clips.transcript(story))]
        if roll < mix.read:
            return dense[::-1]
        if roll < mix.read + mix.lookup:
            return rng.sample(dense, 3)
        asked = clips.questions(rng, story, rng.randint(-(-mix.turns // 2), mix.turns), ASKED)
        turns = [self._answered(question, answer) for _, question, answer in dict.fromkeys(asked)]
        return turns + (rng.sample(dense, 3) if roll < mix.read + mix.lookup + mix.tail else [])
