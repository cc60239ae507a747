"""Synthesised speech: a function of its arguments, and labels that lie where the sound is."""

import hashlib
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mmcompress.audio.speech import PHONEMES, SILENCE, Span, draw, espeak, say, voices
from mmcompress.audio.speech.words import DIGITS, VOCABULARY, sentence

VOWELS = {"AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"}
SOME = ("en-us", "en-us+m2", "en-us+f5", "en-gb+f2", "en-gb-scotland+m1", "en-029+f3", "en-us-nyc+m7")     # with echo, breath


def digest(utterance):
    return hashlib.sha256(utterance.sound.samples.numpy().tobytes() + repr(utterance.phones).encode()).hexdigest()


def level(utterance, span):
    """dBFS of what lies in a span."""
    x = utterance.sound.samples[round(span.start * 16_000):round(span.end * 16_000)]
    return 10 * float(torch.log10(x.square().mean() + 1e-12))


def period(x):
    """Samples between the pulses of the voice, 50 to 400 Hz, by autocorrelation."""
    spectrum = np.abs(np.fft.rfft(x, 2 * len(x))) ** 2
    return 40 + np.fft.irfft(spectrum)[40:320].argmax()


def test_speech_does_not_depend_on_what_was_said_before():
    first = {voice: digest(say("She measured the other church.", voice)) for voice in SOME}
    say("Something else entirely!", "en-gb-x-rp+f4", 300, 90)
    say("and louder", "en-us+m8", 90, 5)
    assert {voice: digest(say("She measured the other church.", voice)) for voice in reversed(SOME)} == dict(first)
    assert len(set(first.values())) == len(SOME)


def test_another_process_says_the_same():
    code = ("import sys; sys.path.insert(0, 'tests'); from test_speech import digest, draw, say\n"
            "say('a warm-up', 'en-029+f5'); print(digest(draw('seed/7')), digest(draw('seed/7', 'digits')))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out == [digest(draw("seed/7")), digest(draw("seed/7", "digits"))]


def test_threads_take_turns():
    alone = [digest(draw(f"thread/{i}", "digit")) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: digest(draw(f"thread/{i}", "digit")), range(8))) == alone


@pytest.mark.parametrize("kind", ["sentence", "digits", "digit"])
def test_phones_tile_the_sound_and_words_are_the_text(kind):
    for i in range(25):
        said = draw(f"tile/{i}", kind)
        assert said.sound.sample_rate == 16_000 and said.sound.samples.ndim == 1 and said.sound.samples.dtype == torch.float32
        assert said.phones[0].start == 0 and all(p.start < p.end for p in said.phones)
        assert all(a.end == b.start for a, b in zip(said.phones, said.phones[1:]))
        assert said.sound.seconds - 1e-4 < said.phones[-1].end <= said.sound.seconds
        assert {p.label for p in said.phones} <= {*PHONEMES, SILENCE}
        assert " ".join(w.label for w in said.words) == said.text
        assert all(a.end <= b.start for a, b in zip(said.words, said.words[1:]))
        starts, ends = {p.start for p in said.phones}, {p.end for p in said.phones}
        assert all(w.start in starts and w.end in ends for w in said.words)
        assert said.sound.samples.abs().max() <= 0.9501
        assert 0.07 < said.sound.samples.square().mean().sqrt() < 0.1001


@pytest.mark.parametrize("voice", SOME)
def test_vowels_are_loud_and_the_mouth_is_closed_before_a_stop(voice):
    said = say("The big dog took a copper cup to the cheap bakery, and a kitten sat.", voice)
    vowels = [level(said, p) for p in said.phones if p.label in VOWELS]
    pauses = [level(said, p) for p in said.phones if p.label == SILENCE and p.end - p.start > 0.02]
    assert np.median(vowels) > -21 and max(pauses) < -38
    closures = []
    for before, p in zip(said.phones, said.phones[1:]):
        if p.label in ("P", "T", "K", "CH") and before.label in VOWELS and p.end - p.start > 0.04:
            closures.append(level(said, Span(p.label, p.start + 0.005, p.start + 0.03)))
    assert len(closures) >= 5 and np.median(closures) < -38


@pytest.mark.parametrize("word, phones", [
    ("zero", "Z IH R OW"), ("one", "W AH N"), ("three", "TH R IY"), ("five", "F AY V"), ("seven", "S EH V AH N"),
    ("eight", "EY T"), ("judge", "JH AH JH"), ("vision", "V IH ZH AH N"), ("car", "K AA R"), ("table", "T EY B AH L"),
    ("toy", "T OY"), ("thing", "TH IH NG"), ("bird", "B ER D"), ("good", "G UH D"), ("mother", "M AH DH ER"),
    ("huge", "HH Y UW JH"),
])
def test_words_have_the_phonemes_of_the_cmu_dictionary(word, phones):
    assert [p.label for p in say(word).phones if p.label != SILENCE] == phones.split()


def test_an_r_that_an_accent_drops_is_dropped():
    american, british = ([p.label for p in say("dark car", voice).phones if p.label != SILENCE] for voice in ("en-us", "en-gb"))
    assert american == ["D", "AA", "R", "K", "K", "AA", "R"] and british == ["D", "AA", "K", "K", "AA"]


def test_two_words_that_are_spoken_as_one_share_a_span():
    said = say("a cat on the mat")
    assert [w.label for w in said.words] == ["a", "cat", "on the", "mat"]


def test_all_phonemes_occur_and_every_voice_speaks():
    order = list(voices())
    random.Random(0).shuffle(order)
    seen = {p.label for voice in ("en-us", "en-gb") for i in range(0, len(VOCABULARY), 50)
            for p in say(" ".join(VOCABULARY[i:i + 50]), voice, 400).phones}
    assert seen == {*PHONEMES, SILENCE}
    digests = {digest(say("her last hard road", voice, 300)) for voice in order}
    assert len(digests) == len(order) == 98


def test_seeds_and_kinds_draw_different_things():
    assert len({(u.text, u.voice) for u in (draw(f"s/{i}", "digits") for i in range(20))}) == 20
    assert all(w.label in DIGITS for w in draw("s/1", "digits").words)
    assert {len(draw(f"n/{i}", "digits").words) for i in range(25)} == {3, 4, 5, 6}
    assert len(draw("s/1", "digit").words) == 1
    assert {len(sentence(random.Random(i)).split()) for i in range(500)} <= set(range(6, 13))


def test_speed_pitch_and_rate_are_obeyed():
    slow, fast = say("one two three", speed=100), say("one two three", speed=300)
    assert slow.sound.seconds > 1.8 * fast.sound.seconds
    low, high = (period(say("oh", pitch=p).sound.samples.numpy()) for p in (10, 90))
    assert low > 1.3 * high
    assert say("one", rate=24_000).sound.sample_rate == 24_000


@pytest.mark.parametrize("arguments, message", [
    ({"text": ""}, "text=''"), ({"text": "  "}, "a word"), ({"text": "..."}, "no word"),
    ({"text": "a", "voice": "nobody"}, "en-gb"),
    ({"text": "a", "voice": "en-us+whisper"}, "known are"), ({"text": "a", "speed": 20}, "speed=20: .* 80 to 450"),
    ({"text": "a", "pitch": 101}, "pitch=101"), ({"text": "a", "pitch": 0.5}, "pitch=0.5"),
])
def test_what_cannot_be_said_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        say(**arguments)
    with pytest.raises(ValueError, match="sentence, digits, digit"):
        draw("s", "song")


def test_without_the_synthesiser_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    espeak._installed.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'mmcompress\[speech\]'"):
        say("hello")
    espeak._installed.cache_clear()
