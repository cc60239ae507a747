"""Short synthetic videos with questions that need time: coloured cards on a background that stands still.

A card is a rounded rectangle with a shape on it. Some cards are there from the start, one or two come later, one after the
other, and exactly one change happens to one of them: it turns to another colour, or it leaves. Some cards move along a
straight line at constant speed, hold before and after. No two cards of a clip share a shape, and no colour is used twice.
Every pixel has a little noise, drawn anew in every frame. Every random choice comes from the `random.Random` passed in.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from .scenes import COLORS, SHAPES, background, draw_shape

WORDS: tuple[str, ...] = ()
KINDS = ("order", "count", "change")
SIDES = (38, 52)                # of a card in pixels
MARGIN = 3                      # pixels between the ways of two cards
NOISE = 2.5                     # standard deviation of the sensor's noise, in grey levels
LEAST = 8                       # frames of the shortest clip


@dataclass(frozen=True)
class Card:
    """What a card is and does; frames count from 0, and a frame named here is the first in which it holds."""

    shape: str
    color: str
    side: int                               # of the square card, in pixels
    begin: tuple[int, int]                  # left, top corner in pixels
    end: tuple[int, int]                    # where its move ends; `begin` if it never moves
    moves: tuple[int, int] = (0, 0)         # the move's first frame and the frame in which it has arrived
    came: int = 0                           # 0: there from the start
    left: int | None = None
    turned: int | None = None
    then: str | None = None                 # its colour from `turned` on

    def seen(self, frame: int) -> bool:
        return self.came <= frame and (self.left is None or frame < self.left)

    def color_at(self, frame: int) -> str:
        return self.then if self.then is not None and self.turned is not None and frame >= self.turned else self.color

    def corner_at(self, frame: int) -> tuple[float, float]:
        """left, top in pixels"""
        first, last = self.moves
        share = min(1.0, max(0.0, (frame - first) / (last - first))) if last > first else 0.0
        return tuple(b + share * (e - b) for b, e in zip(self.begin, self.end))  # type: ignore[return-value]


@dataclass(frozen=True)
class Story:
    """A clip in words: its cards, those from the start in reading order, then the others as they come."""

    frames: int
    cards: tuple[Card, ...]

    @property
    def late(self) -> tuple[Card, ...]:
        """The cards that come after the start, in the order in which they come."""
        return tuple(c for c in self.cards if c.came)

    @property
    def changed(self) -> Card | None:
        """The card that turns to another colour or leaves; None in a still clip."""
        return next((c for c in self.cards if c.turned is not None or c.left is not None), None)

    @property
    def change(self) -> tuple[str, int] | None:
        """("turn" or "leave", frame) of the one change; None in a still clip."""
        card = self.changed
        if card is None:
            return None
        return ("turn", card.turned) if card.turned is not None else ("leave", card.left)  # type: ignore[return-value]

    def seen(self, frame: int) -> tuple[Card, ...]:
        """The cards in a frame; negative frames count from the end."""
        return tuple(c for c in self.cards if c.seen(frame % self.frames))


def clip(rng: random.Random, frames: int = 16, height: int = 168, width: int = 168) -> tuple[np.ndarray, Story]:
    """-> (frames x height x width x 3 uint8, its story). ValueError if there are fewer frames or pixels than a clip needs."""
    _check(frames, height, width)
    start, late = rng.randint(1, 3), rng.choices((1, 2), (1, 3))[0]
    cards = _placed(rng, start + late, frames, height, width, movers=rng.randint(0, 2))
    times = _times(rng, late + 1, frames)
    change = times.pop(rng.randrange(late + 1))
    cards[:start] = sorted(cards[:start], key=lambda c: (c.begin[1], c.begin[0]))
    cards[start:] = [replace(c, came=t) for c, t in zip(cards[start:], times)]
    story = Story(frames, tuple(_changed(rng, cards, change)))
    return _drawn(rng, story, height, width), story


def still(rng: random.Random, frames: int = 16, height: int = 168, width: int = 168) -> tuple[np.ndarray, Story]:
    """A clip in which nothing happens: only the noise differs from frame to frame. -> as `clip`"""
    _check(frames, height, width)
    cards = _placed(rng, rng.randint(2, 5), frames, height, width, movers=0)
    story = Story(frames, tuple(sorted(cards, key=lambda c: (c.begin[1], c.begin[0]))))
    return _drawn(rng, story, height, width), story


def _check(frames: int, height: int, width: int) -> None:
    if frames < LEAST:
        raise ValueError(f"frames={frames}: three events and the pauses between them need {LEAST} or more")
    if min(height, width) < 3 * SIDES[1]:
        raise ValueError(f"a frame of {height} x {width} pixels does not hold five cards; use sides of {3 * SIDES[1]} or more")


def _times(rng: random.Random, count: int, frames: int) -> list[int]:
    """Frames of the events, in order, a sixth of the clip or so apart, or more, and as far from both ends."""
    gap = max(2, round(0.16 * frames))
    free = frames - gap * (count + 1)
    extra = sorted(rng.randint(0, free) for _ in range(count))
    return [gap * (i + 1) + e for i, e in enumerate(extra)]


def _changed(rng: random.Random, cards: list[Card], frame: int) -> list[Card]:
    """The cards after one change of one that is there by then."""
    index = rng.choice([i for i, c in enumerate(cards) if c.came < frame])
    if rng.random() < 0.5:
        then = rng.choice([c for c in COLORS if c not in {k.color for k in cards}])
        cards[index] = replace(cards[index], turned=frame, then=then)
    else:
        cards[index] = replace(cards[index], left=frame)
    return cards


def _placed(rng: random.Random, count: int, frames: int, height: int, width: int, movers: int) -> list[Card]:
    """Cards whose ways never touch; the first `movers` of them move."""
    looks = list(zip(rng.sample(SHAPES, count), rng.sample(list(COLORS), count)))
    while True:
        cards: list[Card] = []
        for i, (shape, color) in enumerate(looks):
            card = _free(rng, shape, color, cards, frames, height, width, i < movers)
            if card is None:
                break
            cards.append(card)
        else:
            rng.shuffle(cards)
            return cards


def _free(rng: random.Random, shape: str, color: str, others: list[Card], frames: int, height: int, width: int,
          mover: bool) -> Card | None:
    """A card whose way keeps clear of the others' ways; None if forty tries found none."""
    for _ in range(40):
        side = rng.randint(*SIDES)
        begin = rng.randint(1, width - side - 1), rng.randint(1, height - side - 1)
        end, moves = begin, (0, 0)
        if mover:
            end = tuple(min(limit - side - 1, max(1, b + rng.choice((-1, 0, 1)) * rng.randint(20, 60)))
                        for b, limit in zip(begin, (width, height)))  # type: ignore[assignment]
            first = rng.randint(1, frames // 2)
            moves = first, rng.randint(first + frames // 4, frames - 1)
        card = Card(shape, color, side, begin, end, moves)
        if all(_apart(_way(card), _way(other)) for other in others):
            return card
    return None


def _way(card: Card) -> tuple[int, int, int, int]:
    """left, top, right, bottom of all that a card ever covers, in pixels"""
    (x0, y0), (x1, y1) = card.begin, card.end
    return min(x0, x1), min(y0, y1), max(x0, x1) + card.side, max(y0, y1) + card.side


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[2] + MARGIN <= b[0] or b[2] + MARGIN <= a[0] or a[3] + MARGIN <= b[1] or b[3] + MARGIN <= a[1]


def _drawn(rng: random.Random, story: Story, height: int, width: int) -> np.ndarray:
    """frames x height x width x 3 uint8"""
    ground = background(rng, height, width)
    tints = {color: tuple(int(np.clip(v + rng.randint(-15, 15), 0, 255)) for v in rgb) for color, rgb in COLORS.items()}
    grain = np.random.default_rng(rng.getrandbits(64))
    out = np.empty((story.frames, height, width, 3), np.uint8)
    for frame in range(story.frames):
        image = ground.copy()
        draw = ImageDraw.Draw(image)
        for card in story.seen(frame):
            _draw_card(draw, card, frame, tints[card.color_at(frame)])
        noise = grain.standard_normal((height, width, 3), np.float32) * np.float32(NOISE)
        out[frame] = np.clip(np.asarray(image) + noise + np.float32(0.5), 0, 255).astype(np.uint8)
    return out


def _draw_card(draw: ImageDraw.ImageDraw, card: Card, frame: int, rgb: tuple[int, ...]) -> None:
    x, y = card.corner_at(frame)
    draw.rounded_rectangle((x, y, x + card.side, y + card.side), radius=4, fill=rgb)
    ink = (255, 255, 255) if sum(rgb) < 400 else (20, 20, 20)
    draw_shape(draw, card.shape, x + card.side / 2, y + card.side / 2, 0.36 * card.side, ink)


def questions(rng: random.Random, story: Story, count: int, weights: tuple[float, ...] = (1, 1, 1)
              ) -> list[tuple[str, str, str]]:
    """`count` (kind, question, answer) about one clip, `KINDS` by weight; the answer is one word or digit.

    Shapes never change, so they name a card whose colour is asked; elsewhere a card is called by the colour it came with.
    ValueError for a still clip: what these ask about did not happen.
    """
    if story.change is None:
        raise ValueError("a still clip has no change to ask about; draw it with clips.clip")
    return [(kind, *_ASK[kind](rng, story)) for kind in rng.choices(KINDS, weights, k=count)]


def _order(rng: random.Random, story: Story) -> tuple[str, str]:
    late, roll = story.late, rng.random()
    if roll < 0.5 and len(late) > 1:
        one, two = rng.sample(late, 2)
        return f"which card came first, {one.color} or {two.color}?", min(one, two, key=lambda c: c.came).color
    card = rng.choice(late)
    if roll < 0.75 or card is story.changed:            # a card comes before it changes, whatever the clip shows
        return "which card came last?", late[-1].color
    assert story.change is not None
    return f"did the {card.color} card come before the change?", "yes" if card.came < story.change[1] else "no"


def _count(rng: random.Random, story: Story) -> tuple[str, str]:
    end = rng.random() < 0.6
    return f"how many cards are there at the {'end' if end else 'start'}?", str(len(story.seen(-1 if end else 0)))


def _change(rng: random.Random, story: Story) -> tuple[str, str]:
    card, roll = story.changed, rng.random()
    assert card is not None
    if roll < 0.15:
        other = rng.choice(story.seen(-1))
        return f"what color is the {other.shape} at the end?", other.color_at(story.frames - 1)
    if card.left is not None:
        return ("which card left?", card.color) if roll < 0.6 else ("what shape is on the card that left?", card.shape)
    if roll < 0.4:
        return "what shape is on the card that changed color?", card.shape
    if roll < 0.65:
        return f"what color is the {card.shape} before the change?", card.color
    return f"what color is the {card.shape} at the end?", str(card.then)


_ASK: dict[str, Callable[[random.Random, Story], tuple[str, str]]] = {"order": _order, "count": _count, "change": _change}


def transcript(story: Story) -> tuple[str, str]:
    """The dense question: the cards at the start in reading order, then what happens, in order."""
    happened = [(c.came, f"came {c.color} {c.shape}") for c in story.late]
    if (card := story.changed) is not None and story.change is not None:
        kind, frame = story.change
        happened.append((frame, f"left {card.color} {card.shape}" if kind == "leave" else
                         f"change {card.color} {card.shape} {card.then}"))
    parts = [f"{c.color} {c.shape}" for c in story.seen(0)] + [what for _, what in sorted(happened)]
    return "describe the clip.", "; ".join(parts)


def lookup(rng: random.Random, story: Story, key: str) -> tuple[str, list[tuple[str, str]]]:
    """Dense questions that teach looking up. -> (question, (given, wanted) of every card, in random order)

    key   "shape": a shape's colour in the first and in the last frame, "no" where it is not there; one shape never comes.
          "color": the shape of each colour that is ever seen, and whether it is seen in the first and in the last frame.
    """
    end, first, last = story.frames - 1, story.seen(0), story.seen(-1)
    yes = lambda holds: "yes" if holds else "no"  # noqa: E731
    if key == "shape":
        rows = [(c.shape, f"{c.color if c in first else 'no'} {c.color_at(end) if c in last else 'no'}") for c in story.cards]
        rows.append((rng.choice([s for s in SHAPES if s not in {c.shape for c in story.cards}]), "no no"))
        return "look up shape start end.", rng.sample(rows, len(rows))
    rows = [(c.color, f"{c.shape} {yes(c in first)} {yes(c in last and c.color_at(end) == c.color)}") for c in story.cards]
    rows += [(c.then, f"{c.shape} no yes") for c in story.cards if c.then is not None]
    return "look up color shape start end.", rng.sample(rows, len(rows))


def sheet(frames: np.ndarray, columns: int = 8) -> Image.Image:
    """The frames (T, H, W, 3) uint8 side by side, row by row, as one picture."""
    rows = -(-len(frames) // columns)
    out = Image.new("RGB", (columns * (frames.shape[2] + 2), rows * (frames.shape[1] + 2)), "white")
    for i, frame in enumerate(frames):
        out.paste(Image.fromarray(frame), (i % columns * (frames.shape[2] + 2), i // columns * (frames.shape[1] + 2)))
    return out
