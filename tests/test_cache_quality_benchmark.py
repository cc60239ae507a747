"""The benchmark of cache methods on a tiny random model: its short cut equals the real way, and bytes and means add up."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from mmcompress.cache import Recent, SnapKV, StreamingLLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
quality = importlib.import_module("cache_quality")

SIZES = dict(vocab_size=256, hidden_size=48, intermediate_size=64, num_attention_heads=4, head_dim=16,
             max_position_embeddings=512)


class Bytes:
    """A tokenizer: a token a byte, and one in front of a text."""

    name_or_path = "bytes"

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[2] * add_special_tokens + list(text.encode()))

    def decode(self, ids):
        return bytes(ids).decode()


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, num_key_value_heads=2, **SIZES)).eval()


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, word in (("one", "a sparrow sat on the wire. "), ("two", "rain came in from the west. ")):
        (folder / f"{name}.txt").write_text("".join(f"{i} {word}" for i in range(60)))
    texts = quality.read_texts([folder], Bytes())
    return [quality.text_items(texts, Bytes(), 100, 24, 3), *quality.key_items(texts, Bytes(), 600, 2, 2, 64)]


def test_items(lists):
    text, asked, second = lists
    for item in text:
        assert len(item.prompt) == 100 and len(item.fed) == 24 and item.chars == item.scored == 23
    for a, b in zip(asked, second):
        assert len(b.prompt) == 600 and a.prompt + a.fed == b.prompt + b.fed and a.scored == 5
        name, digits = bytes(b.fed).decode().removeprefix("\n\nThe pass key of ").split(" is ")
        assert f"The pass key of {name} is {digits}." in bytes(b.prompt[1:-64]).decode()
    order = quality.interleave([[1, 2, 3, 4], [5, 6]])
    assert [x for x in order if x < 5] == [1, 2, 3, 4] and order.index(5) < 2


def test_short_cut_is_the_real_way(llama, lists, monkeypatch):
    monkeypatch.setattr(quality, "find_retrieval_heads", lambda *args, **kwargs: ((1, 0), (3, 1)))
    everything = quality.settings(quality.Facts.of(llama), list(quality.METHODS))
    assert {s.method for s in everything} == {quality.FULL, *quality.METHODS}
    assert quality.check(llama, [lists[0][0]], everything) < 1e-4
    assert quality.check(llama, [lists[1][0], lists[2][0]], everything[:12]) < 1e-4


def test_short_cut_beside_sliding_layers(lists):
    torch.manual_seed(0)
    config = Gemma3TextConfig(num_hidden_layers=3, num_key_value_heads=1, sliding_window=32, query_pre_attn_scalar=16,
                              layer_types=["sliding_attention", "full_attention", "sliding_attention"], **SIZES)
    model = Gemma3ForCausalLM(config).eval()
    methods = ["SnapKV", "H2O", "KVMerger, mass", "MiKV int2", "MiniCache int4"]
    everything = quality.settings(quality.Facts.of(model), methods)
    assert "MiniCache int4" not in {s.method for s in everything}
    assert quality.check(model, [lists[0][1]], everything) < 1e-4


def test_bytes(llama, lists):
    item = lists[0][0]
    prompt = quality.prefill(llama, item.prompt)
    n, token = len(item.prompt), 4 * 2 * 2 * 16 * 2                 # layers, key heads, keys and values, channels, bytes
    whole = quality.measure(llama, prompt, item, Recent(keep=1.0))
    assert (whole["kv_bytes"], whole["stock_bytes"], whole["notes_bytes"]) == (n * token, n * token, 0)
    half = quality.measure(llama, prompt, item, SnapKV(keep=0.5, recent=8))
    assert half["kv_share"] == 0.5 and half["notes_bytes"] == 5 * n // 2 * 4 * 2
    facts = quality.Facts.of(llama)
    assert (facts.heads, facts.dim, facts.stored(2)) == (8, 16, 6 / 16)
    for name in ("MiKV int2", "MiKV int4", "SnapKV + MiKV int2"):
        for budget in (0.5, 0.25):                                      # of 12.5 tokens SnapKV's window alone is more
            plan = quality.METHODS[name](budget, facts)
            if plan is not None:
                balancer = 4 * 2 * 16 * 2 / (n * token)
                share = quality.measure(llama, prompt, item, plan)["kv_share"]
                assert budget - 0.03 <= share - balancer <= budget + 0.03, name     # whole tokens of a hundred
    facts._found[0.125, 0.01] = ((1, 0),)
    row = quality.measure(llama, prompt, item, quality.razor(0.25, facts))
    assert row["kv_share"] == pytest.approx(0.25, abs=0.02)


def test_run_goes_on_and_adds_up(llama, lists, tmp_path, monkeypatch):
    out, everything = tmp_path / "rows.csv", [quality.Setting(quality.FULL, quality.FULL, Recent(keep=1.0)),
                                              quality.Setting("StreamingLLM", "50 %", StreamingLLM(keep=0.5))]
    items = quality.interleave(lists)
    quality.run(llama, "tiny", items[:3], everything, out, None)
    with out.open("a") as file:
        file.write("tiny,text,100,cut")                                             # as a killed run leaves it
    quality.run(llama, "tiny", items, everything, out, None)
    rows = quality.read(out)
    assert len(rows) == 2 * len(items) and len({tuple(r[k] for k in quality.KEY) for r in rows}) == len(rows)
    monkeypatch.setattr(quality, "measure", None)                                   # everything is in the file
    quality.run(llama, "tiny", items, everything, out, None)
    summary = quality.summarise(rows)
    assert len(summary) == 2 * (1 + 2 * 2)
    for row in summary:
        own = [r for r in rows if (r["task"], r["method"]) == (row["task"], row["method"])]
        full = {r["item"]: float(r[row["measure"]]) for r in rows if (r["task"], r["method"]) == (row["task"], quality.FULL)}
        assert row["n"] == row["pairs"] == len(own)
        mean = sum(float(r[row["measure"]]) for r in own) / len(own)
        assert row["mean"] == pytest.approx(mean) and row["low"] <= row["mean"] <= row["high"]
        assert row["difference"] == pytest.approx(mean - sum(full.values()) / len(full), abs=1e-6)
    assert quality.markdown(summary).count("\n| tiny |") == len(summary)
    quality.picture(summary, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_exact_is_greedy_decoding(llama, lists):
    item = lists[2][0]
    ids = torch.tensor([item.prompt + item.fed[:-5]])
    said = llama.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, -5:].tolist()
    prompt = quality.prefill(llama, item.prompt)
    right = item._replace(fed=item.fed[:-5] + said)
    assert quality.measure(llama, prompt, right, Recent(keep=1.0))["exact"] == 1
    wrong = right._replace(fed=right.fed[:-1] + [(right.fed[-1] + 1) % 256])
    assert quality.measure(llama, prompt, wrong, Recent(keep=1.0))["exact"] == 0
