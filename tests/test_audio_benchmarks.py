"""The benchmarks of audio reducers run end to end on tiny models, and their tables say what was measured."""

import csv
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_audio import whisper
from transformers import WhisperFeatureExtractor

from mmcompress.audio import MeanPool, Stride

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


class Processor:
    """A feature extractor of 8 mel bins, and a decoder of ids into words."""

    def __init__(self):
        self.features = WhisperFeatureExtractor(feature_size=8)

    def __call__(self, audio, sampling_rate, return_tensors):
        return self.features(audio, sampling_rate=sampling_rate, return_tensors=return_tensors)

    def tokenizer(self, text):
        return SimpleNamespace(input_ids=[1, *(int(word[1:]) for word in text.split()[:20]), 2])

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(f"w{int(i)}" for i in row) for row in ids]


@pytest.fixture(scope="module")
def clips():
    speech = importlib.import_module("speech")

    class Tone(speech.Clip):
        def audio(self):
            t = np.arange(int(self.seconds * 16_000)) / 16_000
            return np.sin(2 * np.pi * 300 * len(self.text) * t).astype(np.float32)

    text = "the cat sat down on a mat"
    return [Tone(f"{i}.wav", text[:7 + 4 * i], ("a", "b")[i % 2], "v", 2.0 + i, Path(".")) for i in range(3)]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_word_errors_of_every_setting(tmp_path, clips, monkeypatch):
    wer = importlib.import_module("audio_wer")
    model, processor = whisper(states=1500, targets=256), Processor()
    states, _ = wer.encode(model, processor, clips)
    log = tmp_path / "log"
    settings = [("stride", 0.5), ("mean_pool", 0.5), ({"name": "random", "seed": 3}, 0.5)]
    errors = wer.measure(model, processor, clips, states, settings, log)
    assert set(errors) == {("all", 1.0), ("stride", 0.5), ("mean_pool", 0.5), ("random (seed=3)", 0.5)}
    assert all(sum(e.words for e in held.errors) == sum(len(c.text.split()) for c in clips) for held in errors.values())
    assert all(abs(nats) < 1e-4 for nats, _ in errors["all", 1.0].kl) and all(nats > 0 for nats, _ in errors["stride", 0.5].kl)
    monkeypatch.setattr(wer, "transcribe", None)                                        # everything is in the log
    assert wer.measure(model, processor, clips, states, settings, log) == errors
    rows = wer.table(errors, clips)
    assert {r["clips"] for r in rows} == {"all", "a", "b"} and len(rows) == 12
    [stock] = [r for r in rows if (r["method"], r["clips"]) == ("all", "all")]
    assert stock["states"] == 1500 and stock["vs_all"] == 0
    for row in rows:
        wrong = row["sub"] + row["del"] + row["ins"]
        assert row["wer"] == pytest.approx(100 * wrong / row["words"]) and row["low"] <= row["wer"] <= row["high"]
    wer.draw(rows, tmp_path / "wer.png")
    assert (tmp_path / "wer.png").stat().st_size > 10_000


def test_states_are_reduced_as_in_the_wrapped_model(clips):
    """The benchmark's short cut (states encoded once) equals the encoder of a wrapped model."""
    wer = importlib.import_module("audio_wer")
    import mmcompress
    model, processor = whisper(states=1500, targets=256), Processor()
    states, _ = wer.encode(model, processor, clips)
    mel = processor([c.audio() for c in clips], sampling_rate=16_000, return_tensors="pt").input_features
    for reducer, name in ((MeanPool(keep=0.3), "mean_pool"), (Stride(keep=0.3), "stride")):
        short = wer.reduce_states(model, processor, clips, states, name, 0.3, batch=2)
        with mmcompress.wrap(model, audio=reducer), torch.no_grad():
            torch.testing.assert_close(short, model.get_encoder()(mel).last_hidden_state, atol=1e-5, rtol=1e-4)


def test_costs(tmp_path, monkeypatch):
    cost = importlib.import_module("audio_cost")
    monkeypatch.setitem(cost.SHAPES, "tiny", (16, 2, 2, 8))
    out = tmp_path / "cost.csv"
    cost.main(["--shapes", "tiny", "--methods", "stride,mean_pool", "--windows", "2", "--repeats", "1", "--device", "cpu",
               "--keep", "0.4", "--out", str(out)])
    rows = read(out)
    assert [r["method"] for r in rows] == ["stride", "mean_pool"]
    for row in rows:
        assert float(row["cache_ratio"]) == float(row["claimed_ratio"]) == pytest.approx(0.4)
        assert float(row["encoder_ms"]) > 0 and float(row["reducer_ms"]) > 0 and row["torch"] and row["n"] == "1"


# A naive rewrite of the authors' rule, one pair at a time, under the names that the benchmark looks for.
STAND_IN = '''
import an_old_transformers


class QWenBlock:
    def merge_hidden_states(self, hidden, similarity, method, ratio, weight):
        print("merging")
        k, out = int(hidden.shape[1] * ratio), []
        for row in range(len(hidden)):
            joined = set(similarity[row].argsort(descending=True)[:k].tolist())
            tokens, run = [], [0]
            for i in range(hidden.shape[1]):
                if i in joined:
                    run.append(i + 1)
                    continue
                w = torch.ones(len(run)) if weight is None else weight[row, run]
                tokens.append((hidden[row, run] * w[:, None]).sum(0) / w.sum() * FACTOR)
                run = [i + 1]
            out.append(torch.stack(tokens))
        return torch.stack(out)
'''


@pytest.mark.parametrize("factor, code", [("1.0", 0), ("1.001", 1)])
def test_fastadasp_parity_tells_their_rule_from_another(tmp_path, monkeypatch, factor, code):
    parity = importlib.import_module("fastadasp_parity")
    monkeypatch.setattr(parity, "SHAPES", parity.SHAPES[:2])
    file = tmp_path / "authors" / parity.FILE
    file.parent.mkdir(parents=True)
    file.write_text(STAND_IN.replace("FACTOR", factor))
    out = tmp_path / "parity.csv"
    assert parity.main(["--authors", str(tmp_path / "authors"), "--seeds", "1", "--out", str(out)]) == code
    assert [r["cases"] for r in read(out)] == ["14", "14"]
    with pytest.raises(SystemExit, match="checkout of the authors"):
        parity.main(["--authors", str(tmp_path)])
