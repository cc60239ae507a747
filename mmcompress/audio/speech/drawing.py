"""An utterance from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable

from .espeak import Utterance, say, voices
from .words import digits, sentence

KINDS: dict[str, Callable[[random.Random], str]] = {
    "sentence": sentence,
    "digits": lambda rng: digits(rng, 3, 6),
    "digit": lambda rng: digits(rng, 1, 1),
}
SPEEDS, PITCHES = (130, 210), (25, 75)          # words per minute, espeak's pitch: from both ends, all are easy to follow


def draw(seed: str, kind: str = "sentence") -> Utterance:
    """What the seed says in a voice, at a speed and at a pitch that are drawn, too; 16 kHz.

    kind   "sentence" (6 to 12 words, no silence between them), "digits" (3 to 6, as words) or "digit" (one)

    A pure function: the same seed and kind give the same samples, in any order and in any process, for one version of
    espeakng-loader and torchaudio. Kinds share nothing: the digit of a seed need not be the first of its digits.
    Raises ValueError for another kind, ImportError without espeakng-loader or torchaudio.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: known are {', '.join(KINDS)}")
    rng = random.Random(f"{seed}/{kind}")
    text = KINDS[kind](rng)
    return say(text, rng.choice(voices()), rng.randint(*SPEEDS), rng.randint(*PITCHES))
