"""eSpeak NG through ctypes: text in, samples and the times of phonemes and words out.

Its library keeps state from one utterance to the next (the phase of the voice's flutter, among others) that no call resets,
so each `say` loads a copy of its own, of which everything is at its start, and seeds it. That costs a few milliseconds, makes
the samples a function of the arguments, and leaves another user of the library in this process alone.
"""

from __future__ import annotations

import _ctypes
import ctypes
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch

from ..reading import Sound, as_sound
from .phonemes import SILENCE, STOPS, phonemes

ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-us-nyc", "en-029")
VARIANTS = ("", *(f"+m{i}" for i in range(1, 9)), *(f"+f{i}" for i in range(1, 6)))
SPEEDS = (80, 450)                      # espeak's limits, words per minute
ECHOES = {"m2": (130, 15), "f2": (140, 10), "f3": (120, 10), "f4": (130, 15), "f5": (140, 10)}     # (ms, 256ths of amplitude)
SHORTEST_CLOSURE = 0.008                # seconds
LOUDNESS, PEAK = 0.1, 0.95              # -20 dBFS rms, unless that would exceed the peak

_SYNCHRONOUS, _PHONEMES, _KEEP_RUNNING, _UTF8 = 2, 0x1, 0x8000, 1        # of speak_lib.h
_WORD, _PHONEME = 1, 7
_RATE, _PITCH = 1, 3
_lock = Lock()


@dataclass(frozen=True)
class Span:
    """What is said from `start` until before `end`, in seconds."""

    label: str
    start: float
    end: float


@dataclass(frozen=True, eq=False)
class Utterance:
    """Speech and what is said in it when.

    sound    mono, -20 dBFS rms
    phones   ARPAbet and SIL (phonemes.py); in order, from 0 to the end, without a hole or an overlap
    words    as they stand in the text, in lower case; in order, without overlap, no silence in them
    """

    sound: Sound
    text: str
    voice: str
    phones: tuple[Span, ...]
    words: tuple[Span, ...]


def voices() -> tuple[str, ...]:
    """The English voices that `say` takes: seven accents, each plain (a man), as eight other men and as five women."""
    return tuple(accent + variant for accent in ACCENTS for variant in VARIANTS)


def say(text: str, voice: str = "en-us", speed: int = 175, pitch: int = 50, rate: int = 16_000) -> Utterance:
    """Speech of `text`, a function of its arguments whatever was said before. Threads take turns.

    voice  one of voices()
    speed  words per minute, 80 to 450
    pitch  0 to 100; 50 is the voice's own
    rate   of the samples, Hz; espeak's own is 22,050

    Raises ValueError for another voice, speed or pitch and for a text without a word, ImportError without espeakng-loader.
    """
    _check(text, voice, speed, pitch)
    with _lock:
        samples, own_rate, events = _synthesise(text, voice, speed, pitch)
    cuts = _cuts(events, len(samples), voice.partition("+")[0])
    cuts = _with_closures(cuts, _silent(samples, own_rate, voice.partition("+")[2]), own_rate)
    phones = tuple(Span(c.label, c.start / own_rate, c.end / own_rate) for c in cuts)
    if not any(p.label != SILENCE for p in phones):
        raise ValueError(f"text={text!r:.80}: there is no word in it that a voice could say")
    return Utterance(_levelled(as_sound(samples, own_rate, to=rate)), text, voice, phones, _words(text, events, cuts, own_rate))


def _check(text: str, voice: str, speed: int, pitch: int) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text={text!r:.80}: pass a text with a word in it")
    if voice not in voices():
        raise ValueError(f"voice={voice!r}: known are {', '.join(ACCENTS)}, each also with +m1 to +m8 and +f1 to +f5")
    for name, value, low, high in (("speed", speed, *SPEEDS), ("pitch", pitch, 0, 100)):
        if not isinstance(value, (int, np.integer)) or not low <= value <= high:
            raise ValueError(f"{name}={value!r}: pass an int from {low} to {high}")


def _levelled(sound: Sound) -> Sound:
    x = sound.samples
    gain = min(LOUDNESS / float(x.square().mean().sqrt()), PEAK / float(x.abs().max()))
    return Sound(x * torch.tensor(gain, dtype=x.dtype), sound.sample_rate, sound.source_rate, sound.source_channels)


# times ------------------------------------------------------------------------------------------------------------------

class _Happening(NamedTuple):
    """What espeak tells: `kind` at the sample `at`, the phoneme's name, and the place in the text."""
    kind: int
    at: int
    name: str
    text: int


class _Cut(NamedTuple):
    """A phone in samples, and which word it is of."""
    label: str
    start: int
    end: int
    word: int


def _cuts(events: list[_Happening], length: int, accent: str) -> list[_Cut]:
    """The phones from 0 to `length` as espeak times them; neighbouring silences are one."""
    marks, words = [(0, "_", -1)], -1
    for event in events:
        words += event.kind == _WORD
        if event.kind == _PHONEME:
            marks.append((event.at, event.name, words))
    parts = []
    for (start, name, word), (end, following, _) in zip(marks, [*marks[1:], (length, "", words)]):
        labels = phonemes(name, following, accent)
        parts += [(label, start + i * (end - start) // len(labels), word) for i, label in enumerate(labels)]
    cuts: list[_Cut] = []
    for (label, start, word), end in zip(parts, [part[1] for part in parts[1:]] + [length]):
        if cuts and label == SILENCE == cuts[-1].label:
            cuts[-1] = cuts[-1]._replace(end=end)
        elif end > start:
            cuts.append(_Cut(label, start, end, word))
    return cuts


def _silent(samples: np.ndarray, rate: int, variant: str) -> np.ndarray:
    """(samples) bool: nothing is played there but the voice's echo, which repeats 4/4 of a vowel and 3/4 of a noise."""
    x = samples.astype(np.int32)
    silent = np.abs(x) <= 1
    if variant in ECHOES:
        milliseconds, amplitude = ECHOES[variant]
        delay = milliseconds * rate // 1000
        echo = np.concatenate([np.zeros(delay, np.int32), x])[:len(x)] * amplitude
        silent |= (np.abs(x - echo / 256) < 2) | (np.abs(x - echo * 3 / 1024) < 2)           # espeak rounds twice
    return silent


def _with_closures(cuts: list[_Cut], silent: np.ndarray, rate: int) -> list[_Cut]:
    """A stop begins where the mouth closes: the silence before its release, which espeak counts to the phone before, is its."""
    sound = np.flatnonzero(~silent)
    out = cuts[:1]
    for cut in cuts[1:]:
        before = out[-1]
        if cut.label in STOPS and before.label != SILENCE:
            last = np.searchsorted(sound, cut.start) - 1
            closed = int(sound[last]) + 1 if last >= 0 else 0
            if before.start < closed <= cut.start - SHORTEST_CLOSURE * rate:
                out[-1], cut = before._replace(end=closed), cut._replace(start=closed)
        out.append(cut)
    return out


def _words(text: str, events: list[_Happening], cuts: list[_Cut], rate: int) -> tuple[Span, ...]:
    """Each word from its first phone to its last; the label is the text until the next, so of two spoken as one it has both."""
    starts = [event.text for event in events if event.kind == _WORD]
    out = []
    for i, (start, stop) in enumerate(zip(starts, [*starts[1:], len(text)])):
        inside = [cut for cut in cuts if cut.word == i and cut.label != SILENCE]
        label = text[start:stop].strip(" \t\n.,;:!?\"()-").lower()
        if inside and label:
            out.append(Span(label, inside[0].start / rate, inside[-1].end / rate))
    return tuple(out)


# the library ------------------------------------------------------------------------------------------------------------

class _Event(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
                ("length", ctypes.c_int), ("milliseconds", ctypes.c_int), ("sample", ctypes.c_int),
                ("user_data", ctypes.c_void_p), ("name", ctypes.c_char * 8))


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@cache
def _installed() -> tuple[Path, bytes]:
    """(the library, the folder of its data)"""
    try:
        import espeakng_loader
    except ImportError as e:
        raise ImportError("synthesising speech needs espeakng-loader: pip install 'mmcompress[speech]'") from e
    return Path(espeakng_loader.get_library_path()), espeakng_loader.get_data_path().encode()


@contextmanager
def _fresh() -> Iterator[Any]:
    """A copy of the library that nothing has used."""
    path, _ = _installed()
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(shutil.copy(path, folder))
        try:
            yield library
        finally:
            library.espeak_Terminate()
            close = getattr(_ctypes, "dlclose", None) or _ctypes.FreeLibrary          # type: ignore[attr-defined]
            close(library._handle)


def _synthesise(text: str, voice: str, speed: int, pitch: int) -> tuple[np.ndarray, int, list[_Happening]]:
    """(samples) int16, their rate, and what happens when."""
    blocks: list[np.ndarray] = []
    events: list[_Happening] = []

    def collect(samples: Any, count: int, event: Any) -> int:
        if samples and count:
            blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while event[i].type:
            e, i = event[i], i + 1
            name = e.name.decode("utf8", "replace") if e.type == _PHONEME else ""
            events.append(_Happening(e.type, e.sample, name, e.text_position - 1))
        return 0

    callback, encoded = _Callback(collect), text.encode()
    with _fresh() as library:
        rate = library.espeak_Initialize(_SYNCHRONOUS, 200, _installed()[1], _PHONEMES | _KEEP_RUNNING)
        if rate <= 0:
            raise RuntimeError(f"espeak-ng found no data in {_installed()[1].decode()}: install espeakng-loader again")
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))                 # after Initialize, which seeds by the clock
        library.espeak_SetSynthCallback(callback)
        name, plus, variant = voice.partition("+")
        name = {"en-gb": "en"}.get(name, name)                          # espeak knows its British English as this
        if library.espeak_SetVoiceByName((name + plus + variant).encode()):
            raise RuntimeError(f"espeak-ng has no voice {voice!r}: install espeakng-loader again")
        library.espeak_SetParameter(_RATE, int(speed), 0)
        library.espeak_SetParameter(_PITCH, int(pitch), 0)
        library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, _UTF8, None, None)
        library.espeak_Synchronize()
    return np.concatenate([np.zeros(0, np.int16), *blocks]), rate, events
