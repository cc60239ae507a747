"""Scenes as training batches. A batch is a pure function of (seed, rank, number): nothing is ever skipped through.

`Batches` is a map-style dataset of whole batches, so a DataLoader may spread them over workers and a resumed run simply
starts at another number. The pictures of a batch share one canvas; prompts are padded on the right.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..pico import clips, scenes
from . import blocks

WORLDS: dict[str, ModuleType] = {"pico": scenes, "blocks": blocks, "clips": clips}
FIELDS = {"receipt": ("word", "number"), "cards": ("color", "shape", "word", "number"), "blocks": ("color", "shape")}
KEYS = {"receipt": ("word", "word", "number"), "cards": ("color", "color", "color", "word", "word", "number"),
        "blocks": ("color", "color", "shape")}
IGNORED, EOS = -100, "</s>"


@dataclass(frozen=True)
class Canvas:
    """Where a picture of `size` lies on its anyres canvas, as LLaVA-NeXT's processor and model lay it out."""

    size: tuple[int, int]           # height, width of the picture in pixels
    height: int                     # of the canvas, in pixels, both multiples of the tile
    width: int
    inner: tuple[int, int, int, int]    # top, left, height, width of the resized picture on the canvas, in pixels
    tokens: int                     # of the picture in a prompt, newlines included


@dataclass(frozen=True)
class Geometry:
    """How a model cuts pictures."""

    pinpoints: tuple[tuple[int, int], ...]      # canvases, height and width in pixels
    tile: int
    patch: int

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """From a LlavaNextConfig."""
        return cls(tuple((p[0], p[1]) for p in config.image_grid_pinpoints), config.vision_config.image_size,
                   config.vision_config.patch_size)


@cache
def canvas_of(size: tuple[int, int], geometry: Geometry) -> Canvas:
    """The canvas that the processor chooses for a picture of this height and width."""
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    patch = geometry.patch
    height, width = select_best_resolution(size, [list(p) for p in geometry.pinpoints])
    across, down = width / size[1], height / size[0]
    h, w = (min(math.ceil(size[0] * across), height), width) if across < down else (
        height, min(math.ceil(size[1] * down), width))
    rows, columns = unpad_image(torch.empty(1, height // patch, width // patch), size).shape[1:]
    return Canvas(size, height, width, ((height - h) // 2, (width - w) // 2, h, w),
                  (geometry.tile // patch) ** 2 + rows * (columns + 1))


def place(canvas: Canvas, image: Image.Image, objects: list[dict]) -> np.ndarray:
    """The picture on its canvas, (height, width, 3) uint8; moves the objects' boxes along."""
    top, left, h, w = canvas.inner
    if (h, w) == (canvas.height, canvas.width) == canvas.size:
        return np.asarray(image)
    out = np.zeros((canvas.height, canvas.width, 3), np.uint8)
    out[top:top + h, left:left + w] = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))
    scenes.move_boxes(objects, w / image.width, h / image.height, left, top)
    return out


def pixel_values(pictures: Tensor, canvas: Canvas, tile: int) -> Tensor:
    """What the processor makes of pictures that lie on their canvas: thumbnails, then crops row by row.

    pictures  (B, height, width, 3) uint8 -> (B, 1 + n, 3, tile, tile) float32 in -1..1
    """
    top, left, h, w = canvas.inner
    x = pictures.permute(0, 3, 1, 2)
    inner = x[:, :, top:top + h, left:left + w].float()
    thumbnail = F.interpolate(inner, (tile, tile), mode="bicubic", antialias=True, align_corners=False)
    grid = canvas.height // tile, canvas.width // tile
    crops = x.reshape(len(x), 3, grid[0], tile, grid[1], tile).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return torch.cat([thumbnail.round().clamp(0, 255)[:, None], crops.float()], 1) / 127.5 - 1


@dataclass(frozen=True)
class Batch:
    """B prompts with their pictures, or clips (then without tiles and cells); `to` moves the tensors.

    inputs   input_ids, attention_mask, labels (B, L) int64, image_sizes (B, 2) int64, pictures (B, height, width, 3) uint8;
             of clips frames (B, T, height, width, 3) uint8 instead of the last two
    tiles    (B, 1 + n, attributes) float32: what each tile shows, multi-hot
    cells    (B, height / patch, width / patch, groups) uint8: what each patch lies on
    """

    canvas: Canvas
    inputs: dict[str, Tensor]
    tiles: Tensor
    cells: Tensor
    questions: tuple[str, ...]      # the first of each prompt

    def to(self, device: torch.device) -> Batch:
        move = lambda x: x.to(device, non_blocking=True)  # noqa: E731
        return Batch(self.canvas, {k: move(v) for k, v in self.inputs.items()}, move(self.tiles), move(self.cells),
                     self.questions)

    @property
    def text_tokens(self) -> int:
        return int(self.inputs["attention_mask"].sum()) - len(self.questions) * self.canvas.tokens


@dataclass(frozen=True)
class Mix:
    """What a training prompt asks, as shares: only `read`, only `lookup`, else questions, then a lookup at the end or not."""

    turns: int = 8          # questions about one picture, at most
    read: float = 0.06      # everything in reading order
    lookup: float = 0.24    # every object in random order: one attribute given, others asked; this teaches looking up
    tail: float = 0.55      # a lookup after the questions: earlier, it would give their answers away

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise ValueError(f"mix.turns={self.turns}: ask at least one question a picture")
        shares = self.read, self.lookup, self.tail
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"mix: read, lookup and tail are {shares}; they are shares that sum to 1 at most")


class Batches(torch.utils.data.Dataset):
    """Batch number -> Batch, a pure function of (seed, rank, number).

    size      pictures a batch
    canvases  height x width of the pictures in pixels, drawn by `weights`; `odd` is the share of batches of another size
    mix       None: one question a picture and no odd sizes, for evaluation
    """

    def __init__(self, world: str, tokenizer: Any, geometry: Geometry, size: int, seed: str, rank: int = 0,
                 canvases: tuple[tuple[int, int], ...] = (), weights: tuple[float, ...] | None = None, odd: float = 0.0,
                 mix: Mix | None = None) -> None:
        self.world, self.tokenizer, self.geometry = WORLDS[world], tokenizer, geometry
        self.size, self.seed, self.rank = size, seed, rank
        self.canvases, self.weights, self.odd, self.mix = canvases or geometry.pinpoints, weights, odd, mix
        self.known: dict[str, list[int]] = {}

    def __getitem__(self, number: int) -> Batch:
        rng = random.Random(f"{self.seed}/{self.rank}/{number}")
        canvas = self._canvas(rng)
        samples = [self._sample(rng, canvas) for _ in range(self.size)]
        pictures, tiles, cells = (torch.from_numpy(np.stack([s[i] for s in samples])) for i in range(3))
        inputs = _padded([s[3] for s in samples], [s[4] for s in samples], self.tokenizer.pad_token_id)
        inputs["image_sizes"] = torch.tensor([canvas.size] * self.size)
        inputs["pictures"] = pictures
        return Batch(canvas, inputs, tiles, cells, tuple(s[5] for s in samples))

    def _canvas(self, rng: random.Random) -> Canvas:
        """One of the canvases, or with probability `odd` a size whose text the processor makes neither tiny nor huge."""
        odd = self.mix is not None and rng.random() < self.odd
        while odd:
            least, most = round(0.83 * self.geometry.tile), round(3.2 * self.geometry.tile)
            size = rng.randint(least, most), rng.randint(least, most)
            canvas = canvas_of(size, self.geometry)
            if 0.75 <= canvas.inner[3] / size[1] <= 1.5:
                return canvas
        return canvas_of(rng.choices(self.canvases, self.weights)[0], self.geometry)

    def _sample(self, rng: random.Random, canvas: Canvas) -> tuple[Any, ...]:
        """picture, tile attributes, cells, ids, labels, first question"""
        kind, image, objects = self.world.scene(rng, *canvas.size)
        picture = place(canvas, image, objects)
        tile, patch, h, w = self.geometry.tile, self.geometry.patch, canvas.height, canvas.width
        boxes = [(0, 0, w, h)] + [(x, y, x + tile, y + tile) for y in range(0, h, tile) for x in range(0, w, tile)]
        tiles = np.stack([self.world.attributes(kind, objects, b) for b in boxes])
        cells = self.world.cell_labels(objects, h // patch, w // patch, patch)
        turns = self._turns(rng, kind, objects)
        ids, labels = self._prompt(turns, canvas.tokens)
        return picture, tiles, cells, ids, labels, turns[0][0]

    def _turns(self, rng: random.Random, kind: str, objects: list[dict]) -> list[tuple[str, list[int], list[int]]]:
        """(question, answer ids, answer labels) of each turn"""
        if self.mix is None:
            return [self._answered(*self.world.questions(rng, kind, objects, 1)[0])]
        mix, roll = self.mix, rng.random()
        if roll < mix.read:
            return [self._answered(*self.world.transcript(kind, objects))]
        if roll < mix.read + mix.lookup and objects:
            return [self._lookup(rng, kind, objects)]
        asked = self.world.questions(rng, kind, objects, rng.randint(min(2, mix.turns), mix.turns))
        turns = [self._answered(*qa) for qa in asked]
        if roll < mix.read + mix.lookup + mix.tail and objects:
            turns.append(self._lookup(rng, kind, objects))
        return turns

    def _answered(self, question: str, answer: str) -> tuple[str, list[int], list[int]]:
        ids = self._encode(" " + answer) + [self.tokenizer.eos_token_id]
        return question, ids, ids

    def _lookup(self, rng: random.Random, kind: str, objects: list[dict]) -> tuple[str, list[int], list[int]]:
        """Every object in random order: one attribute, which is given, then those that the question names."""
        key = rng.choice(KEYS[kind])
        rest = [f for f in FIELDS[kind] if f != key]
        found = rng.sample(rest, rng.randint(1, len(rest)))
        rows = [(o[key], " ".join(o[f] for f in found)) for o in rng.sample(objects, len(objects))]
        return self._given("look up " + " ".join([key, *found]) + ".", rows)

    def _given(self, question: str, rows: list[tuple[str, str]]) -> tuple[str, list[int], list[int]]:
        """A turn whose answer lists (given, wanted) of each row; only what is wanted has labels."""
        ids, labels = [], []
        for known, wanted in rows:
            given = self._encode(" " + known)
            answer = [t for word in wanted.split() for t in self._encode(" " + word)] + self._encode(";")
            ids += given + answer
            labels += [IGNORED] * len(given) + answer
        end = [self.tokenizer.eos_token_id]
        return question, ids + end, labels + end

    def _prompt(self, turns: list[tuple[str, list[int], list[int]]], tokens: int,
                placeholder: str = "<image>") -> tuple[list[int], list[int]]:
        """ids and labels of a chat about a picture or clip of so many tokens; only answers have labels"""
        shown = self.tokenizer.convert_tokens_to_ids(placeholder)
        ids = [self.tokenizer.bos_token_id, *self._encode("USER: "), *[shown] * tokens]
        labels = [IGNORED] * len(ids)
        for i, (question, answer, wanted) in enumerate(turns):
            asked = self._encode(("USER: " if i else "\n") + question + " ASSISTANT:")
            ids += asked + answer
            labels += [IGNORED] * len(asked) + wanted
        return ids, labels

    def _encode(self, text: str) -> list[int]:
        if text not in self.known:
            if len(self.known) > 100_000:
                self.known.clear()
            self.known[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self.known[text]


def _padded(ids: list[list[int]], labels: list[list[int]], pad: int) -> dict[str, Tensor]:
    """input_ids, attention_mask, labels (B, L) int64, padded on the right to a multiple of 8"""
    columns = -(-max(map(len, ids)) // 8) * 8
    fill = lambda rows, value: torch.tensor([r + [value] * (columns - len(r)) for r in rows])  # noqa: E731
    return {"input_ids": fill(ids, pad), "attention_mask": fill([[1] * len(r) for r in ids], 0),
            "labels": fill(labels, IGNORED)}


def question_kind(question: str, world: ModuleType) -> str:
    """The question without what it asks about: "what shape is on the red card?" -> "what shape is on the card"."""
    names = {*world.COLORS, *world.WORDS, *world.SHAPES}
    return " ".join(w for w in question.rstrip("?.").split() if w.rstrip("?.") not in names and not w.isdigit())
