"""Synthesised English speech with exact labels, offline: for training a small codec, and for probing what its tokens keep.

`draw("train/17")` is a pure function of its arguments, samples included, so a corpus is a range of seeds and nothing is stored.
The synthesiser is eSpeak NG, as the PyPI package espeakng-loader brings it (`pip install 'mmcompress[speech]'`). eSpeak NG is
GPL-3.0: it is the user's own installation, loaded at the first call, and no part of this package.

It is a formant synthesiser: intelligible, and unlike a recording. No two voices differ as two people do; most are the same
filters with other formants.
"""

from .drawing import KINDS, draw
from .espeak import Span, Utterance, say, voices
from .phonemes import PHONEMES, SILENCE

__all__ = ["KINDS", "PHONEMES", "SILENCE", "Span", "Utterance", "draw", "say", "voices"]
