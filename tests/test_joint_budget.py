"""One budget for the pictures, clips and recordings of a prompt: divided by what each has to say, exact, above a floor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import llava_next
from tiny import make_inputs as picture_inputs
from tiny_audio import Recording, build, greedy_reference, make_inputs, row_of
from tiny_video import Film, Picture

import mmcompress
from mmcompress import WrapConfig
from mmcompress.audio import MeanPool
from mmcompress.layout import AudioLayout
from mmcompress.ops import redundancy
from mmcompress.ops.redundancy import distinct_tokens
from mmcompress.prompt import Found
from mmcompress.reducing import reducers_of

OMNI = build("qwen2_5_omni_thinker")
ROWS = [[Picture((32, 32)), Recording(180), Film(8, (16, 24))], [], [Recording(60), Film(4, (24, 24))]]
SLOTS = dict(image="uniform", video="spatio_temporal_merge", audio=MeanPool())


def slow(x):
    """One token at a time, in float64."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    return 1.0 + sum(1 - max(0.0, min(1.0, float((unit[:i] @ unit[i]).max()))) for i in range(1, len(x)))


def test_distinct_tokens_closed_forms():
    assert distinct_tokens(torch.ones(1, 50, 8)).tolist() == pytest.approx([1.0], abs=1e-4)
    assert distinct_tokens(torch.eye(20)[None]).tolist() == pytest.approx([20.0])
    frame = torch.randn(1, 9, 16)
    once, ten = distinct_tokens(frame), distinct_tokens(frame.repeat(1, 10, 1))
    torch.testing.assert_close(once, ten, atol=1e-3, rtol=0)                            # a still clip says what a frame says
    assert distinct_tokens(torch.cat([torch.eye(4), -torch.eye(4)])[None]).item() == pytest.approx(8.0)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_distinct_tokens_is_a_loop_over_tokens(n, d, seed):
    x = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed))
    expected = torch.tensor([slow(row) for row in x]).double()
    torch.testing.assert_close(distinct_tokens(x).double(), expected, atol=1e-3, rtol=1e-4)


def test_blocks_and_the_sketch_change_little(monkeypatch):
    x = torch.randn(1, 300, 64)
    whole = distinct_tokens(x)
    monkeypatch.setattr(redundancy, "BLOCK", 7)
    torch.testing.assert_close(distinct_tokens(x), whole)
    still, lively = torch.randn(1, 4, 2048).repeat(1, 25, 1), torch.randn(1, 100, 2048)
    assert distinct_tokens(still).item() < 6 and distinct_tokens(lively).item() > 60


@given(st.lists(st.tuples(st.integers(4, 80), st.booleans(), st.integers(0, 2)), min_size=1, max_size=6), st.floats(0.3, 1.0))
@settings(max_examples=60, deadline=None)
def test_every_prompt_pays_its_budget_exactly(items, budget):
    config = WrapConfig(audio="stride", budget=budget)
    found = [Found("audio", row, torch.arange(n), AudioLayout(n, 25)) for n, _, row in items]
    features = [torch.randn(1, 6).expand(n, -1) if still else torch.randn(n, 6) for n, still, _ in items]
    counts = [r.count(f.layout) for r, f in zip(reducers_of(config, found, features), found, strict=True)]
    for row in {f.row for f in found}:
        here = [i for i, f in enumerate(found) if f.row == row]
        tokens = [found[i].layout.tokens for i in here]
        assert sum(counts[i] for i in here) == max(1, int(sum(tokens) * budget + 1e-9))
        assert all(max(1, int(0.05 * n + 1e-9)) <= counts[i] <= n for i, n in zip(here, tokens))


def test_what_says_little_gets_little():
    found = [Found("audio", 0, torch.arange(100), AudioLayout(100, 25)) for _ in range(3)]
    features = [torch.ones(100, 32), torch.randn(100, 32), torch.randn(10, 32).repeat(10, 1)]
    hum, talk, echo = (r.keep for r in reducers_of(WrapConfig(audio="stride", budget=120), found, features))
    assert hum + talk + echo == 120 and hum <= 8 and talk > 4 * echo > 4 * hum / 2


def test_in_the_model_totals_are_exact_and_rows_do_not_see_each_other():
    inputs = make_inputs(OMNI, ROWS)
    config = WrapConfig(**SLOTS, budget=30)
    with mmcompress.wrap(OMNI, **SLOTS, budget=30) as w:
        out = w.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        for row in (0, 2):
            assert sum(i.after for i in w.last if i.row == row) == 30
        assert [i.modality for i in w.last] == ["image", "video", "video", "audio", "audio"]
        kept = {(i.row, i.modality): i.after for i in w.last}
        report = w.report
        for i in (0, 2):
            alone = w.generate(**row_of(OMNI, inputs, ROWS, i), max_new_tokens=4, do_sample=False, eos_token_id=None)
            assert torch.equal(alone[0, -4:], out[i, -4:])
            assert {(i, x.modality): x.after for x in w.last}.items() <= kept.items()
            assert torch.equal(out[i, -4:], greedy_reference(OMNI, row_of(OMNI, inputs, ROWS, i), config, 4))
    assert set(report.by_modality) == {"image", "video", "audio"}
    assert "all audio" in str(report) and "budget=30" in str(report)
    assert report.to_dict()["by_modality"]["audio"][1] == kept[0, "audio"] + kept[2, "audio"]


def test_a_whole_budget_is_bit_identical_and_what_has_no_reducer_is_paid_whole():
    inputs = make_inputs(OMNI, ROWS)
    stock = OMNI(**inputs).logits
    with mmcompress.wrap(OMNI, **SLOTS, budget=1.0) as w:
        assert torch.equal(w(**inputs).logits, stock)
    with mmcompress.wrap(OMNI, audio=MeanPool(), budget=0.6) as w:
        w(**inputs)
        assert all(i.after == i.before for i in w.last if i.modality != "audio")
        for row in (0, 2):
            here = [i for i in w.last if i.row == row]
            assert sum(i.after for i in here) == int(0.6 * sum(i.before for i in here))


def test_several_pictures_share_one_budget():
    model = llava_next()
    rows = [[(48, 48), (30, 70)], [(100, 40)]]
    with mmcompress.wrap(model, image="global_rank", budget=0.25) as w:
        w.generate(**picture_inputs(model, rows), max_new_tokens=2)
        for row in (0, 1):
            here = [i for i in w.last if i.row == row]
            assert sum(i.after for i in here) == int(0.25 * sum(i.before for i in here))


def test_saved_and_refused(tmp_path):
    config = WrapConfig(**SLOTS, budget=512, floor=4)
    config.save(tmp_path)
    assert WrapConfig.load(tmp_path) == config
    with pytest.raises(ValueError, match=r"budget=1\.5: a ratio"):
        WrapConfig(audio="stride", budget=1.5)
    with pytest.raises(ValueError, match=r"floor=0"):
        WrapConfig(audio="stride", budget=64, floor=0)
    with pytest.raises(ValueError, match=r"before the language model: pass"):
        WrapConfig(layers=({"name": "fastv"},), budget=64)
    with pytest.raises(ValueError, match=r"GlobalCom2\(.*cannot take"):
        WrapConfig(image={"name": "globalcom2", "paper_code": True}, budget=64)
    with mmcompress.wrap(OMNI, audio=MeanPool(), budget=10) as w, pytest.raises(ValueError, match=r"fewer than its items cost"):
        w(**make_inputs(OMNI, ROWS))
