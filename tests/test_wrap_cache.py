"""wrap(cache=...): what every cache plan gets free as part of a wrap, alone or behind reducers, on models of text too."""

import copy
import json

import pytest
import tiny_audio
import tiny_video
import torch
import transformers
from conftest import cache_plan
from test_cache_dense import NEAR, dense, kept_columns, prompt, tiny_model, words
from tiny import IMAGE, llava_next, make_inputs, row_of
from transformers import DynamicCache

import mmcompress
from mmcompress import UnsupportedModelError, WrapConfig, WrapError
from mmcompress.audio import Stride
from mmcompress.budget import keep_count
from mmcompress.cache import (
    H2O,
    CompressedCache,
    KNorm,
    Random,
    RazorAttention,
    Recent,
    SnapKV,
    StreamingLLM,
    attach,
    detach,
)
from mmcompress.image import Uniform
from mmcompress.layers import FastV
from mmcompress.registry import reducer_class
from mmcompress.video import UniformFrames

ROWS = [[(48, 48)], [(30, 70), (100, 40)], []]
GREEDY = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, suppress_tokens=[IMAGE])
SCORED = dict(return_dict_in_generate=True, output_scores=True)
PLAN = SnapKV(0.25, recent=3)


@pytest.fixture(scope="module")
def pictures():
    return llava_next(depth=3)


@pytest.fixture(scope="module")
def text():
    return tiny_model()


def state_of(model):
    """All that a wrap may touch."""
    configs = [model.config, model.config.get_text_config()]
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in vars(m)) for m in model.modules()]
    own = {name: id(value) for name, value in vars(model).items()}
    return own, [c._attn_implementation for c in configs], model.config.to_dict(), hooks


def texts():
    ids, mask = prompt((24, 15))
    return {"input_ids": ids, "attention_mask": mask}


def ones(mask, ids):
    """The mask of a prompt, longer by ones."""
    return torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)


# alone ----------------------------------------------------------------------------------------------------------------
def test_keep_one_is_bit_identical(pictures, text, cache_method):
    if cache_method in ("mikv", "minicache"):
        pytest.skip("what it keeps it holds in another form; see its own tests")
    for model, inputs in ((pictures, make_inputs(pictures, ROWS)), (text, texts())):
        stock, logits = model.generate(**inputs, **GREEDY, **SCORED), model(**inputs).logits
        with mmcompress.wrap(model, cache=cache_plan(cache_method, 1.0)) as w:
            got = w.generate(**inputs, **GREEDY, **SCORED)
            assert torch.equal(w(**inputs, use_cache=True).logits, logits)
        assert torch.equal(got.sequences, stock.sequences)
        assert all(torch.equal(a, b) for a, b in zip(got.scores, stock.scores))
        assert isinstance(got.past_key_values, CompressedCache)


def test_it_does_what_attach_does(pictures, text, cache_method):
    plan = cache_plan(cache_method)
    for model, inputs in ((pictures, make_inputs(pictures, ROWS)), (text, texts())):
        stock = model.generate(**inputs, **GREEDY, **SCORED)
        with attach(model, plan):
            want = model.generate(**inputs, **GREEDY, **SCORED)
        with mmcompress.wrap(model, cache=plan) as w:
            got, again = w.generate(**inputs, **GREEDY, **SCORED), model.generate(**inputs, **GREEDY)
        assert torch.equal(got.sequences, want.sequences) and torch.equal(again, want.sequences)
        assert all(torch.equal(a, b) for a, b in zip(got.scores, want.scores))
        kept = kept_columns(got.past_key_values)
        assert all(torch.equal(kept[i], k) for i, k in kept_columns(want.past_key_values).items())
        assert not torch.allclose(got.scores[1], stock.scores[1], atol=1e-3)


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(num_beams=3, num_return_sequences=2),
                                     dict(do_sample=True, num_return_sequences=2)], ids=["beams", "several", "samples"])
def test_beams_and_samples_against_a_dense_reference(pictures, options):
    """Behind an image reducer; the stock attention hides what the plan dropped of the shorter prompt."""
    inputs, options = make_inputs(pictures, ROWS), {**GREEDY, "renormalize_logits": True, **options}
    with mmcompress.wrap(pictures, image=Uniform(0.5), cache=PLAN) as w:
        torch.manual_seed(3)
        got = w.generate(**inputs, **options)
        cache = w.cache()
        w(**inputs, past_key_values=cache)
    with mmcompress.wrap(pictures, image=Uniform(0.5)) as w:
        with dense(pictures, kept_columns(cache), cache.get_seq_length()):
            torch.manual_seed(3)
            want = w.generate(**inputs, **options)
        torch.manual_seed(3)
        stock = w.generate(**inputs, **options)
    assert torch.equal(got, want) and not torch.equal(got, stock)


def test_a_padded_batch_equals_its_rows_alone(pictures, cache_method):
    inputs = make_inputs(pictures, ROWS)
    with mmcompress.wrap(pictures, image=Uniform(0.5), cache=cache_plan(cache_method)) as w:
        batch = w.generate(**inputs, **GREEDY, num_beams=2)
        for i in range(len(ROWS)):
            alone = row_of(pictures, inputs, ROWS, i)
            assert torch.equal(batch[i, -5:], w.generate(**alone, **GREEDY, num_beams=2)[0, -5:])
            assert w.report.cache.tokens == w.report.prompt_after


def test_forward_makes_a_cache_where_one_is_asked_for(text):
    inputs = texts()
    stock = text(**inputs).logits
    with mmcompress.wrap(text, cache=H2O(0.4)) as w:
        assert type(w(**inputs).past_key_values) is DynamicCache                     # asked for by nobody: training, scoring
        out = w(**inputs, use_cache=True)
        own = w.cache()
        w(**inputs, past_key_values=own)
        assert type(w(**inputs, past_key_values=DynamicCache()).past_key_values) is DynamicCache
        got, mask = [out.logits[:, -1:].argmax(-1)], inputs["attention_mask"]
        for _ in range(4):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            out = w(input_ids=got[-1], attention_mask=mask, past_key_values=out.past_key_values)
            got.append(out.logits[:, -1:].argmax(-1))
        assert torch.equal(torch.cat(got, 1), w.generate(**inputs, max_new_tokens=5, do_sample=False)[:, -5:])
    assert torch.equal(out.past_key_values.layers[0].slots.valid[..., :-4], own.layers[0].slots.valid)
    assert own.lengths == [9] * 3 and torch.equal(text(**inputs).logits, stock)


def test_a_wrapped_forward_with_a_hand_written_loop_behind_a_reducer(pictures):
    inputs = make_inputs(pictures, ROWS)
    with mmcompress.wrap(pictures, image=Uniform(0.5), cache=PLAN) as w:
        expected = w.generate(**inputs, **GREEDY)[:, -5:]
        out, mask = w(**inputs, use_cache=True), inputs["attention_mask"]
        got = []
        for step in range(5):
            logits = out.logits[:, -1]
            logits[:, IMAGE] = -torch.inf
            got.append(logits.argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            if step < 4:
                out = w(input_ids=got[-1], attention_mask=mask, past_key_values=out.past_key_values)
    assert torch.equal(torch.cat(got, 1), expected)


# one budget with reducers ---------------------------------------------------------------------------------------------
def valid_of(cache, prompt_columns):
    """Slots of prompt columns in each row, layer by layer and head by head. -> (layers, B, H_kv)"""
    return torch.stack([k[..., :prompt_columns].sum(-1) for k in kept_columns(cache).values()])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [0.25, 0.6, 21])
def test_a_share_is_of_the_stock_prompt(pictures, keep, side):
    inputs = make_inputs(pictures, ROWS, side)
    real = inputs["attention_mask"].sum(1)
    with mmcompress.wrap(pictures, image=Uniform(0.5), cache=SnapKV(keep, recent=3)) as w:
        cache = w.cache()
        w(**inputs, past_key_values=cache)
        left = real - torch.tensor([sum(i.before - i.after for i in w.last if i.row == row) for row in range(len(ROWS))])
    held = valid_of(cache, cache.get_seq_length())
    for row, (stock, short) in enumerate(zip(real.tolist(), left.tolist())):
        assert held[:, row].eq(min(max(3, keep_count(stock, keep)), short)).all()          # 3: the window always stays
    assert (left[:2] < real[:2]).all() and left[2] == real[2]


def test_generates_own_cache_is_told_too(pictures):
    inputs = make_inputs(pictures, ROWS)
    real = inputs["attention_mask"].sum(1)
    with mmcompress.wrap(pictures, image=Uniform(0.5), cache=Random(0.25)) as w:
        out = w.generate(**inputs, **GREEDY, num_beams=2, **SCORED)
        kept = valid_of(out.past_key_values, out.past_key_values.get_seq_length() - 4)
        assert kept[0, :, 0].tolist() == [int(n) // 4 for n in real for _ in range(2)]
        alone = w.generate(**make_inputs(pictures, [[]]), **GREEDY, **SCORED)         # what was said of the last call is gone
        length = make_inputs(pictures, [[]])["input_ids"].shape[1]
        assert valid_of(alone.past_key_values, length).eq(max(1, length // 4)).all()


def test_budgets_by_modality_are_of_the_stock_prompt():
    model = tiny_video.build("qwen2_5_vl")
    inputs = tiny_video.make_inputs(model, [[tiny_video.Film(6), tiny_video.Picture((30, 70))], [tiny_video.Picture()]])
    keep = {"image": 0.3, "video": 0.2}
    ids = inputs["input_ids"]
    with mmcompress.wrap(model, image=Uniform(0.5), video=UniformFrames(0.4), cache=KNorm(keep)) as w:
        cache = w.cache()
        out = w.generate(**inputs, past_key_values=cache, max_new_tokens=3, do_sample=False)
        short = w.prompt.select(ids, 0)
    kept = kept_columns(cache)[0][..., :short.shape[1]]
    for number, share in ((tiny_video.IMAGE, 0.3), (tiny_video.VIDEO, 0.2)):
        for row in range(2):
            stock = int((ids[row] == number).sum())
            assert (kept[row] & (short[row] == number)).sum(-1).eq(int(stock * share + 1e-9)).all()
    assert torch.equal(out[:, :ids.shape[1]], ids)


@pytest.mark.parametrize("family", ["qwen2_audio", "voxtral", "qwen2_5_omni_thinker"])
def test_recordings(family):
    """Their features travel as input embeddings; the plan is told all the same which columns are sound."""
    model = tiny_audio.build(family)
    rows = [[tiny_audio.Recording()], [tiny_audio.Recording(77), tiny_audio.Recording(160)], []]
    inputs = tiny_audio.make_inputs(model, rows)
    ids = inputs["input_ids"]
    with mmcompress.wrap(model, audio=Stride(0.5), cache=KNorm({"audio": 0.25})) as w:
        out = w.generate(**inputs, max_new_tokens=3, do_sample=False, **SCORED)
        short = w.prompt.select(ids, 0)
    kept = kept_columns(out.past_key_values)[1][..., :short.shape[1]]
    for row in range(3):
        heard = int((ids[row] == tiny_audio.AUDIO).sum())
        assert (kept[row] & (short[row] == tiny_audio.AUDIO)).sum(-1).eq(heard // 4).all()
    assert (ids[:2] == tiny_audio.AUDIO).sum(1).gt(7).all()


# turns ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("beams", [1, 3])
def test_a_second_turn_on_the_models_own_cache(pictures, beams):
    """Against the reducer alone, whose attention hides what the plan dropped; the caller's prompt is in front every time."""
    inputs = make_inputs(pictures, ROWS)
    more = words(3, 6, 3)

    def talk(w, cache):
        first = w.generate(**inputs, **GREEDY, past_key_values=cache)
        ids = torch.cat([first, more], 1)
        if beams > 1:
            cache.batch_repeat_interleave(beams)
        again = w.generate(input_ids=ids, attention_mask=ones(inputs["attention_mask"], ids), past_key_values=cache,
                           **GREEDY, num_beams=beams)
        assert torch.equal(again[:, :ids.shape[1]], ids)
        return again

    with mmcompress.wrap(pictures, image=Uniform(0.5), cache=PLAN) as w:
        cache = w.cache()
        w(**inputs, past_key_values=cache)
        got = talk(w, w.cache())
    with mmcompress.wrap(pictures, image=Uniform(0.5)) as w:
        with dense(pictures, kept_columns(cache), cache.get_seq_length()):
            want = talk(w, DynamicCache(config=pictures.config.get_text_config()))
        stock = talk(w, DynamicCache(config=pictures.config.get_text_config()))
    assert torch.equal(got, want) and not torch.equal(got, stock)


def test_a_picture_in_the_second_turn_is_counted_with_the_first(pictures):
    first, later = make_inputs(pictures, [[(48, 48)]]), make_inputs(pictures, [[(100, 40)]], seed=5)
    with mmcompress.wrap(pictures, image=Uniform(0.5), cache=StreamingLLM(0.25, again=True)) as w:
        cache = w.cache()
        said = w.generate(**first, **GREEDY, past_key_values=cache)
        ids = torch.cat([said, later["input_ids"]], 1)
        w.generate(**{**later, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, **GREEDY, past_key_values=cache)
        reduced = [(i.before, i.after) for i in w.last]
        assert w.report.cache.tokens == cache.get_seq_length() - 4
    picture = int((first["input_ids"] == IMAGE).sum()) // 2, int((later["input_ids"] == IMAGE).sum()) // 2
    assert reduced == [(2 * picture[1], picture[1])] and cache.get_seq_length() == ids.shape[1] - sum(picture) + 4
    assert valid_of(cache, cache.get_seq_length() - 4).eq(int(ids.shape[1] * 0.25)).all()


# undone, paused, changed ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [dict(cache=PLAN), dict(cache=[PLAN, KNorm(0.1)], image=Uniform(0.5))],
                         ids=["cache", "image and cache"])
@pytest.mark.parametrize("kind", ["pictures", "text", "gemma3"])
def test_remove_leaves_nothing(kind, options):
    model = llava_next() if kind == "pictures" else tiny_model("gemma3", "eager") if kind == "gemma3" else tiny_model()
    inputs = make_inputs(model, ROWS) if kind == "pictures" else texts()
    options = options if kind == "pictures" else {"cache": options["cache"]}
    logits, before = model(**inputs).logits, state_of(model)
    w = mmcompress.wrap(model, **options)
    assert "mmcompress" in model.config.get_text_config()._attn_implementation
    with pytest.raises(WrapError, match=r"wrapped already.*unwrap"):
        mmcompress.wrap(model, cache="knorm")
    w.generate(**inputs, **GREEDY)
    assert w.remove() is model and w.remove() is model
    assert state_of(model) == before and torch.equal(model(**inputs).logits, logits)
    with pytest.raises(WrapError, match="was removed"):
        w.cache()
    with mmcompress.wrap(model, **options) as w:
        w.generate(**inputs, **GREEDY)
    assert state_of(model) == before
    mmcompress.wrap(model, **options)
    assert mmcompress.unwrap(model) is model and state_of(model) == before


def test_disable_is_the_stock_model(pictures):
    inputs, before = make_inputs(pictures, ROWS), state_of(pictures)[1]
    stock, text = pictures(**inputs).logits, pictures.config.get_text_config()
    want = pictures.generate(**inputs, **GREEDY, **SCORED)
    with mmcompress.wrap(pictures, image=Uniform(0.5), cache=PLAN) as w:
        with w.disable(), w.disable():
            got = w.generate(**inputs, **GREEDY, **SCORED)
            assert type(got.past_key_values) is DynamicCache and state_of(pictures)[1] == before
            assert torch.equal(w(**inputs, use_cache=True).logits, stock) and type(w.cache()) is DynamicCache
            assert torch.equal(w.generate(**inputs, **GREEDY, cache_implementation="static"), want.sequences)
        assert torch.equal(got.sequences, want.sequences)
        assert isinstance(w.generate(**inputs, **GREEDY, **SCORED).past_key_values, CompressedCache)
        with pytest.raises(RuntimeError), w.disable():
            raise RuntimeError
        assert "mmcompress" in text._attn_implementation
        with w.disable():
            w.remove()
    assert text._attn_implementation == before[1] and not any("mmcompress" in name for name in vars(pictures))


def test_only_training_leaves_evaluation_stock():
    model, inputs = tiny_model(), texts()
    want = model.generate(**inputs, **GREEDY)
    with mmcompress.wrap(model, cache=PLAN) as w:
        cut, kept = w.generate(**inputs, **GREEDY), w.cache()
        first = w.generate(**inputs, **GREEDY, past_key_values=kept)
        w.only_training = True
        out = w.generate(**inputs, **GREEDY, **SCORED)
        assert torch.equal(out.sequences, want) and type(out.past_key_values) is type(w.cache()) is DynamicCache
        ids = torch.cat([first, words(2, 4)], 1)                                    # a conversation that was begun goes on
        late = w.generate(input_ids=ids, attention_mask=ones(inputs["attention_mask"], ids), past_key_values=kept, **GREEDY)
        assert kept.lengths[0] < 24 < kept.get_seq_length() and late.shape[1] == ids.shape[1] + 5
        model.train()
        assert torch.equal(w.generate(**inputs, **GREEDY), cut) and isinstance(w.cache(), CompressedCache)
    assert not torch.equal(cut, want)


def test_another_plan_from_the_next_call_on(text):
    """Caches made before stay valid, and go on by the plan that they were made with."""
    inputs, more = texts(), words(2, 6, 3)

    def talk(w, change):
        cache = w.cache()
        first = w.generate(**inputs, **GREEDY, past_key_values=cache)
        change()
        ids = torch.cat([first, more], 1)
        return w.generate(input_ids=ids, attention_mask=ones(inputs["attention_mask"], ids), past_key_values=cache, **GREEDY)

    with mmcompress.wrap(text, cache=H2O(0.4, again=True)) as w:
        want = talk(w, lambda: None)
        assert torch.equal(talk(w, lambda: w.configure(WrapConfig(cache=Recent(0.2)))), want)
        assert w.cache().slot_layers[0].plan == Recent(0.2)
        recent = w.generate(**inputs, **GREEDY)
        with w.disable():
            w.configure(WrapConfig(cache=(PLAN,)))
            assert text.config._attn_implementation == "sdpa"
        assert w.cache().slot_layers[0].plan == PLAN
    with attach(text, Recent(0.2)):
        assert torch.equal(recent, text.generate(**inputs, **GREEDY))


def test_a_wrap_may_gain_and_lose_its_plans(pictures):
    inputs, before = make_inputs(pictures, ROWS), state_of(pictures)
    with mmcompress.wrap(pictures, image=Uniform(0.5)) as w:
        want = w.generate(**inputs, **GREEDY)
        with pytest.raises(ValueError, match=r"no cache plan is configured.*cache=SnapKV\(keep=0.25\)"):
            w.cache()
        w.configure(WrapConfig(image=Uniform(0.5), cache=("snapkv", "knorm")))
        cache = w.cache()
        first = w.generate(**inputs, **GREEDY, past_key_values=cache)
        w.configure(WrapConfig(image=Uniform(0.5)))
        out = w.generate(**inputs, **GREEDY, **SCORED)
        assert torch.equal(out.sequences, want) and type(out.past_key_values) is DynamicCache and w.report.cache is None
        ids = torch.cat([first, words(3, 4)], 1)
        w.generate(input_ids=ids, attention_mask=ones(inputs["attention_mask"], ids), past_key_values=cache, **GREEDY)
        assert max(cache.lengths) < cache.get_seq_length() - 50
    assert state_of(pictures) == before


def test_a_deep_copy_is_wrapped_by_itself():
    model, inputs = tiny_model(), texts()
    with mmcompress.wrap(model, cache=PLAN) as w:
        twin = copy.deepcopy(model)
        want = w.generate(**inputs, **GREEDY)
    got = twin.generate(**inputs, **GREEDY, **SCORED)
    assert torch.equal(got.sequences, want) and isinstance(got.past_key_values, CompressedCache)
    mmcompress.unwrap(twin)
    assert type(twin.generate(**inputs, **GREEDY, **SCORED).past_key_values) is DynamicCache
    assert twin.config._attn_implementation == "sdpa"


# configuration --------------------------------------------------------------------------------------------------------
def test_configuration_round_trip(pictures, cache_method, tmp_path):
    with mmcompress.wrap(pictures, image="uniform", cache=cache_plan(cache_method, 0.37, sinks=2)) as w:
        w.save_pretrained(tmp_path)
    with mmcompress.from_pretrained(pictures, tmp_path) as again:
        assert again.config == w.config and again.cache().slot_layers[0].plan == w.config.cache[0]
    with mmcompress.wrap(pictures, cache=cache_method) as named:
        assert named.config.cache == (reducer_class("cache", cache_method)(),)


@pytest.mark.parametrize("plan", [
    KNorm(keep=(1.0, 1.0, 0.5)), KNorm(keep=[1.0, 1.0, 0.5]), SnapKV(keep={"image": 0.1, "text": 32}), H2O(keep=64),
    RazorAttention(retrieval=((0, 1), (2, 0)), compensation=False), Recent(0.3, every=8)], ids=repr)
def test_budgets_of_every_form_come_back_from_yaml_and_json(plan):
    import yaml

    config = WrapConfig(cache=plan)
    for back in (yaml.safe_load(yaml.safe_dump(config.to_dict())), json.loads(json.dumps(config.to_dict()))):
        assert WrapConfig.from_dict(back) == config and WrapConfig.from_dict(back).cache == (plan,)


def test_names_dicts_lists_and_files(text, tmp_path):
    (tmp_path / "small.yaml").write_text("cache: {name: snapkv, keep: 0.5}\n")
    (tmp_path / "none.yaml").write_text("image: uniform\n")
    ways = ["snapkv", {"name": "snapkv", "keep": 0.5}, SnapKV(0.5), ["knorm", {"name": "snapkv", "keep": 0.5}],
            str(tmp_path / "small.yaml")]
    held = [(SnapKV(),), (SnapKV(0.5),), (SnapKV(0.5),), (KNorm(), SnapKV(0.5)), (SnapKV(0.5),)]
    for way, want in zip(ways, held):
        with mmcompress.wrap(text, cache=way) as w:
            assert w.config.cache == want
    with mmcompress.wrap(text, tmp_path / "small.yaml") as w:
        assert w.config == WrapConfig(cache=SnapKV(0.5)) and w.config.label == "SnapKV(keep=0.5)"
    with pytest.raises(ValueError, match="configures no cache plan"):
        mmcompress.wrap(text, cache=str(tmp_path / "none.yaml"))
    assert WrapConfig(image="uniform").cache == () and WrapConfig(image="uniform").to_dict()["cache"] == []
    assert mmcompress.wrap(text, cache=["knorm", "recent"]).config.label == "KNorm(keep=0.25) + Recent(keep=0.25)"
    mmcompress.unwrap(text)


def test_what_cannot_work_is_refused_and_leaves_nothing(pictures, text):
    before = state_of(pictures), state_of(text)
    no = lambda error, match: pytest.raises(error, match=match)  # noqa: E731
    with no(ValueError, r"layers=\[...\] and cache=...: .* pass one of them"):
        mmcompress.wrap(pictures, layers=[FastV(1, 0.5)], cache=PLAN)
    with no(ValueError, r"no cache reducer named 'nope'; known: .*snapkv"):
        mmcompress.wrap(text, cache="nope")
    with no(ValueError, r"SnapKV has no option kep"):
        mmcompress.wrap(text, cache={"name": "snapkv", "kep": 0.5})
    with no(ValueError, r"cache=<class .*pass a reducer"):
        mmcompress.wrap(text, cache=SnapKV)
    with no(ValueError, r"either a configuration file or .*cache="):
        mmcompress.wrap(text, "configs/globalcom2-25.yaml", cache="knorm")
    with no(ValueError, r"keep has 2 entries, the model 3 layers"):
        mmcompress.wrap(text, cache=KNorm((0.5, 0.5)))
    with no(ValueError, r"again= differs"):
        mmcompress.wrap(text, cache=[KNorm(0.5), Recent(0.5, again=True)])
    with no(UnsupportedModelError, r"no adapter for model_type 'llama'"):
        mmcompress.wrap(text, image="uniform", cache=PLAN)
    with no(UnsupportedModelError, r"no adapter for model_type 'llama'"):
        mmcompress.wrap(text, image="uniform")
    with no(UnsupportedModelError, r"language head"):
        mmcompress.wrap(text.model, cache=PLAN)
    with attach(text, PLAN), no(WrapError, r"detach\(model\) first"):
        mmcompress.wrap(text, cache=PLAN)
    with mmcompress.wrap(text, cache=PLAN) as w:
        with no(ValueError, r"keep has 1 entries"):
            w.configure(WrapConfig(cache=KNorm((0.5,))))
        with no(UnsupportedModelError, r"does not hear"):
            w.configure(WrapConfig(audio="stride"))
        assert w.config.cache == (PLAN,) and w.cache().slot_layers[0].plan == PLAN
    text.config._attn_implementation = "flex_attention"
    with no(UnsupportedModelError, r"attn_implementation='sdpa'"):
        mmcompress.wrap(text, cache=PLAN)
    text.config._attn_implementation = "sdpa"
    assert (state_of(pictures), state_of(text)) == before


def test_encoders_with_decoders_and_shared_keys_are_refused():
    config = transformers.Gemma3nTextConfig(
        hidden_size=32, intermediate_size=[48] * 4, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=100, vocab_size_per_layer_input=100, hidden_size_per_layer_input=8, num_kv_shared_layers=2,
        laurel_rank=4, layer_types=["full_attention"] * 4, activation_sparsity_pattern=[0.0] * 4)
    t5 = transformers.T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    for make, match in ((tiny_audio.whisper, "cache of its decoder"),
                        (lambda: transformers.T5ForConditionalGeneration(t5), "cache of its decoder"),
                        (lambda: transformers.Gemma3nForCausalLM(config), "share the keys and values")):
        model = make()
        before = state_of(model)
        with pytest.raises(UnsupportedModelError, match=match):
            mmcompress.wrap(model, cache=PLAN)
        assert state_of(model) == before


# around it ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["pictures", "text"])
@pytest.mark.parametrize("order", ["peft first", "wrap first"])
def test_peft(order, kind):
    from peft import LoraConfig, get_peft_model
    model = llava_next() if kind == "pictures" else tiny_model()
    inputs, more = (make_inputs(model, ROWS), dict(image=Uniform(0.5))) if kind == "pictures" else (texts(), {})
    before = state_of(model)[:3]
    with mmcompress.wrap(model, cache=PLAN, **more) as w:
        expected, logits = w.generate(**inputs, **GREEDY), w(**inputs).logits
    lora = LoraConfig(target_modules=r".*(language_model|layers).*q_proj", r=2)
    if order == "peft first":
        tuned = get_peft_model(model, lora)
        w = mmcompress.wrap(tuned, cache=PLAN, **more)
    else:
        w = mmcompress.wrap(model, cache=PLAN, **more)
        tuned = get_peft_model(model, lora)
    assert torch.equal(tuned.generate(**inputs, **GREEDY), expected) and torch.equal(tuned(**inputs).logits, logits)
    assert w.report.cache is None if kind == "pictures" else w.report.cache.tokens == 24
    assert isinstance(tuned(**inputs, use_cache=True).past_key_values, CompressedCache) and w.report.cache.layers[0] == 0
    tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert any("lora" in n and p.grad is not None and p.grad.abs().sum() > 0 for n, p in tuned.named_parameters())
    w.remove()
    after = state_of(model)[:3]
    assert after[1] == before[1] and set(after[0]) - set(before[0]) <= {"peft_config", "_hf_peft_config_loaded"}
    assert type(tuned.generate(**inputs, **GREEDY, **SCORED).past_key_values) is DynamicCache


@pytest.mark.parametrize("order", ["hooks first", "wrap first"])
@pytest.mark.parametrize("kind", ["pictures", "text"])
def test_accelerate_hooks(order, kind):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
    model = llava_next() if kind == "pictures" else tiny_model()
    inputs, more = (make_inputs(model, ROWS), dict(image=Uniform(0.5))) if kind == "pictures" else (texts(), {})
    with mmcompress.wrap(model, cache=PLAN, **more) as w:
        expected = w.generate(**inputs, **GREEDY)
    stock, hook = model.generate(**inputs, **GREEDY), AlignDevicesHook(execution_device="cpu", io_same_device=True)
    if order == "hooks first":
        add_hook_to_module(model, hook)
        hooked = model.__dict__["forward"]
        w = mmcompress.wrap(model, cache=PLAN, **more)
    else:
        w = mmcompress.wrap(model, cache=PLAN, **more)
        add_hook_to_module(model, hook)
    assert torch.equal(w.generate(**inputs, **GREEDY), expected) and torch.equal(model.generate(**inputs, **GREEDY), expected)
    w.remove()
    assert order == "wrap first" or model.__dict__["forward"] is hooked
    assert torch.equal(model.generate(**inputs, **GREEDY), stock)
    remove_hook_from_module(model)
    assert type(model.generate(**inputs, **GREEDY, **SCORED).past_key_values) is DynamicCache


def test_training_is_the_stock_models(text):
    ids = words(2, 12)
    stock = copy.deepcopy(text).train()
    want = stock(input_ids=ids, labels=ids).loss
    want.backward()
    tuned = copy.deepcopy(text).train()
    with mmcompress.wrap(tuned, cache=PLAN) as w:
        loss = w(input_ids=ids, labels=ids).loss
        loss.backward()
    assert torch.equal(loss, want) and torch.equal(tuned.lm_head.weight.grad, stock.lm_head.weight.grad)


def test_a_saved_model_loads_as_stock(tmp_path):
    model = tiny_model()
    with mmcompress.wrap(model, cache=PLAN):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert "mmcompress" not in (tmp_path / "config.json").read_text() and again.config._attn_implementation == "sdpa"
    assert torch.equal(again.generate(**texts(), **GREEDY), model.generate(**texts(), **GREEDY))


def test_a_family_of_another_make():
    """GPT-2: positions are learnt, widths have other names, keys have as many heads as queries."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3,
                                     bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    inputs, options = texts(), dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    with mmcompress.wrap(model, cache=SnapKV(0.4, recent=3)) as w:
        cache = w.cache()
        got, report = w.generate(**inputs, **options, past_key_values=cache), w.report
    with dense(model, {i: k[..., :24] for i, k in kept_columns(cache).items()}, 24):
        assert torch.equal(model.generate(**inputs, **options), got)
    assert report.kv_bytes_before == 2 * 2 * 2 * 24 * 32 * 4 and report.cache.slots == [9, 9]


# the report -----------------------------------------------------------------------------------------------------------
def tensors_of(layer):
    """Bytes of one compressed layer, counted from its slots."""
    s = layer.slots
    return sum(x.numel() * x.element_size() for x in (s.keys, s.values, s.column, s.valid, s.bias, s.evidence) if x is not None)


@pytest.mark.parametrize("plan", [PLAN, RazorAttention(0.3, recent=3), KNorm((1.0, 0.5, 0.25))], ids=repr)
def test_report_of_a_model_of_text(text, plan):
    inputs = texts()
    with mmcompress.wrap(text, cache=plan) as w:
        assert "nothing was reduced" in str(w.report)
        w.generate(**inputs, max_new_tokens=5, do_sample=False)
        report = w.report
        cache = w.cache()
        w(**inputs, past_key_values=cache)
    found = report.cache
    whole = 2 * 3 * 24 * 2 * 2 * 8 * 4                          # rows, layers, columns, heads of 8, keys and values, float32
    assert (found.label, found.tokens, found.layers, found.dtype) == (w.config.label, 24, [0, 1, 2], "float32")
    assert found.slots == cache.lengths and found.bytes_before == whole == report.kv_bytes_before
    assert found.bytes_after == sum(tensors_of(layer) if not layer.whole else layer.keys.nbytes + layer.values.nbytes
                                    for layer in cache.layers) == report.kv_bytes_after
    assert whole // 3 <= found.peak <= whole and found.peak >= found.bytes_after
    assert set(found.milliseconds) == {"score", "select", "gather", "store"} and min(found.milliseconds.values()) >= 0
    assert report.decode_steps == 4 and list(report.milliseconds) == ["prefill", "decode"]
    assert (report.prompt_before, report.prompt_after, report.items) == (24, 24, []) and w.last == [] and w.prompt is None
    shown = str(report)
    assert f"cache {w.config.label}: 24 -> " in shown and f"{found.bytes_after / whole:.1%}, bookkeeping included" in shown
    assert "nothing was reduced" not in shown and "at most" in shown and "ms: score" in shown and "decode" in shown
    assert json.loads(json.dumps(report.to_dict()))["cache"]["slots"] == found.slots


def test_report_behind_a_reducer(pictures):
    inputs = make_inputs(pictures, ROWS)
    with mmcompress.wrap(pictures, image=Uniform(0.5), cache=PLAN) as w:
        out = w.generate(**inputs, **GREEDY, **SCORED)
        report, beams = w.report, (w.generate(**inputs, **GREEDY, num_beams=3), w.report)[1]
        whole = 3 * inputs["input_ids"].shape[1] * 3 * 2 * 2 * 8 * 4
        after = report.cache.bytes_after
        assert report.kv_bytes_before == whole and report.kv_bytes_after == after
        assert report.cache.tokens == report.prompt_after < report.prompt_before
        assert report.cache.slots == [n - 4 for n in out.past_key_values.lengths]
        assert report.cache.bytes_before == whole // report.prompt_before * report.prompt_after
        assert beams.cache.bytes_after == 3 * after and beams.kv_bytes_after == after          # each prompt once
        assert "KV cache" in str(report) and "  cache SnapKV(keep=0.25, recent=3): " in str(report)
        w(**inputs)                                             # a call that makes no cache has none to report
        assert w.report.cache is None and w.report.kv_bytes_after == whole // report.prompt_before * report.prompt_after
        w(**inputs, use_cache=True)
        assert w.report.cache == type(w.report.cache)(**{**vars(report.cache), "milliseconds": w.report.cache.milliseconds})
        w.generate(**make_inputs(pictures, [[], []]), **GREEDY)
        later = w.report                                        # text alone: the call that was compressed last
        assert later.items == [] and later.cache.tokens == later.prompt_before < 50 and "nothing was" not in str(later)
        with w.disable():
            w.generate(**inputs, **GREEDY)
        assert w.report.cache.tokens == later.cache.tokens


def test_report_of_layers_that_no_plan_sees():
    """Gemma's sliding windows are stock in both figures."""
    model = tiny_model("gemma3", "eager")
    ids = words(1, 24)
    with mmcompress.wrap(model, cache=KNorm(0.25)) as w:
        w.generate(ids, max_new_tokens=3, do_sample=False)
        report = w.report
    column = 2 * 2 * 8 * 4
    assert report.cache.layers == [1, 2] and report.cache.slots == [6, 6]
    assert report.kv_bytes_before == (9 + 24 + 24) * column
    assert report.kv_bytes_after == 9 * column + report.cache.bytes_after


def test_a_conversation_tells_what_its_last_compression_did(text):
    inputs = texts()
    with mmcompress.wrap(text, cache=Recent(0.25)) as w:
        cache = w.cache()
        first = w.generate(**inputs, **GREEDY, past_key_values=cache)
        told = w.report
        ids = torch.cat([first, words(2, 6)], 1)
        w.generate(input_ids=ids, attention_mask=ones(inputs["attention_mask"], ids), past_key_values=cache, **GREEDY)
        assert w.report.cache.tokens == told.cache.tokens == 24 == w.report.prompt_before       # nothing was compressed since
        w.configure(WrapConfig(cache=Recent(0.25, again=True)))
        cache = w.cache()
        first = w.generate(**inputs, **GREEDY, past_key_values=cache)
        ids = torch.cat([first, words(2, 6)], 1)
        w.generate(input_ids=ids, attention_mask=ones(inputs["attention_mask"], ids), past_key_values=cache, **GREEDY)
        assert w.report.cache.tokens == w.report.prompt_before == ids.shape[1] == 35 and w.report.cache.slots == [8] * 3


def test_detach_by_hand_is_survived(text):
    before = state_of(text)
    w = mmcompress.wrap(text, cache=PLAN)
    detach(text)
    w.remove()
    assert state_of(text) == before


def test_the_dense_reference_of_several_plans(text):
    """One after the other: the second chooses among what the first left."""
    inputs = texts()
    with mmcompress.wrap(text, cache=[Recent(0.5), KNorm(0.25)]) as w:
        cache = w.cache()
        w(**inputs, past_key_values=cache)
        got = w.generate(**inputs, **GREEDY, **SCORED)
    kept = kept_columns(cache)
    for row, n in enumerate((24, 15)):
        for layer in kept.values():
            assert not layer[row, :, :24 - n // 2].any() and layer[row].sum(-1).eq(n // 4).all()
    with dense(text, kept, 24):
        want = text.generate(**inputs, **GREEDY, **SCORED)
    for a, b in zip(got.scores, want.scores):
        torch.testing.assert_close(a, b, **NEAR)
