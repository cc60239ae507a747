"""What the speech benchmark counts and unpacks, against independent ways of doing it. No weights, nothing fetched."""

import importlib
import itertools
import json
import random
import sys
import wave
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperConfig, WhisperForConditionalGeneration

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def speech():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("speech")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("speech", "speech_corpus", "common"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def corpus(speech):
    return importlib.import_module("speech_corpus")


def brute(ref, hyp):
    """(edits, substitutions) of the best alignment, by trying each pair of equally long increasing choices of places."""
    best = None
    for k in range(min(len(ref), len(hyp)) + 1):
        for a in itertools.combinations(ref, k):
            for b in itertools.combinations(hyp, k):
                wrong = sum(x != y for x, y in zip(a, b))
                edits = wrong + len(ref) + len(hyp) - 2 * k
                best = min(best or (edits, -wrong), (edits, -wrong))
    return best[0], -best[1]


WORDS = st.lists(st.sampled_from(["cat", "dog", "bird"]), max_size=6)


@settings(max_examples=150, deadline=None)
@given(WORDS, WORDS)
def test_word_errors_are_the_fewest_edits_with_most_substitutions(speech, ref, hyp):
    found = speech.word_errors(" ".join(ref), " ".join(hyp))
    assert (found.edits, found.substitutions) == brute(ref, hyp)
    assert found.words == len(ref)
    assert len(ref) - found.deletions + found.insertions == len(hyp)


def test_word_errors_of_long_texts_equal_the_recursion(speech):
    rng = random.Random(0)
    for _ in range(20):
        ref, hyp = ([rng.choice("abcdefg") * 3 for _ in range(rng.randint(0, 40))] for _ in range(2))

        @cache
        def edits(i, j, ref=tuple(ref), hyp=tuple(hyp)):
            if i == 0 or j == 0:
                return i + j
            return min(edits(i - 1, j) + 1, edits(i, j - 1) + 1, edits(i - 1, j - 1) + (ref[i - 1] != hyp[j - 1]))

        assert speech.word_errors(" ".join(ref), " ".join(hyp)).edits == edits(len(ref), len(hyp))


@pytest.mark.parametrize(("one", "other"), [
    ("I can't; he'll WAIT...", "i cannot he will wait"), ("Press one, or two.", "press 1 or 2"),
    ("It's the Doctor's colour", "it is the doctor is color"), ("um, twenty three dogs", "23 dogs")])
def test_texts_that_say_the_same_are_normalised_to_the_same(speech, one, other):
    assert speech.normalise(one).replace("can not", "cannot") == speech.normalise(other).replace("can not", "cannot")


def test_normalising_twice_changes_nothing_and_keeps_a_loss_visible(speech):
    text = speech.normalise("We don't know what they'd do; it isn't over!")
    assert speech.normalise(text) == text
    assert speech.word_errors("we know", "we don't know")[:3] == (0, 0, 2)          # do, not


def test_rates_are_of_all_words_and_their_intervals_hold_them(speech):
    E = speech.Errors
    rate = speech.word_error_rate([E(1, 0, 0, 2), E(0, 0, 0, 98)])
    assert rate.value == pytest.approx(0.01) and rate.n == 2                        # not the mean of 1/2 and 0
    assert rate.low == 0 and rate.high == pytest.approx(0.5)                        # the first clip twice
    same = speech.word_error_rate([E(1, 1, 1, 30)] * 5)
    assert same.low == same.value == same.high == pytest.approx(0.1)
    with pytest.raises(ValueError, match="no clips"):
        speech.word_error_rate([])


def test_the_interval_covers_a_known_rate_about_as_often_as_it_says(speech):
    rng = np.random.default_rng(1)
    hits = 0
    for k in range(200):
        errors = [speech.Errors(int(e), 0, 0, 50) for e in rng.binomial(50, 0.1, size=40)]
        rate = speech.word_error_rate(errors, draws=400, seed=k)
        hits += rate.low <= 0.1 <= rate.high
    assert 175 <= hits <= 199                                                       # 190 of 200 are due


def test_a_paired_difference_is_narrower_than_the_two_rates(speech):
    rng = np.random.default_rng(0)
    base = [speech.Errors(int(e), 0, 0, 40) for e in rng.integers(0, 20, size=60)]   # clips differ much, systems by one word
    worse = [speech.Errors(e.substitutions + 1, 0, 0, 40) for e in base]
    found = speech.difference(worse, base)
    assert found.low == found.value == found.high == pytest.approx(1 / 40)
    alone = speech.word_error_rate(base)
    assert alone.high - alone.low > 0.05
    assert speech.difference(base, base)[:3] == (0, 0, 0)
    with pytest.raises(ValueError, match="same clips"):
        speech.difference(base, base[1:])


def test_a_corpus_is_read_back_as_written(speech, tmp_path, corpus):
    audio = np.linspace(-1, 1, 16_000, dtype=np.float32)
    corpus.write_wav(tmp_path / "a.wav", audio)
    entry = {"file": "a.wav", "text": "Hello.", "source": "s", "voice": "v", "seconds": 1.0}
    (tmp_path / "manifest.json").write_text(json.dumps({"made_with": {}, "clips": [entry]}))
    (clip,) = speech.read_corpus(tmp_path)
    assert (clip.text, clip.seconds, clip.folder) == ("Hello.", 1.0, tmp_path)
    assert np.abs(clip.audio() - audio).max() < 1e-4
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
    with pytest.raises(ValueError, match="16 kHz"):
        clip.audio()
    with pytest.raises(FileNotFoundError, match=r"speech\.py make"):
        speech.read_corpus(tmp_path / "none")


def test_clips_lie_within_their_span_and_end_with_their_runs(corpus):
    tone = np.sin(np.arange(16_000 * 4) / 10).astype(np.float32)                    # each line lasts 4 s
    quiet = np.concatenate([np.zeros(9000, np.float32), tone, np.zeros(5000, np.float32)])
    runs = [[(f"one two three four five six seven eight {i} {j}", None) for j in range(9)] for i in range(5)]
    left = list(runs)
    clips = list(corpus.fill(left, lambda key: quiet, 3, (18.0, 28.0), 99, random.Random(0)))
    assert len(clips) == 3 and left == [*runs[3:], *(run[6:] for run in runs[:3])]      # 3 lines cannot fill 18 s
    for i, (text, audio) in enumerate(clips):
        lines = text.count("one")
        assert 18 <= len(audio) / 16_000 <= 28 and text.split()[8] == str(i)
        assert lines == 6 and 6 * 4 < len(audio) / 16_000 < 6 * 4.06 + 5 * 0.6      # silence went, pauses came
    assert list(corpus.fill(list(runs), lambda key: quiet, 3, (18.0, 28.0), 2, random.Random(0))) == []


def test_only_words_seen_in_lower_case_are_plain(corpus):
    words = corpus.lower_case(["We saw the big dogs, didn't we? Rover ran."])
    assert words >= {"we", "saw", "didn't", "ran", "a", "i"} and not words & {"rover", "t"}
    assert corpus.plain("The BIG dogs ran...", words)
    for text in ("The Rover ran", "The 2 dogs", "The dogs (ran)", "the cats"):
        assert not corpus.plain(text, words)
    assert corpus.lower_case(["big dogs", "big cats"], least=2) >= {"big"}
    runs = corpus.consecutive([(1, "a"), (2, "b"), (5, "c"), (6, "d"), (7, "e")], gap=2, most=2)
    assert runs == [["a", "b"], ["c", "d"], ["e"]]


def test_the_prefix_code_is_prefix_free_and_decodes_what_it_encodes(corpus):
    codes = corpus.prefix_code(corpus.LEAVES)
    bits = {f"{code:0{size}b}": letter for (size, code), letter in codes.items()}
    assert len(bits) == len(codes)
    assert not any(a != b and b.startswith(a) for a in bits for b in bits)
    assert sum(2.0 ** -len(b) for b in bits) < 1
    letters = {letter: b for b, letter in bits.items()}
    texts = ["Hello there.", "Who?", "A wrench!"] * 15                              # more than one block of 32
    packed = ["".join(letters[c] for c in text + "\0") for text in texts]
    packed = [p + "0" * (-len(p) % 2) for p in packed]                              # in units of two bits
    sizes = [len(p) // 2 for p in packed]
    stream = "".join(packed)
    data = int(stream.ljust(-(-len(stream) // 8) * 8, "0"), 2).to_bytes(-(-len(stream) // 8), "big")
    head = 4 + 2
    section = (head.to_bytes(2, "little") + (head + len(sizes)).to_bytes(2, "little")
               + sum(sizes[:32]).to_bytes(2, "little") + bytes(sizes) + data)
    assert [corpus.sky_text(section, i, codes) for i in range(45)] == texts


def pack_rnc(tokens):
    """An RNC stream of one block of (literals, (distance, length) or None), with fixed codes of four bits."""
    data, word = bytearray(), ""

    def put(value, n):
        nonlocal word
        for k in range(n):
            word += str(value >> k & 1)
            if len(word) == 16:
                flush()

    def flush():
        nonlocal word
        place = slot.pop()
        data[place:place + 2] = int(word[::-1], 2).to_bytes(2, "little")
        word = ""

    slot = []

    def reserve():
        if not slot:
            slot.append(len(data))
            data.extend(b"\0\0")

    def bits(value, n):
        for k in range(n):
            reserve()
            put(value >> k & 1, 1)

    def number(value):
        symbol = value.bit_length() if value > 1 else value
        bits(int(f"{symbol:04b}"[::-1], 2), 4)                                      # canonical, highest bit first
        if symbol > 1:
            bits(value - (1 << symbol - 1), symbol - 1)

    bits(0, 2)
    for _ in range(3):
        bits(16, 5)
        for _ in range(16):
            bits(4, 4)
    bits(len(tokens), 16)
    for literals, match in tokens:
        number(len(literals))
        data.extend(literals)
        if match:
            number(match[0] - 1)
            number(match[1] - 2)
    while word:
        put(0, 1)
    return bytes(data)


def test_rnc_is_unpacked_as_packed(corpus):
    tokens = [(b"abcdefgh", (3, 9)), (b"", (8, 300)), (b"xyz" * 50, (1, 2)), (b"end", None)]
    want = bytearray()
    for literals, match in tokens:
        want += literals
        for _ in range(match[1] if match else 0):
            want.append(want[-match[0]])
    body = pack_rnc(tokens)
    head = b"RNC\1" + len(want).to_bytes(4, "big") + len(body).to_bytes(4, "big") + bytes(5) + b"\1"
    assert corpus.unpack_rnc(head + body) == want
    with pytest.raises(ValueError, match="expected"):
        corpus.unpack_rnc(b"RNC\1" + (len(want) + 1).to_bytes(4, "big") + (head + body)[8:])


class Words:
    """A processor that writes each token as a word."""

    def __call__(self, audio, sampling_rate, return_tensors):
        from transformers import WhisperFeatureExtractor

        return WhisperFeatureExtractor(feature_size=8)(audio, sampling_rate=sampling_rate, return_tensors=return_tensors)

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(f"w{i}" for i in row.tolist() if i < 90) for row in ids]


@pytest.fixture(scope="module")
def whisper():
    torch.manual_seed(2)
    config = WhisperConfig(vocab_size=99, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, decoder_ffn_dim=16,
                           encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, pad_token_id=96,
                           bos_token_id=96, eos_token_id=96, decoder_start_token_id=97, init_std=0.5)
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():                                                           # or all sounds read alike
        model.model.encoder.layer_norm.weight.fill_(5)
        model.model.decoder.layers[0].encoder_attn.out_proj.weight.mul_(5)
    model.generation_config.update(suppress_tokens=None, begin_suppress_tokens=None, no_timestamps_token_id=98,
                                   is_multilingual=False, return_timestamps=False)
    return model


def test_states_are_decoded_as_the_sound_itself_is_and_each_in_its_place(speech, whisper, tmp_path, corpus):
    rng = np.random.default_rng(0)
    clips = []
    for i, seconds in enumerate((1.0, 2.01, 0.5)):
        t = np.arange(int(16_000 * seconds)) / 16_000
        corpus.write_wav(tmp_path / f"{i}.wav", 0.5 * np.sin(2 * np.pi * 10 ** (2 + 0.7 * i) * t) + rng.normal(0, 0.01, len(t)))
        clips.append(speech.Clip(f"{i}.wav", "w1 w2", "s", "v", seconds, tmp_path))
    processor = Words()
    states, frames = speech.encode(whisper, processor, clips, batch=2, cache=tmp_path / "states.pt")
    assert states.shape == (3, 1500, 16) and frames.tolist() == [50, 101, 25]
    again, _ = speech.encode(None, None, clips, cache=tmp_path / "states.pt")        # read, not made
    assert torch.equal(again, states)
    with pytest.raises(ValueError, match="other clips"):
        speech.encode(whisper, processor, clips[:2], cache=tmp_path / "states.pt")
    mel = processor([c.audio() for c in clips], sampling_rate=16_000, return_tensors="pt").input_features
    with torch.inference_mode():
        direct = processor.batch_decode(whisper.generate(input_features=mel, max_new_tokens=12, do_sample=False), True)
    assert len(set(direct)) > 1
    said = speech.transcribe(whisper, processor, states, batch=2, max_new_tokens=12)
    assert said == direct
    assert speech.transcribe(whisper, processor, states, 2, 12, order=[3, 1, 2]) == direct
    short = [states[0], states[1][:700], states[2], states[1][:700]]                  # mixed lengths
    mixed = speech.transcribe(whisper, processor, short, batch=3, max_new_tokens=12)
    assert [mixed[0], mixed[2]] == [direct[0], direct[2]] and mixed[1] == mixed[3]
    errors = speech.score(whisper, processor, states, direct, max_new_tokens=12)
    assert [e.edits for e in errors] == [0, 0, 0]
    assert [r["clips"] for r in speech.by_source(clips, errors)] == [3, 3]
