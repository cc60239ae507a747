"""The benchmark of a whole model with a compressed cache runs end to end at a tiny size; its counts agree with closed forms."""

import csv
import importlib
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from mmcompress.cache import SnapKV, attach

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LAYERS, HEADS, WIDTH, CONTEXT, VOCAB = 2, 2, 16, 160, 128
MIB, ROOM = 2**20, 6          # steps: three to warm up, two timed, one checked


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Import the scripts as `python benchmarks/x.py` does: their folder comes first."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in {path.stem for path in BENCHMARKS.glob("*.py")} & set(sys.modules):
        del sys.modules[name]


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    kv = importlib.import_module("kv_common")
    return kv, kv.build_llama(kv.llama(LAYERS, tiny=True), torch.device("cpu"), torch.float32)


def number(row, column):
    return float(row[column])


def test_runs_end_to_end(tmp_path, capsys):
    step, out = importlib.import_module("cache_step"), tmp_path / "rows.csv"
    assert step.main(["--tiny", "--device", "cpu", "--out", str(out)]) == 0
    assert "NOT MEASURED ON GPU" in capsys.readouterr().out
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert set(step.COLUMNS) < set(rows[0]) and {"device", "torch", "transformers", "copy_gb_s", "note"} < set(rows[0])
    assert all(r["note"] == "not measured on GPU" and r["n"] == "2" and r["context"] == str(CONTEXT) for r in rows)
    assert all(r["peak"] == r["after"] == r["allocated"] == "" for r in rows)       # no GPU
    assert all(bool(r["ms"]) != bool(r["remark"]) for r in rows)                    # measured, or it says why not

    prefill = [r for r in rows if r["kind"] == "prefill"]
    assert [(r["case"], r["chunk"]) for r in prefill] == [*((n, "") for n in ("stock", *step.PLANS)),
                                                          *((n, "64") for n in ("stock", *step.CHUNKED))]
    check_prefill(step, prefill)
    for batch in ("1", "2"):
        decode = [r for r in rows if r["kind"] == "decode" and r["batch"] == batch]
        assert [r["case"] for r in decode if r["form"] == "dynamic"] == [
            "stock", "stock quanto int4", "stock hqq int4", "stock fp8", "ideal", "ideal", *step.DECODED]
        assert [r["case"] for r in decode if r["form"] == "static"] == ["stock", "ideal", *step.STATIC]
        check_decode([r for r in decode if r["ms"]], int(batch))


def check_prefill(step, rows):
    stock = {r["chunk"]: r for r in rows if r["case"] == "stock"}
    for row in rows:
        own = stock[row["chunk"]]
        assert number(row, "ms/stock") == pytest.approx(number(row, "ms") / number(own, "ms"), rel=1e-2)
        if row is own:
            assert number(row, "mib") * MIB == pytest.approx(LAYERS * 2 * HEADS * CONTEXT * WIDTH * 4, rel=1e-3)
            continue
        stages = sum(number(row, stage) for stage in step.STAGES)
        assert number(row, "share") == pytest.approx(stages / number(own, "ms"), rel=2e-2) and stages > 0
        if row["case"] != "MiniCache":              # one layer at a time is held in full, so the peak falls by less
            assert 0 < number(row, "said") < number(row, "after said")
        assert number(row, "after said") == pytest.approx(number(own, "mib") - number(row, "mib"), rel=1e-2)


def check_decode(rows, batch):
    by = {(r["case"], r["tokens"], r["form"]): r for r in rows}
    stock = by["stock", "160", "dynamic"]
    # of one token in one layer, both heads: keys and values; columns (int32) and validity; positions of a token (int64)
    exact, noted, position = HEADS * 2 * WIDTH * 4, HEADS * 5, 8
    grids = HEADS * 2 * 2 * 2 * 2               # float16 scale and zero point of two groups, keys and values
    balance = HEADS * WIDTH * 4                 # a layer's balancer
    few = {bits: HEADS * 2 * WIDTH * bits // 8 + grids + noted for bits in (2, 4)}
    line = batch * CONTEXT * position
    empty = exact + noted                       # where no token is exact there is room for one

    def of(slots, layer=0):
        return batch * LAYERS * (slots + layer) + line

    expected = {("stock", "160", "dynamic"): batch * LAYERS * CONTEXT * exact,
                ("ideal", "40", "dynamic"): batch * LAYERS * 40 * exact,
                ("ideal", "80", "dynamic"): batch * LAYERS * 80 * exact,
                ("SnapKV .25", "40", "dynamic"): of(40 * (exact + noted)),
                ("MiKV int2", "160", "dynamic"): of(160 * few[2] + empty, balance),
                ("MiKV int4", "160", "dynamic"): of(160 * few[4] + empty, balance),
                ("MiKV int2, a fifth exact", "160", "dynamic"): of(128 * few[2] + 32 * (exact + noted), balance),
                ("SnapKV .5, MiKV int4", "80", "dynamic"): of(80 * few[4] + empty, balance),
                ("SnapKV .25", "40", "static"): batch * LAYERS * (40 + ROOM) * (exact + noted) + LAYERS * 16,
                ("MiKV int4", "160", "static"): batch * LAYERS * (160 * few[4] + empty + balance + ROOM * (exact + noted))
                                                + LAYERS * 16}
    for key, size in expected.items():
        assert number(by[key], "mib") * MIB == pytest.approx(size, rel=1e-3), key
        assert number(by[key], "of stock") == pytest.approx(size / expected["stock", "160", "dynamic"], rel=2e-3), key
    assert number(by["stock fp8", "160", "dynamic"], "of stock") == pytest.approx(0.25, rel=1e-2)
    quickest = min(number(r, "ms") for (case, _, _), r in by.items() if case.startswith("stock"))
    for (_, tokens, form), row in by.items():
        assert row["finite"] == "True" and row["ms"]
        assert number(row, "stock/ms") == pytest.approx(number(by["stock", "160", form], "ms") / number(row, "ms"), rel=1e-2)
        assert number(row, "best/ms") == pytest.approx(quickest / number(row, "ms"), rel=1e-2)
        ideal = by["stock" if tokens == "160" else "ideal", tokens, form]
        assert number(row, "ideal/ms") == pytest.approx(number(ideal, "ms") / number(row, "ms"), rel=1e-2)
        extra = (number(row, "mib") - number(stock, "mib")) * MIB / number(row, "copy_gb_s") / 1e6
        assert number(row, "floor") - number(stock, "floor") == pytest.approx(extra, abs=3e-3 * number(row, "floor"))


def test_weights_are_counted(tiny):
    kv, model = tiny
    sizes = {name: p.nbytes for name, p in model.named_parameters()}
    assert kv.weight_bytes(model.config, LAYERS, 4) == sum(sizes.values())
    assert kv.weight_bytes(model.config, LAYERS, 4, read=True) == sum(sizes.values()) - sizes["model.embed_tokens.weight"]
    assert kv.weight_bytes(kv.llama(32), 32, 2) == 2 * 8_030_261_248             # Llama-3.1-8B
    assert kv.layer_bytes(kv.llama(32), 1, 1, 2) * 32 == 128 * 1024              # a token of it


def test_layers_give_way_to_a_large_batch():
    kv, config = importlib.import_module("kv_common"), importlib.import_module("kv_common").llama(32)
    free = 80 * 2**30
    assert kv.depth_that_fits(config, 32768, 1, 2, free) == 32
    n = kv.depth_that_fits(config, 32768, 16, 2, free)
    assert 0 < n < 32 and kv.need(config, n, 32768, 16, 2) <= free < kv.need(config, n + 1, 32768, 16, 2)
    assert kv.depth_that_fits(config, 32768, 16, 2, 2**30) == 0
    step = importlib.import_module("cache_step")
    batch, said = step.prefill_batch(config, 32768, 16, 2, free)
    assert 1 <= batch < 16 and said and step.prefill_batch(config, 32768, 1, 2, free) == (1, "")


def test_a_cut_model_still_decodes(tiny):
    kv, model = tiny
    importlib.import_module("cache_step").cut(model, 1)
    cache = kv.fill_stock(DynamicCache(config=model.config), model, 20, 1)
    assert len(cache.layers) == 1 and model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("backend", ["dynamic", "static"])
def test_filled_caches_decode_as_stock_ones(tiny, backend):
    """A filled cache that keeps all decodes to the tokens of the stock cache with the same keys and values."""
    kv, model = tiny
    step = importlib.import_module("cache_step")
    stock = next(c for c in step.cases(CONTEXT) if c.name == "stock" and c.form == backend)
    with torch.no_grad():
        steps = step.Steps(model, stock.make(model, CONTEXT, 2, 8), 2, CONTEXT, 8, False)
        expected = [steps().clone() for _ in range(6)]
        with attach(model, SnapKV(keep=1.0)) as handle:
            cache = kv.fill_ours(handle.plan, model, CONTEXT, 2)
            steps = step.Steps(model, cache, 2, CONTEXT, 8, False)
            assert all(torch.equal(steps(), token) for token in expected)
        assert cache.get_seq_length() == CONTEXT + 6 and cache.lengths == [CONTEXT + 6] * LAYERS


@pytest.mark.parametrize("name", ["SnapKV .25", "MiKV int2", "MiKV int4", "MiKV int2, a fifth exact", "SnapKV .5, MiKV int4"])
def test_a_filled_cache_is_as_large_as_a_prefilled_one(tiny, name):
    kv, model = tiny
    step = importlib.import_module("cache_step")
    plan = step.PLANS[name]
    ids = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), attach(model, plan) as handle:
        prefilled = step.prefill(model, ids, handle.cache(), None)
        filled = kv.fill_ours(plan, model, CONTEXT, 2)
        assert filled.lengths == prefilled.lengths and filled.nbytes == prefilled.nbytes
        assert filled.stock_nbytes == prefilled.stock_nbytes
        assert kv.held_bytes(kv.fill_stock(DynamicCache(config=model.config), model, CONTEXT, 2)) == filled.stock_nbytes
        steps = step.Steps(model, filled, 2, CONTEXT, 8, False)
        tokens = torch.cat([steps() for _ in range(6)], 1)
        assert bool(((tokens >= 0) & (tokens < VOCAB)).all()) and bool(steps.logits().isfinite().all())


@pytest.mark.parametrize("name", ["SnapKV .25", "MiKV int4"])
def test_both_forms_decode_to_the_same_tokens(tiny, name):
    _, model = tiny
    step = importlib.import_module("cache_step")
    found = []
    for case in (c for c in step.cases(CONTEXT) if c.name == name):
        with torch.no_grad(), attach(model, case.plan):
            steps = step.Steps(model, case.make(model, CONTEXT, 2, 8), 2, CONTEXT, 8, False)
            found.append(torch.cat([steps() for _ in range(6)], 1))
    assert len(found) == 2 and torch.equal(*found)
