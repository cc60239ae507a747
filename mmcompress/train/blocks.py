"""Small scenes that are cheap to draw and quick to learn: coloured blocks, each with a white shape, on a soft background.

The little sister of `mmcompress.pico.scenes`, with the same functions, for recipes that must finish on a CPU. No two blocks
of a picture share a colour or a shape. Blocks lie on the lattice of patches. Every random choice comes from the
`random.Random` passed in.
"""

from __future__ import annotations

import random
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from ..pico.scenes import COLORS as ALL_COLORS
from ..pico.scenes import SHAPES, draw_shape

COLORS = {name: ALL_COLORS[name] for name in ("red", "green", "blue", "yellow", "purple", "orange", "pink", "brown")}
WORDS: tuple[str, ...] = ()
ATTRIBUTES = tuple(COLORS) + SHAPES
CELL_GROUPS = (len(COLORS) + 1, len(SHAPES) + 1)        # class 0 of each is "nothing here"
BLOCK, LATTICE, MOST = 42, 14, 6                        # a block's side and the lattice in pixels; blocks in a picture


def scene(rng: random.Random, height: int, width: int) -> tuple[str, Image.Image, list[dict]]:
    """-> ("blocks", RGB image of height x width, objects in reading order, each with color, shape and box in pixels)"""
    if min(height, width) < BLOCK:
        raise ValueError(f"a picture of {height} x {width} pixels holds no block of {BLOCK}; use tiles of 56 or more")
    pixels = _background(rng, height, width)
    count = rng.randint(1, MOST)
    objects: list[dict] = []
    for color, shape in zip(rng.sample(list(COLORS), count), rng.sample(SHAPES, count)):
        place = _free_place(rng, height, width, objects)
        if place is None:
            continue
        x, y = place
        shade = np.array([min(255, max(0, c + rng.randint(-12, 12))) for c in COLORS[color]], np.uint8)
        pixels[y:y + BLOCK, x:x + BLOCK] = np.where(_stencil(shape)[..., None], np.uint8(250), shade)
        objects.append({"color": color, "shape": shape, "box": (x, y, x + BLOCK, y + BLOCK), "parts": {}})
    objects.sort(key=lambda o: (o["box"][1], o["box"][0]))
    return "blocks", Image.fromarray(pixels), objects


def _background(rng: random.Random, height: int, width: int) -> np.ndarray:
    """A soft light colour field. (height, width, 3) uint8"""
    base = np.array([rng.randint(190, 240) for _ in range(27)], np.uint8).reshape(3, 3, 3)
    return np.array(Image.fromarray(base).resize((width, height), Image.Resampling.BILINEAR))


def _free_place(rng: random.Random, height: int, width: int, objects: list[dict]) -> tuple[int, int] | None:
    """Upper left corner of a block that touches no other, or None after 30 tries."""
    for _ in range(30):
        x = rng.randrange((width - BLOCK) // LATTICE + 1) * LATTICE
        y = rng.randrange((height - BLOCK) // LATTICE + 1) * LATTICE
        if all(abs(x - o["box"][0]) > BLOCK or abs(y - o["box"][1]) > BLOCK for o in objects):
            return x, y
    return None


@cache
def _stencil(shape: str) -> np.ndarray:
    """Where a block of this shape is white. (BLOCK, BLOCK) bool"""
    image = Image.new("L", (BLOCK, BLOCK), 0)
    draw_shape(ImageDraw.Draw(image), shape, BLOCK / 2 - 0.5, BLOCK / 2 - 0.5, BLOCK * 0.4, 255)
    return np.asarray(image) > 127


def questions(rng: random.Random, kind: str, objects: list[dict], count: int) -> list[tuple[str, str]]:
    """`count` (question, answer) pairs about one scene; the answer is one word.

    Questions are terse, so that nearly all of a prompt is picture, as in LLaVA's.
    """
    out = []
    for _ in range(count):
        o, roll = rng.choice(objects), rng.random()
        if roll < 0.35:
            out.append((f"shape of {o['color']}?", o["shape"]))
        elif roll < 0.7:
            out.append((f"color of {o['shape']}?", o["color"]))
        elif roll < 0.85:
            color = rng.choice((o["color"], rng.choice(list(COLORS))))
            out.append((f"any {color}?", "yes" if any(p["color"] == color for p in objects) else "no"))
        else:
            out.append(("how many?", str(len(objects))))
    return out


def transcript(kind: str, objects: list[dict]) -> tuple[str, str]:
    """The dense question: everything in the picture in reading order."""
    return "describe.", "; ".join(f"{o['color']} {o['shape']}" for o in objects)


def attributes(kind: str, objects: list[dict], box: tuple[float, float, float, float]) -> np.ndarray:
    """Multi-hot attributes of the blocks that lie mostly inside a window. (len(ATTRIBUTES),) float32"""
    hot = np.zeros(len(ATTRIBUTES), np.float32)
    x0, y0, x1, y1 = box
    for o in objects:
        a0, b0, a1, b1 = o["box"]
        inside = max(0, min(a1, x1) - max(a0, x0)) * max(0, min(b1, y1) - max(b0, y0))
        if inside >= 0.6 * (a1 - a0) * (b1 - b0):
            hot[[ATTRIBUTES.index(o["color"]), ATTRIBUTES.index(o["shape"])]] = 1
    return hot


def cell_labels(objects: list[dict], rows: int, columns: int, cell: int) -> np.ndarray:
    """Colour and shape that each cell of a rows x columns grid lies on, 0 for nothing. (rows, columns, 2) uint8"""
    out = np.zeros((rows, columns, 2), np.uint8)
    for o in objects:
        x0, y0, x1, y1 = (round(v / cell) for v in o["box"])
        out[max(0, y0):y1, max(0, x0):x1] = list(COLORS).index(o["color"]) + 1, SHAPES.index(o["shape"]) + 1
    return out
