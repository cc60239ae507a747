"""Generating with a compressed cache: every way of it against the stock model whose attention hides what was dropped."""

import copy

import pytest
import tiny_video
import torch
from test_cache_dense import NEAR, dense, kept_columns, prompt, tiny_model, turns, words
from tiny import IMAGE, llava, make_inputs
from transformers import DynamicCache

import mmcompress
from mmcompress import SignalError, UnsupportedModelError, WrapError
from mmcompress.budget import keep_count
from mmcompress.cache import H2O, CompressedCache, KNorm, RazorAttention, SnapKV, StreamingLLM, attach, detach
from mmcompress.image import Uniform
from mmcompress.layers import FastV

WAYS = {"greedy": dict(do_sample=False), "sampling": dict(do_sample=True, top_k=0, temperature=1.5),
        "beams": dict(num_beams=3), "beams, several": dict(num_beams=4, num_return_sequences=2),
        "sampling, several": dict(do_sample=True, top_k=0, num_return_sequences=3),
        "beam sampling": dict(num_beams=3, do_sample=True, top_k=0)}
SCORED = dict(return_dict_in_generate=True, output_scores=True)
PLANS = {"snapkv": SnapKV(0.4, recent=3), "h2o": H2O(0.4), "streaming_llm": StreamingLLM(0.3, sinks=2)}


def kept_of(model, plan, ids, mask):
    """What a plan keeps of a prompt."""
    with attach(model, plan) as attached:
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=ids, attention_mask=mask)])
    return kept_columns(cache)


def generated(model, ids, mask, **options):
    torch.manual_seed(7)
    return model.generate(ids, attention_mask=mask, max_new_tokens=9, **SCORED, **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("plan", PLANS)
def test_generate_equals_a_dense_reference(plan, way, attention):
    model = tiny_model("qwen2", attention)
    ids, mask = prompt((24, 15))
    kept = kept_of(model, PLANS[plan], ids, mask)
    with dense(model, kept, 24):
        want = generated(model, ids, mask, **WAYS[way])
    with attach(model, PLANS[plan]):
        got = generated(model, ids, mask, **WAYS[way])
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.scores, want.scores):
        torch.testing.assert_close(a, b, **NEAR)
    assert isinstance(got.past_key_values, CompressedCache) and not got.past_key_values.layers[0].whole
    assert isinstance(want.past_key_values, DynamicCache) and got.past_key_values.get_seq_length() == 24 + 8


def test_what_was_dropped_is_missed():
    """The tests above would pass on a plan that drops nothing, if this did not hold."""
    model = tiny_model("qwen2")
    ids, mask = prompt((24, 15))
    stock = generated(model, ids, mask, do_sample=False)
    with attach(model, SnapKV(0.4, recent=3)):
        got = generated(model, ids, mask, do_sample=False)
    assert torch.equal(got.scores[0], stock.scores[0])              # the prompt's own logits are those of the full cache
    assert not torch.allclose(got.scores[1], stock.scores[1], atol=1e-2)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_conversation_goes_on_with_what_was_kept(beams):
    """The second turn is given in full, and only its new tokens are fed."""
    model = tiny_model()
    ids, mask, fed = *prompt((20, 13)), []
    more = words(2, 6, 3)
    kept = kept_of(model, H2O(0.4), ids, mask)

    def talk(cache):
        first = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False)
        both = torch.cat([first, more], 1)
        ones = torch.cat([mask, mask.new_ones(2, both.shape[1] - 20)], 1)
        if beams > 1:
            cache.batch_repeat_interleave(beams)
        torch.manual_seed(0)
        return model.generate(both, attention_mask=ones, past_key_values=cache, max_new_tokens=6, num_beams=beams)

    with dense(model, kept, 20):
        want = talk(DynamicCache(config=model.config))
    with attach(model, H2O(0.4)) as attached:
        hook = model.model.embed_tokens.register_forward_pre_hook(lambda module, args: fed.append(args[0].shape[1]))
        got = talk(attached.cache())
        hook.remove()
    assert torch.equal(got, want)
    assert fed[:6] == [20, 1, 1, 1, 1, 7]                   # the last generated token has no column yet


def test_positions_stay_those_of_the_whole_prompt():
    model = tiny_model()
    ids, mask = prompt((24, 15))
    with attach(model, SnapKV(0.25, recent=3)) as attached:
        cache = attached.cache()
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False)
    positions = cache.timeline.positions
    assert positions[0].tolist() == list(range(27)) and positions[1, 9:].tolist() == list(range(18))
    slots = cache.layers[1].slots
    assert (slots.column.diff() > 0)[slots.valid[..., 1:] & slots.valid[..., :-1]].all()


def test_ways_of_generating_that_would_compress_too_early_are_refused():
    model = tiny_model()
    with attach(model, KNorm(0.5)):
        with pytest.raises(ValueError, match="prompt_lookup_num_tokens"):
            model.generate(words(1, 12), max_new_tokens=4, prompt_lookup_num_tokens=3)
        with pytest.raises(ValueError, match="cache_implementation='offloaded'"):
            model.generate(words(1, 12), max_new_tokens=4, cache_implementation="offloaded")


def test_chunked_prefill_asks_for_a_plan_that_goes_on():
    model = tiny_model()
    ids = words(1, 30)
    with attach(model, StreamingLLM(0.4, sinks=2)), pytest.raises(ValueError, match="again=True"):
        model.generate(ids, max_new_tokens=2, prefill_chunk_size=8)
    with attach(model, StreamingLLM(0.4, sinks=2, again=True)):
        out = model.generate(ids, max_new_tokens=2, prefill_chunk_size=8, return_dict_in_generate=True)
    assert out.past_key_values.lengths == [13] * 3


# pictures -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("keep", [{"image": 0.25}, {"image": 6, "text": 0.5}])
def test_budgets_by_modality_follow_the_placeholders(keep):
    model = llava()
    inputs = make_inputs(model, [[(24, 24)], [(24, 24)] * 2])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with attach(model, SnapKV(keep, recent=3)) as attached:
        cache = attached.cache()
        turns(model, cache, [inputs])
        torch.manual_seed(0)
        out = model.generate(**inputs, max_new_tokens=6, num_beams=2, suppress_tokens=[IMAGE])
    kept = kept_columns(cache)
    for row in range(2):
        image, text = ids[row] == IMAGE, (ids[row] != IMAGE) & mask[row].bool()
        for layer in kept.values():
            for head in layer[row]:
                pictures = 6 if keep["image"] == 6 else int(image.sum()) // 4
                assert int(head[image].sum()) == pictures
                assert int(head[text].sum()) == (int(text.sum()) // 2 if "text" in keep else int(text.sum()))
                assert head[-3:].all() and not head[~mask[row].bool()].any()
    torch.manual_seed(0)
    with dense(model, kept, ids.shape[1]):
        want = model.generate(**inputs, max_new_tokens=6, num_beams=2, suppress_tokens=[IMAGE])
    assert torch.equal(out, want)
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_tags_can_be_told():
    model = tiny_model()
    tags = torch.tensor([[0, 0, 3, 3, 3, 3, 0, 0, 0, 0]])
    with attach(model, KNorm({"audio": 2})) as attached:
        cache = attached.cache()
        with pytest.raises(SignalError, match=r"cache\.tag"):
            turns(model, cache, [dict(input_ids=words(1, 10))])
        cache = attached.cache()
        cache.tag(tags)
        turns(model, cache, [dict(input_ids=words(1, 10))])
    for kept in kept_columns(cache).values():
        assert (kept & (tags == 3)).sum(-1).eq(2).all() and kept[..., tags[0] == 0].all()


def test_rotary_positions_of_several_dimensions():
    """Qwen2.5-VL: positions go on from the whole prompt's, clips and pictures and padding in it."""
    model = tiny_video.build("qwen2_5_vl")
    inputs = tiny_video.make_inputs(model, [[tiny_video.Film(6), tiny_video.Picture((30, 70))], [tiny_video.Picture()]])
    options = dict(max_new_tokens=6, do_sample=False, suppress_tokens=[tiny_video.IMAGE, tiny_video.VIDEO], **SCORED)
    stock = model.generate(**inputs, **options)
    with attach(model, SnapKV(1.0)):
        assert torch.equal(model.generate(**inputs, **options).sequences, stock.sequences)
    with attach(model, SnapKV({"image": 0.3, "video": 0.2, "text": 0.8}, recent=3)) as attached:
        cache = attached.cache()
        got = model.generate(**inputs, past_key_values=cache, **options)
    width = inputs["input_ids"].shape[1]
    kept = kept_columns(cache)
    for number, share in ((tiny_video.IMAGE, 0.3), (tiny_video.VIDEO, 0.2)):
        of_kind = inputs["input_ids"] == number
        for row in range(2):
            count = keep_count(int(of_kind[row].sum()), share) if of_kind[row].any() else 0
            assert (kept[0][row, :, :width] & of_kind[row]).sum(-1).eq(count).all()
    with dense(model, {i: k[..., :width] for i, k in kept.items()}, width):
        want = model.generate(**inputs, **options)
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.scores, want.scores):
        torch.testing.assert_close(a, b, **NEAR)
    assert not torch.allclose(got.scores[1], stock.scores[1], atol=1e-2)


def test_tokens_reduced_before_the_language_model_are_compressed_in_its_cache():
    """wrap() shortens the prompt, the plan then drops slots of what is left: as if the picture had been that small."""
    model = llava()
    inputs = make_inputs(model, [[(24, 24)], [(24, 24)] * 2])
    options = dict(max_new_tokens=6, do_sample=False, suppress_tokens=[IMAGE])
    short = mmcompress.compress(model, inputs, image=Uniform(0.5))["attention_mask"].sum(1)
    wrapped = mmcompress.wrap(model, image=Uniform(0.5))
    before = wrapped.generate(**inputs, **options)
    with attach(model, SnapKV({"image": 0.5}, recent=3)) as attached:
        cache = attached.cache()
        turns(wrapped, cache, [inputs])
        wrapped.generate(**inputs, **options)
    kept = kept_columns(cache)
    assert (short - kept[0][:, 0].sum(-1)).tolist() == [9, 18]          # half of the half of 36 tokens a picture
    with dense(model, kept, kept[0].shape[-1]):
        want = wrapped.generate(**inputs, **options)
    with attach(model, SnapKV({"image": 0.5}, recent=3)):
        assert torch.equal(wrapped.generate(**inputs, **options), want)
    assert torch.equal(wrapped.generate(**inputs, **options), before)
    wrapped.remove()


def test_tokens_dropped_between_layers_are_refused():
    model = llava()
    with mmcompress.wrap(model, layers=[FastV(1, 0.5)]) as wrapped, attach(model, SnapKV(0.5, recent=3)), \
            pytest.raises(UnsupportedModelError, match="before the language model"):
        wrapped.generate(**make_inputs(model, [[(24, 24)]]), max_new_tokens=3)


# attaching ------------------------------------------------------------------------------------------------------------
class Hidden(KNorm):
    needs = ("hidden",)


@pytest.mark.parametrize("make", [tiny_model, lambda: tiny_model("gemma3", "eager"), llava])
def test_detach_leaves_nothing_behind(make):
    model = make()
    state = lambda: (dict(vars(model)), model.config.to_dict(), {name: c._attn_implementation for name, c in configs(model)},  # noqa: E731
                     [(name, len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in vars(m))
                      for name, m in model.named_modules()])
    before, logits = state(), model(words(1, 12)).logits
    attached = attach(model, Hidden(0.5))
    assert state() != before and "mmcompress" in model.config.get_text_config()._attn_implementation
    model.generate(words(1, 12), max_new_tokens=3)
    with pytest.raises(WrapError, match=r"detach\(model\)"):
        attach(model, KNorm(0.5))
    detach(model)
    assert state() == before and torch.equal(model(words(1, 12)).logits, logits)
    attached.detach()                                       # again: nothing to undo
    detach(model)
    assert state() == before


def configs(model):
    yield "model", model.config
    yield "text", model.config.get_text_config()
    if hasattr(model.config, "vision_config"):
        yield "vision", model.config.vision_config


def test_other_models_of_the_class_are_left_alone():
    one, other = tiny_model(), tiny_model()
    with attach(one, KNorm(0.5)):
        twin = copy.deepcopy(one)
        made = [m.generate(words(1, 12), max_new_tokens=3, **SCORED).past_key_values for m in (one, other, twin)]
    assert [type(cache) for cache in made] == [CompressedCache, DynamicCache, CompressedCache]
    detach(twin)
    assert type(twin.generate(words(1, 12), max_new_tokens=3, **SCORED).past_key_values) is DynamicCache


def test_a_model_without_a_compressed_cache_runs_as_ever_while_attached():
    """Training, and calls with a cache of the caller's own."""
    model = tiny_model()
    ids = words(2, 12)
    want = model(ids, labels=ids, use_cache=False)
    want.loss.backward()
    gradient, stock = model.lm_head.weight.grad.clone(), DynamicCache(config=model.config)
    model.zero_grad()
    with attach(model, KNorm(0.5)):
        got = model(ids, labels=ids, use_cache=False)
        got.loss.backward()
        turns(model, stock, [dict(input_ids=ids)])
    assert torch.equal(got.logits, want.logits) and torch.equal(model.lm_head.weight.grad, gradient)
    assert stock.layers[0].keys.shape[2] == 12


def test_models_it_cannot_stand_on_are_refused():
    model = tiny_model()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="attn_implementation='sdpa'"):
        attach(model, KNorm(0.5))
    model.config._attn_implementation = "sdpa"
    with pytest.raises(UnsupportedModelError, match="language head"):
        attach(model.model, RazorAttention())
