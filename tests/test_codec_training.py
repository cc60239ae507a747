"""Training a codec by a recipe: what it hears, that it learns, resumes bit for bit, agrees over processes, ends as stock."""

import json
import math
import os
import random
import subprocess
import sys
import wave
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoFeatureExtractor, HubertConfig, HubertModel, WavLMConfig, WavLMModel, XcodecConfig, XcodecModel
from typer.testing import CliRunner

from mmcompress.audio import load
from mmcompress.audio.reading import duration
from mmcompress.audio.xcodec.teacher import build, codec_config
from mmcompress.cli import app
from mmcompress.train import kinds
from mmcompress.train.codec import loop
from mmcompress.train.codec.measure import measure
from mmcompress.train.codec.recipe import CodecRecipe, Optim, Speech
from mmcompress.train.codec.segments import Files, Segments, Sentences, find, held_out, sources
from mmcompress.train.codec.step import share
from mmcompress.train.record import read_log

RATE = 16_000


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A random HuBERT of two narrow layers, in half precision as the embedded one."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    HubertModel(HubertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=[8] * 7,
                             num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)).half().save_pretrained(folder)
    return str(folder)


def write(path, samples, rate=RATE):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((samples.clamp(-1, 1) * 32767).short().numpy().tobytes())


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Ten files of chords whose pitch and loudness change five times a second."""
    folder = tmp_path_factory.mktemp("sounds")
    for i in range(10):
        rng = random.Random(i)
        parts = []
        for _ in range(5 + i):
            at = torch.arange(RATE // 5) / RATE
            parts.append(sum(torch.sin(2 * math.pi * rng.uniform(100, 3000) * at) for _ in range(3)) * rng.uniform(0.02, 0.3))
        write(folder / f"{i}.wav", torch.cat(parts))
    return str(folder)


def recipe(teacher, sounds, **changes):
    plain = {"kind": "xcodec", "steps": 6, "batch": 2, "teacher": teacher, "log_every": 1, "save_every": 3,
             "model": {"width": 4, "acoustic": 8, "decoder": 32, "codes": 16, "books": [1, 2, 4]},
             "rvq": {"dead": 0.1, "decay": 0.9}, "weights": {"semantic": 10},
             "judge": {"hops": [32, 64], "hidden": [32, 32], "start": 2}, "optim": {"lr": 1e-3},
             "data": {"files": [sounds], "seconds": 0.2, "every": 3}, "eval": {"every": 3, "n": 4, "seconds": 0.2}}
    for key, value in changes.items():
        plain[key] = {**plain[key], **value} if isinstance(value, dict) and isinstance(plain.get(key), dict) else value
    return CodecRecipe.from_dict(plain)


# the codec it begins with ---------------------------------------------------------------------------------------------


def test_the_published_sizes_are_stocks_defaults():
    ours, stock = codec_config(HubertConfig(), 64, 256, 1024, 1024, (1, 2, 3, 4, 8), (8, 5, 4, 2), RATE), XcodecConfig()
    assert list(ours.target_bandwidths) == list(stock.target_bandwidths)
    assert ours.num_quantizers == stock.num_quantizers == 8
    assert ours.hidden_size == stock.hidden_size == 1024
    assert ours.hop_length == stock.hop_length
    mine, theirs = ours.acoustic_model_config.to_dict(), stock.acoustic_model_config.to_dict()
    assert {k for k in mine if mine[k] != theirs.get(k)} <= {"hop_length", "n_codebooks", "codebook_size"}


def test_a_codec_from_scratch_has_the_teachers_weights_and_lets_sound_through(teacher):
    torch.manual_seed(1)
    model = build(teacher, width=4, acoustic=8, decoder=32, codes=16, books=(1, 2))
    for name, value in HubertModel.from_pretrained(teacher, dtype=torch.float32).state_dict().items():
        assert torch.equal(model.semantic_model.state_dict()[name], value), name
    assert model.training and not model.semantic_model.training
    x = 0.2 * torch.randn(2, 1, 6400)
    assert 0.02 < float(model.acoustic_encoder(x).std()) < 2
    other = build(teacher, width=4, acoustic=8, decoder=32, codes=16, books=(1, 2), semantic=False)
    assert not any(p.any() for p in other.encoder_semantic.parameters())
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_wavlm_may_be_the_teacher(tmp_path):
    torch.manual_seed(0)
    heard = WavLMModel(WavLMConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                   conv_dim=[8] * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)).eval()
    heard.save_pretrained(tmp_path)
    model = build(str(tmp_path), width=4, acoustic=8, decoder=32, codes=16, books=(1, 2))
    x = 0.1 * torch.randn(1, 1, 3200)
    states = heard(F.pad(x[:, 0], (160, 160)), output_hidden_states=True).hidden_states
    torch.testing.assert_close(model(x, step=0).teacher, torch.stack(states).mean(0).transpose(1, 2))


def test_the_embedded_teacher_hears():
    """The features of one vowel-like tone agree with themselves when it is louder, more than with those of another tone."""
    model = build(width=4, acoustic=8, decoder=32, codes=16, books=(1,)).eval()
    at = torch.arange(RATE) / RATE
    low, high = (sum(torch.sin(2 * math.pi * f * k * at) / k for k in (1, 2, 3)) for f in (120, 400))
    a, b, c = (model._extract_semantic_features(x[None, None])[0, 5:-5].mean(0) for x in (0.1 * low, 0.2 * low, 0.1 * high))
    assert (a - b).norm() < (a - c).norm()
    assert model.config.semantic_hidden_size == 192


@pytest.mark.parametrize("changes, words", [
    (dict(codes=24), "power of 2"), (dict(books=(2, 1)), "ascending"), (dict(ratios=(8, 5, 4)), "must agree")])
def test_sizes_that_do_not_fit(teacher, changes, words):
    with pytest.raises(ValueError, match=words):
        build(teacher, **{**dict(width=4, acoustic=8, decoder=32, codes=16), **changes})


# what it hears --------------------------------------------------------------------------------------------------------


def test_durations(tmp_path):
    write(tmp_path / "a.wav", torch.zeros(22_050 * 2 + 11_025), 22_050)
    assert duration(tmp_path / "a.wav") == 2.5
    with pytest.raises(ValueError, match="does not exist"):
        duration(tmp_path / "b.wav")


class Ramp:
    """Sounds of which every sample tells where it is from."""

    def __init__(self, lengths):
        self.lengths, self.weights = lengths, [float(n) for n in lengths]

    def crop(self, number, place, count):
        start = round(place * max(0, self.lengths[number] - count))
        return (1 + number * 1000 + torch.arange(start, min(start + count, self.lengths[number])).float()) / 1e6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=6), st.integers(1, 300), st.integers(0, 50))
def test_segments_are_stretches_of_sounds(lengths, count, step):
    batch = Segments(Ramp(lengths), "s", 3, count)[step]
    assert batch.shape == (3, 1, count)
    assert torch.equal(batch, Segments(Ramp(lengths), "s", 3, count)[step])
    for row in batch[:, 0]:
        heard = (row[row > 0] * 1e6 - 1).round().long()
        number = int(heard[0]) // 1000
        assert len(heard) == min(count, lengths[number])
        assert torch.equal(heard, torch.arange(int(heard[0]), int(heard[0]) + len(heard)))          # in one piece
        assert int(heard[-1]) < number * 1000 + lengths[number]


def test_every_second_is_as_likely_as_any_other():
    data = Segments(Ramp([100, 300]), "s", 500, 10)
    second = (data[0][:, 0, 0] * 1e6 > 1000).float().mean()
    assert abs(float(second) - 0.75) < 0.06
    other = Segments(Ramp([100, 300]), "t", 500, 10)
    assert not torch.equal(data[0], other[0]) and not torch.equal(data[0], data[1])


def test_gain_in_decibels():
    class Ones:
        weights = (1.0,)

        def crop(self, number, place, count):
            return torch.full((count,), 0.1)

    found = 20 * (Segments(Ones(), "s", 300, 4, gain=6.0)[0] / 0.1).log10()
    assert torch.equal(found[..., 0], found[..., 3]) and 5 < float(found.max()) < 6.001 and -6.001 < float(found.min()) < -5
    assert torch.equal(Segments(Ones(), "s", 3, 4)[0], torch.full((3, 1, 4), 0.1))


def test_held_out_files_are_not_learned_from(sounds):
    learned, unheard = sources(Speech(files=(sounds,), every=3), RATE)
    names = [{p.name for p in part.paths} for part in (learned, unheard)]
    assert names[0] | names[1] == {f"{i}.wav" for i in range(10)} and not names[0] & names[1]
    assert names[1] == {n for n in names[1] if held_out(n, 3)} and all(not held_out(n, 3) for n in names[0])
    same = sources(Speech(files=(sounds,), every=0), RATE)
    assert [p.name for p in same[0].paths] == [p.name for p in same[1].paths]


def test_files_are_read_where_the_segment_is(sounds):
    file = Path(sounds) / "9.wav"
    source, whole = Files([file], RATE), load(file, RATE).samples
    assert source.weights == [len(whole) / RATE]
    for place, start in ((0.0, 0), (1.0, len(whole) - 4000)):
        assert torch.equal(source.crop(0, place, 4000), whole[start:start + 4000])
    assert torch.equal(source.crop(0, 0.3, 10 ** 6), whole)


def test_sentences_are_made_once_and_are_the_same_again():
    source = Sentences("train", 3, RATE)
    first = source.crop(1, 0.5, 8000)
    assert list(source.made) == [1] and torch.equal(first, Sentences("train", 3, RATE).crop(1, 0.5, 8000))
    assert not torch.equal(first, Sentences("held out", 3, RATE).crop(1, 0.5, 8000))
    assert 0.01 < float(first.std()) < 0.5


def test_finding_files(tmp_path, sounds):
    assert len(find([sounds])) == 10 and len(find([sounds, f"{sounds}/3.wav"])) == 10
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="named like a sound"):
        find([str(tmp_path / "empty")])
    write(tmp_path / "one.wav", torch.zeros(8000))
    with pytest.raises(ValueError, match=r"data\.every=0"):
        sources(Speech(files=(str(tmp_path / "one.wav"),)), RATE)


# the run --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(teacher, sounds, tmp_path_factory):
    """A finished run of six steps."""
    out = tmp_path_factory.mktemp("run") / "whole"
    return out, loop.train(recipe(teacher, sounds), out, progress=False)


def test_a_run_leaves_a_stock_model_and_a_record(whole, teacher):
    out, result = whole
    stock = XcodecModel.from_pretrained(out / "model").eval()
    assert AutoFeatureExtractor.from_pretrained(out / "model").hop_length == 320
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["step"] == result["steps"] == 6
    assert torch.equal(stock.quantizer.quantizers[3].codebook.embed,
                       state["sides"]["model"]["quantizer.quantizers.3.codebook.embed"])
    x = 0.1 * torch.randn(1, 1, 6400)
    codes = stock.encode(x, stock.config.target_bandwidths[-1]).audio_codes
    assert codes.shape == (1, 4, 20) and stock.decode(codes).audio_values.shape[-1] >= 6400 - 320
    rows = read_log(out / "log.jsonl")
    steps = [r for r in rows if r["event"] == "step"]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6] and [("judge" in r) for r in steps] == [False] * 2 + [True] * 4
    assert [r["step"] for r in rows if r["event"] == "eval"] == [3, 6]
    assert result["heard"] == pytest.approx(6 * 2 * 0.2) and (out / "training.png").stat().st_size > 10_000
    assert result["eval"][0]["frames"] == 4 * 10 and len(result["eval"][0]["used"]) == 4


def test_the_teacher_is_what_it_was(whole, teacher):
    trained = XcodecModel.from_pretrained(whole[0] / "model").semantic_model.state_dict()
    for name, value in HubertModel.from_pretrained(teacher, dtype=torch.float32).state_dict().items():
        assert torch.equal(trained[name], value), name


class Killed(Exception):
    pass


@pytest.mark.parametrize("dies_at", [2, 4, 5])
def test_a_killed_run_goes_on_bit_for_bit(whole, teacher, sounds, tmp_path, monkeypatch, dies_at):
    once = loop.Sides.step

    def step(self, audio, number):
        if number == dies_at:
            raise Killed
        return once(self, audio, number)

    how = recipe(teacher, sounds)
    monkeypatch.setattr(loop.Sides, "step", step)
    with pytest.raises(Killed):
        loop.train(how, tmp_path / "run", progress=False)
    monkeypatch.setattr(loop.Sides, "step", once)
    loop.train(how, tmp_path / "run", resume=True, progress=False)
    ours, theirs = (torch.load(f / "state.pt", weights_only=True)["sides"] for f in (tmp_path / "run", whole[0]))
    same(ours, theirs)
    log = [[{k: v for k, v in r.items() if "seconds" not in k} for r in read_log(f / "log.jsonl")]
           for f in (tmp_path / "run", whole[0])]
    assert log[0] == log[1]


def same(a, b, where=""):
    """Equal trees of tensors, bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{where}.{i}")
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, where


def test_what_does_not_resume(whole, teacher, sounds):
    with pytest.raises(ValueError, match="--resume"):
        loop.train(recipe(teacher, sounds), whole[0], progress=False)
    with pytest.raises(ValueError, match=r"weights\.semantic"):
        loop.train(recipe(teacher, sounds, weights={"semantic": 3}), whole[0], resume=True, progress=False)


def test_it_learns(teacher, sounds, tmp_path):
    how = recipe(teacher, sounds, steps=60, batch=4, log_every=5, judge={"start": 40}, optim={"lr": 4e-3}, rvq={"dead": 0.5},
                 eval={"every": 59, "n": 8, "seconds": 0.4}, save_every=100)
    loop.train(how, tmp_path / "run", progress=False)
    rows = read_log(tmp_path / "run" / "log.jsonl")
    steps = [r for r in rows if r["event"] == "step"]
    last = [r for r in rows if r["event"] == "eval"][-1]
    assert steps[-1]["semantic"] < 0.5 * steps[0]["semantic"] and steps[-1]["full"] < 0.75 * steps[0]["full"]
    assert min(last["used"]) > 0.4 and last["semantic"] < 1


def test_training_without_semantics_and_from_weights(whole, teacher, sounds, tmp_path):
    plain = recipe(teacher, sounds, semantic=False, weights={"semantic": 0}, steps=3)
    result = loop.train(plain, tmp_path / "plain", progress=False)
    assert result["eval"][0]["semantic"] is None
    stock = XcodecModel.from_pretrained(tmp_path / "plain" / "model")
    assert not any(p.any() for p in stock.encoder_semantic.parameters())
    further = recipe(teacher, sounds, model=None, init=str(whole[0] / "model"), steps=3, optim={"lr": 1e-9})
    loop.train(further, tmp_path / "further", progress=False)
    a, b = (XcodecModel.from_pretrained(f / "model") for f in (whole[0], tmp_path / "further"))
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters()):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("changes", [dict(precision="bf16"), dict(judge=None, weights={"adversarial": 0, "features": 0}),
                                     dict(weight_norm=False), dict(data={"workers": 1})])
def test_variants_run_and_stay_finite(teacher, sounds, tmp_path, changes):
    loop.train(recipe(teacher, sounds, steps=3, **changes), tmp_path / "run", progress=False)
    rows = read_log(tmp_path / "run" / "log.jsonl")
    assert all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float))
    assert all(torch.isfinite(p).all() for p in XcodecModel.from_pretrained(tmp_path / "run" / "model").parameters())


def test_measuring_beside_a_loop(whole):
    from mmcompress.audio.xcodec import XCodec

    model = XCodec.from_pretrained(whole[0] / "model").train()
    batches = [0.1 * torch.randn(2, 1, 3200, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    found = measure(model, batches)
    assert model.training
    outs = [model.eval()(x) for x in batches]
    teacher, said = (torch.cat([getattr(o, k).transpose(1, 2).flatten(0, 1) for o in outs]) for k in ("teacher", "semantic"))
    spread = (teacher - teacher.mean(0)).square().sum()
    assert found["semantic"] == pytest.approx(float((said - teacher).square().sum() / spread), rel=1e-4)
    codes = torch.cat([o.codes[:, 2].flatten() for o in outs])
    assert found["used"][2] == len(codes.unique()) / 16 and found["frames"] == len(codes) == 40
    errors = [float((o.waveform[i] - x[i]).square().sum() / x[i].square().sum()) for o, x in zip(outs, batches) for i in (0, 1)]
    assert found["error"] == pytest.approx(sum(errors) / 4, rel=1e-4)


def test_the_rate_falls_by_gamma():
    how = Optim(gamma=0.9, warmup=4)
    assert [share(s, how) for s in (0, 1, 3, 4)] == pytest.approx([0.25, 0.5 * 0.9, 0.9 ** 3, 0.9 ** 4])


WORKER = """
import os, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_codec_training import recipe
from mmcompress.train.codec import loop
result = loop.train(recipe(sys.argv[1], sys.argv[2]), sys.argv[3], progress=False)
run = sys.argv[3] + f".rank{{os.environ['RANK']}}"
torch.save(loop.LAST.sides.state_dict(), run)
sys.stdout.flush(); sys.stderr.flush()
os._exit(0)                     # gloo's threads may outlive the interpreter's end, which then aborts
"""


def test_two_processes_agree(teacher, sounds, tmp_path, whole):
    """Each hears its own segments; codec, codebooks, judge and optimizers are bit-equal at the end, and not a single run's."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent)).replace(
        "result = loop.train(", "loop.Run.finish = lambda self: setattr(loop, 'LAST', self)\nresult = loop.train("))
    port = str(random.SystemRandom().randrange(20_000, 60_000))
    started = [subprocess.Popen([sys.executable, str(script), teacher, sounds, str(tmp_path / "run")], stderr=subprocess.PIPE,
                                env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"})
               for rank in range(2)]
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()[-2000:]
    ours = [torch.load(f"{tmp_path / 'run'}.rank{rank}", weights_only=True) for rank in range(2)]
    same(*ours)
    alone = torch.load(whole[0] / "state.pt", weights_only=True)["sides"]
    assert not torch.equal(alone["model"]["fc.weight"], ours[0]["model"]["fc.weight"])
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["processes"] == 2


# recipes and the command ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, words", [
    (dict(init="x"), "not both"), (dict(judge=None), "a judge needs"), (dict(precision="fp16"), "bf16"),
    (dict(weights={"adversarial": 0, "features": 0}), "judge: null"),
    (dict(judge={"hops": [1024], "hidden": [32]}), "longer segments"),
    (dict(semantic=False), r"weights\.semantic"), (dict(data={"every": 1}), "every file"), (dict(steps=0), "above 0"),
    (dict(semantic="no"), "true or false"), (dict(optim={"gamma": 0}), "factor"), (dict(rvq={"decay": 1}), "moving average")])
def test_recipes_that_are_wrong(teacher, sounds, changes, words):
    with pytest.raises(ValueError, match=words):
        recipe(teacher, sounds, **changes)


def test_recipes_come_back_from_plain_data(teacher, sounds):
    how = recipe(teacher, sounds)
    assert CodecRecipe.from_dict(json.loads(json.dumps(how.to_dict()))) == how


def test_kinds(tmp_path):
    kind, how, run = kinds.load("configs/xcodec-tiny.yaml", ["steps=5"])
    assert (kind, how.steps, run) == ("xcodec", 5, loop.train)
    assert kinds.load("configs/pico.yaml")[0] == "llava_next"
    file = tmp_path / "a.yaml"
    file.write_text("kind: gan\nsteps: 1")
    with pytest.raises(ValueError, match="llava_next, xcodec"):
        kinds.load(file)


def test_the_command(teacher, sounds, tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(recipe(teacher, sounds, steps=2, rvq={"dead": 0.1}).to_dict()))
    done = CliRunner().invoke(app, ["train", str(file), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "2 steps" in done.output and "perplexity" in done.output and "model" in done.output
    again = CliRunner().invoke(app, ["train", str(file), "--out", str(tmp_path / "run"), "--resume", "--json"])
    assert json.loads(again.stdout)["steps"] == 2
