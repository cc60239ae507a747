"""Wilson against its defining equation, teacher forcing against generation, counts against closed forms."""

import csv
import math
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch

import mmcompress
from mmcompress import eval as evaluation
from mmcompress.adapters import Adapter, adapter_for
from mmcompress.config import WrapConfig
from mmcompress.eval import ALL_TOKENS, Question, evaluate, questions, wilson, write_csv
from mmcompress.eval import pico as eval_pico
from mmcompress.image import ClsTopK, Uniform, VisionZip
from mmcompress.pipeline import reduce_inputs

TOKENS = {(336, 336): 744, (336, 168): 456, (168, 336): 444, (168, 504): 588, (504, 168): 612}


@pytest.mark.parametrize("hits,n", [(1, 2), (3, 10), (81, 263), (499, 500)])
def test_wilson_solves_its_equation(hits, n):
    for p in wilson(hits, n):
        assert abs(hits / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), rel=1e-9)


def test_wilson_at_the_ends_and_in_print():
    assert wilson(0, 10) == (0.0, pytest.approx(1.96**2 / (10 + 1.96**2)))
    assert wilson(10, 10) == (pytest.approx(10 / (10 + 1.96**2)), 1.0)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)         # Newcombe 1998, method 3
    for hits, n in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match=f"hits={hits}, n={n}"):
            wilson(hits, n)


def test_questions_depend_on_seed_and_number_alone():
    some, more, other = questions(3, "a"), questions(6, "a"), questions(3, "b")
    said = lambda asked: [(q.question, q.answer, q.kind, q.image.tobytes()) for q in asked]  # noqa: E731
    assert said(some) == said(more)[:3]
    assert not set(said(some)) & set(said(other))


def test_sizes_are_drawn_as_said():
    asked = questions(300, "sizes")
    assert all(q.image.size == (q.size[1], q.size[0]) for q in asked)
    odd = [q.size for q in asked if q.size not in TOKENS]
    square = sum(q.size == (336, 336) for q in asked)
    assert 13 <= len(odd) <= 47                                     # 30 expected, 3.3 standard deviations
    assert 125 <= square <= 175                                     # 150 expected, 2.9 standard deviations
    assert {q.size for q in asked} >= set(TOKENS)
    for height, width in odd:
        assert 140 <= height <= 540 and 140 <= width <= 540
        fits = [min(Fraction(h, height), Fraction(w, width)) for h, w in TOKENS]
        assert any(Fraction(3, 4) <= f <= Fraction(3, 2) for f in fits)


def generated(model, processor, q, reducer):
    """Whether greedy generation answers a question exactly, and the tokens of its picture."""
    inputs = processor(images=q.image, text=mmcompress.pico.prompt(q.question), return_tensors="pt")
    with mmcompress.wrap(model, image=reducer) as w:
        ids = w.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1]:]
        wanted = processor.tokenizer(f" {q.answer}</s>", add_special_tokens=False)["input_ids"]
        return ids.tolist() == wanted, w.last[0].before, w.last[0].after


def test_teacher_forcing_agrees_with_generation(pico):
    """Prompt by prompt through generate, against ragged batches that share an encoding."""
    n, reducers = 8, {ALL_TOKENS: None, "cls_topk@0.25": ClsTopK(keep=0.25)}
    rows = {(r.method, r.kind): r for r in evaluate(*pico, reducers, n, "agree", progress=False)}
    asked = questions(n, "agree")
    for method, reducer in ((ALL_TOKENS, Uniform(keep=1.0)), ("cls_topk", ClsTopK(keep=0.25))):
        got = [generated(*pico, q, reducer) for q in asked]
        for kind in ("all", "cards", "receipt"):
            here = [g for g, q in zip(got, asked) if kind in ("all", q.kind)]
            r = rows[method, kind]
            assert (r.n, r.hits) == (len(here), sum(g[0] for g in here))
            assert r.tokens_before == pytest.approx(sum(g[1] for g in here) / len(here))
            assert r.tokens_after == pytest.approx(sum(g[2] for g in here) / len(here))
            assert (r.accuracy, r.low, r.high) == (r.hits / r.n, *wilson(r.hits, r.n))
    assert 0 < rows["cls_topk", "all"].hits < n                     # else agreement would say little
    assert rows[ALL_TOKENS, "all"].hits >= n - 1


def small(n, answer=None):
    """Questions about the smallest canvas, for speed."""
    image = questions(1, "small")[0].image.resize((336, 168))
    return [Question(image, "cards", "how many cards are there?", answer or str(i), (168, 336)) for i in range(n)]


def test_an_answer_must_end_where_the_truth_ends(pico, monkeypatch):
    model, processor = pico
    [q] = [q for q in questions(12, "whole") if q.answer.isdigit() and len(q.answer) == 3][:1]
    assert generated(model, processor, q, Uniform(keep=1.0))[0]
    asked = [q, replace(q, answer=q.answer[:2]), replace(q, answer=q.answer + "1")]
    for some, hits in ((asked, 1), (asked[1:], 0), (asked[:1], 1)):
        monkeypatch.setattr(eval_pico, "questions", lambda n, seed, some=some: some)
        assert evaluate(model, processor, {ALL_TOKENS: None}, len(some), progress=False)[0].hits == hits


def test_each_batch_is_encoded_once_for_all_methods(pico, monkeypatch):
    calls, stock = [], Adapter.encode

    def encode(self, inputs, layers=()):
        calls.append(tuple(layers))
        return stock(self, inputs, layers)

    monkeypatch.setattr(Adapter, "encode", encode)
    monkeypatch.setattr(eval_pico, "questions", lambda n, seed: small(n))
    reducers = {"cls_topk@10": ClsTopK(keep=10), "visionzip@12": VisionZip(keep=12), "uniform@5": Uniform(keep=5)}
    rows = evaluate(*pico, reducers, 5, batch=2, progress=False)
    assert calls == [(-2, -1)] * 3                                  # three batches; the union of what the methods read
    assert [(r.method, r.keep, r.tokens_after) for r in rows if r.kind == "all"] == \
        [("cls_topk", 10, 10), ("visionzip", 12, 12), ("uniform", 5, 5)]
    assert {r.tokens_before for r in rows} == {444} and {r.n for r in rows} == {5}


@pytest.mark.parametrize("name", ["cls_topk", "visionzip", "uniform"])
def test_a_given_encoding_changes_nothing(pico, name):
    model, processor = pico
    adapter, config = adapter_for(model), WrapConfig(image=mmcompress.registry.build("image", {"name": name, "keep": 40}))
    inputs = eval_pico._inputs(processor, small(2))
    with torch.inference_mode():
        encoded = adapter.encode(inputs, (-2, -1))
        fresh, reused = reduce_inputs(adapter, inputs, config), reduce_inputs(adapter, inputs, config, encoded=encoded)
    for a, b in zip(*(run.inputs["mm_encoder_outputs"]["image"].pooler_output for run in (fresh, reused))):
        assert a.shape == (40, 256) and torch.equal(a, b)
    assert torch.equal(fresh.inputs["input_ids"], reused.inputs["input_ids"])


@dataclass(frozen=True)
class Seeded(Uniform):
    seed: int = 7

    def reduce(self, x, k):
        SEEDS.append((self.seed, len(x.features)))
        return super().reduce(x, k)


SEEDS: list = []


def test_seeds_differ_from_batch_to_batch(pico, monkeypatch):
    monkeypatch.setattr(eval_pico, "questions", lambda n, seed: small(n))
    SEEDS.clear()
    evaluate(*pico, {"seeded": Seeded(keep=20)}, 5, batch=2, progress=False)
    assert sorted(size for _, size in SEEDS) == [1, 2, 2] and len({seed for seed, _ in SEEDS}) == 3


class Outsider:
    """A reducer by protocol alone: no dataclass, no `keep`."""

    def count(self, layout):
        return 9

    def __call__(self, x):
        return mmcompress.select(x, torch.arange(9).expand(len(x.features), -1))


def test_a_reducer_by_protocol_alone(pico, monkeypatch):
    monkeypatch.setattr(eval_pico, "questions", lambda n, seed: small(1))
    row = evaluate(*pico, {"mine": Outsider()}, 1, progress=False)[0]
    assert row.tokens_after == 9 and math.isnan(row.keep)


def test_labels_are_the_answers(pico):
    _, processor = pico
    asked = [replace(q, answer=a) for q, a in zip(small(3), ("7", "zebra", "123"))]
    inputs = eval_pico._inputs(processor, asked)
    for labels, ids, mask, a in zip(inputs["labels"], inputs["input_ids"], inputs["attention_mask"], ("7", "zebra", "123")):
        assert processor.tokenizer.decode(labels[labels != -100]).strip() == f"{a}</s>"
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)         # padded on the right


def test_n(pico):
    with pytest.raises(ValueError, match="n=0"):
        evaluate(*pico, {ALL_TOKENS: None}, 0)


def test_csv(tmp_path):
    rows = [evaluation.Row("one", 0.25, "all", 8, 6, 0.75, *wilson(6, 8), 744.0, 186.0)]
    write_csv(rows, tmp_path / "new" / "rows.csv", device="a device", seed="s")
    with open(tmp_path / "new" / "rows.csv") as file:
        [read] = csv.DictReader(file)
    assert (read["method"], float(read["keep"]), read["n"], float(read["accuracy"])) == ("one", 0.25, "8", 0.75)
    assert (read["device"], read["seed"], read["mmcompress"]) == ("a device", "s", mmcompress.__version__)
    assert read["torch"] == torch.__version__.partition("+")[0] and read["transformers"]


def test_paired_differences():
    """Against the textbook paired t interval (normal quantile), and against the spread that unpaired shares would have."""
    import numpy as np
    rng = np.random.default_rng(0)
    a = rng.random(400) < 0.8
    b = a & (rng.random(400) < 0.95)                                    # worse on 5 % of what the other gets right
    mean, half = evaluation.paired(a.tolist(), b.tolist())
    d = a.astype(float) - b.astype(float)
    assert math.isclose(mean, d.mean()) and math.isclose(half, 1.96 * d.std(ddof=1) / 20)
    assert half < 0.6 * 1.96 * math.sqrt((a.var() + b.var()) / 400)
    with pytest.raises(ValueError, match="3 and 2 trials"):
        evaluation.paired([True] * 3, [True] * 2)
