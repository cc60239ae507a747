"""The benchmark of the cache on pico: prefilling once for all plans is what each plan would have done by itself."""

import csv
import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

import mmcompress
from mmcompress.cache import attach
from mmcompress.config import WrapConfig
from mmcompress.image import GlobalCom2, GlobalRank
from mmcompress.tokens import KeepAll
from mmcompress.wrap import Wrapped

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TEXT, PICTURE = 5, 744


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("cache_pico")
    for name in ("cache_pico", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def scene(bench, pico):
    """(processor's inputs of the first turn, the second turn's ids and wanted tokens)"""
    shown = bench.draw(0, 1, 1, "test")
    inputs = pico[1](images=shown.images, text=[bench.HEAD], return_tensors="pt")
    asked = [one[0] for one in shown.asked]
    return dict(inputs), bench.answering(pico[1], bench.questions_of(pico[1], asked), [a for _, a in asked])


@torch.inference_mode()
@pytest.mark.parametrize("variant", ["all", "modality", "text first"])
def test_a_recorded_prompt_compressed_is_what_attach_does(bench, pico, scene, variant):
    model, _ = pico
    inputs, turn = scene
    with Wrapped(model, WrapConfig(image=KeepAll())) as handle:
        held = bench.prefill(handle, inputs, handle.adapter.encode(inputs))
    for name in bench.METHODS if variant == "modality" else ("KeyDiff", "EMS", "MiKV"):
        plan = bench.plan_of(name, variant, 0.1)
        with bench.attached(model):
            cache = bench.compressed(model, held, plan)
            logits = bench.ask(model, cache, held.mask, *turn)
            assert torch.equal(bench.ask(model, cache, held.mask, *turn), logits), name             # cropped back
        with attach(model, plan) as attached:
            own = attached.cache()
            model(**inputs, past_key_values=own, use_cache=True)
            assert torch.equal(bench.ask(model, own, held.mask, *turn), logits), name
        assert own.nbytes == cache.nbytes and own.lengths == cache.lengths


@torch.inference_mode()
def test_prompts_of_unlike_length_with_their_last_token_held_back(bench, pico):
    """Padded together and from features encoded once, as `measure` runs them, against each prompt alone from its pixels."""
    model, processor = pico
    shown = bench.draw(0, 2, 2, "test")
    inputs = processor(images=shown.images, text=[bench.HEAD] * 2, return_tensors="pt")
    plan = bench.plan_of("SnapKV", "modality", 0.1)
    asked = [one for each in shown.asked for one in each]
    texts = bench.questions_of(processor, asked)
    assert len({len(t) for t in texts}) > 1
    case = bench.Case("aware", "SnapKV", "modality", 0.1, plan)
    with Wrapped(model, WrapConfig(image=KeepAll())) as handle:
        (_, seen), = bench.measure(handle, processor, shown, [case], 0, 8, lambda: None)
    hits = []
    for i, (tokens, (_, answer)) in enumerate(zip(texts, asked)):
        ids = torch.tensor([inputs["input_ids"][0].tolist() + tokens[:-1]])
        one = processor(images=shown.images[i // 2], text=bench.HEAD, return_tensors="pt")
        with attach(model, plan) as attached:
            cache = attached.cache()
            model(input_ids=ids, pixel_values=one["pixel_values"], image_sizes=one["image_sizes"], past_key_values=cache,
                  use_cache=True)
            turn = bench.answering(processor, [tokens[-1:]], [answer])
            hits.append(bool(bench.right(bench.ask(model, cache, torch.ones_like(ids), *turn), turn[1])))
    assert seen.right.flatten().tolist() == hits and seen.text == 1


@torch.inference_mode()
@pytest.mark.parametrize("reducer", [GlobalCom2(keep=0.3), GlobalRank(keep=0.3)])
def test_after_a_reducer_it_is_the_wrapped_model_with_a_plan(bench, pico, scene, reducer):
    model, _ = pico
    inputs, turn = scene
    plan = bench.plan_of("KeyDiff", "modality", 0.1)
    with Wrapped(model, WrapConfig(image=KeepAll())) as handle:
        held = bench.prefill(handle, inputs, handle.adapter.encode(inputs, reducer.captures), reducer)
        left = handle.last[0].after
    with bench.attached(model):
        cache = bench.compressed(model, held, plan)
        slots, text, _ = bench.look(cache, held)
        logits = bench.ask(model, cache, held.mask, *turn)
    assert left == 223 and text == 1 and slots == pytest.approx((TEXT + 74) / (TEXT + PICTURE))     # of the stock prompt
    with mmcompress.wrap(model, image=reducer) as w, attach(model, plan) as attached:
        own = attached.cache()
        own.miss(torch.tensor([[0, PICTURE - left, 0, 0]]))
        w(**inputs, past_key_values=own, use_cache=True)
        positions = own.timeline.positions[:, -1:] + 1 + torch.arange(turn[0].shape[1])
        mask = torch.ones(1, own.get_seq_length() + turn[0].shape[1], dtype=torch.long)
        whole = w.stock["forward"](input_ids=turn[0], attention_mask=mask, position_ids=positions, past_key_values=own).logits
    assert torch.allclose(whole[:, -logits.shape[1]:], logits, atol=1e-4)


@torch.inference_mode()
def test_budgets_are_those_of_the_stock_prompt(bench, pico, scene):
    model, _ = pico
    inputs, _ = scene
    with Wrapped(model, WrapConfig(image=KeepAll())) as handle:
        held = bench.prefill(handle, inputs, handle.adapter.encode(inputs))
    whole = TEXT + PICTURE
    for name in bench.METHODS:
        for k in (0.5, 0.1, 0.05):
            found = {}
            for variant in bench.VARIANTS:
                slots, text, found[variant] = bench.look(bench.compressed(model, held, bench.plan_of(name, variant, k)), held)
                kept = k if name != "MiKV, equal bytes" else bench.mikv_of_bytes(k)[0]
                if variant == "modality":
                    assert text == 1 and slots == pytest.approx((TEXT + int(PICTURE * kept)) / whole), name
                else:
                    assert slots == pytest.approx(int(whole * kept + 1e-9) / whole), name
                if name == "MiKV, equal bytes":
                    assert found[variant] == pytest.approx(k, abs=0.03)
    slots, text, nbytes = bench.look(bench.compressed(model, held, None), held)
    assert slots == text == 1 and nbytes == pytest.approx(1 + 16 / 4096)                            # positions and tags


def test_intervals_take_a_picture_as_one(bench):
    a = torch.tensor([[1, 1], [1, 0], [1, 1]], dtype=torch.bool)
    b = torch.tensor([[0, 0], [1, 0], [1, 0]], dtype=torch.bool)
    mean, half = bench.apart(a, b)                                      # by picture 1, 0, 1/2
    assert mean == 0.5 and half == pytest.approx(1.96 * 0.5 / math.sqrt(3))
    twice = bench.apart(torch.cat([a, a], 1), torch.cat([b, b], 1))
    assert twice == pytest.approx((mean, half))                         # more questions of the same kind prove no more


def test_the_benchmark_runs(bench, tmp_path, capsys):
    out = tmp_path / "sub" / "rows.csv"
    assert bench.main(["--pictures", "2", "--questions", "2", "--batch", "2", "--keep", "0.5", "--methods", "KNorm", "H2O",
                       "--out", str(out)]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (1 + 2 * 3) + 2 * (1 + 1) and {r["n"] for r in rows} == {"4"}
    full = [r for r in rows if r["method"] == "full" and not r["reducer"]]
    assert [r["setting"] for r in full] == ["blind", "aware"] and all(float(r["difference"]) == 0 for r in full)
    assert full[0]["accuracy"] == full[1]["accuracy"]
    assert out.with_suffix(".png").stat().st_size > 10_000 and "two turns" in capsys.readouterr().err
