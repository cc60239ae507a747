"""What every method and every adapter of clips gets free: ARCHITECTURE's list, on tiny models of the real classes."""

import copy

import pytest
import torch
import transformers
from conftest import METHODS, VIDEO_METHODS, video_reducer
from tiny_video import FAMILIES, IMAGE, VIDEO, Film, Picture, build, greedy_reference, make_inputs, row_of, rows_for

import mmcompress
from mmcompress import SignalError, UnsupportedModelError, WrapConfig, WrapError
from mmcompress.image import Uniform
from mmcompress.registry import reducer_class
from mmcompress.video import SpatioTemporalMerge

MODELS = {}
GREEDY = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, suppress_tokens=[IMAGE, VIDEO])


@pytest.fixture(params=FAMILIES)
def model(request):
    if request.param not in MODELS:
        MODELS[request.param] = build(request.param)
    return MODELS[request.param]


@pytest.fixture(params=VIDEO_METHODS)
def method(request):
    return request.param


def config(method, keep=0.3, **options):
    return WrapConfig(image=Uniform(keep=0.5 if keep != 1.0 else 1.0), video=video_reducer(method, keep), **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_keep_one_is_bit_identical(model, method, side):
    rows = rows_for(model.config.model_type)
    inputs = make_inputs(model, rows, side)
    stock = model(**inputs)
    with mmcompress.wrap(model, config(method, 1.0)) as w:
        assert torch.equal(w(**inputs).logits, stock.logits)
        assert [i.after for i in w.last] == [i.before for i in w.last]
    if side == "left":
        expected = model.generate(**inputs, **GREEDY)
        with mmcompress.wrap(model, config(method, 1.0)) as w:
            assert torch.equal(w.generate(**inputs, **GREEDY), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_single(model, method, side):
    rows = rows_for(model.config.model_type)
    inputs = make_inputs(model, rows, side)
    with mmcompress.wrap(model, config(method)) as w:
        out = w(**inputs).logits
        lengths = (w.prompt.column >= 0).sum(1).tolist()
        for i in range(len(rows)):
            alone = w(**row_of(model, inputs, rows, i)).logits[0]
            assert len(alone) == lengths[i]
            mine = out[i, -lengths[i]:] if side == "left" else out[i, :lengths[i]]
            torch.testing.assert_close(mine, alone, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_equals_a_greedy_loop_without_cache(model, method, side):
    rows = rows_for(model.config.model_type)
    inputs, chosen = make_inputs(model, rows, side), config(method)
    with mmcompress.wrap(model, chosen) as w:
        out = w.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        budgets = [i.after for i in w.last if i.modality == "video"]
        assert budgets == [chosen.video.count(i.layout) for i in w.last if i.modality == "video"]
        assert all(b < i.before for b, i in zip(budgets, (i for i in w.last if i.modality == "video")))
    length = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :length], inputs["input_ids"])
    for i, row in enumerate(rows):
        single = row_of(model, inputs, rows, i)
        if row:
            assert torch.equal(out[i, length:], greedy_reference(model, single, chosen, 4)), i
        else:
            stock = model.generate(**single, max_new_tokens=4, do_sample=False, eos_token_id=None)
            assert torch.equal(out[i, length:], stock[0, -4:])


def test_beams_samples_caches_and_a_second_turn(model, method):
    """Beams equal rows alone; static cache equals dynamic; turn two on the cache equals one prompt from scratch."""
    rows = rows_for(model.config.model_type)
    inputs, n = make_inputs(model, rows), len(rows)
    with mmcompress.wrap(model, config(method)) as w:
        beams = w.generate(**inputs, num_beams=3, **GREEDY)
        for i in range(n):
            alone = w.generate(**row_of(model, inputs, rows, i), num_beams=3, **GREEDY)
            assert torch.equal(beams[i, -4:], alone[0, -4:])
        torch.manual_seed(0)
        samples = w.generate(**inputs, **{**GREEDY, "do_sample": True}, num_return_sequences=2)
        assert torch.equal(samples[::2, :inputs["input_ids"].shape[1]], inputs["input_ids"])
        first = w.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        assert torch.equal(w.generate(**inputs, **GREEDY, cache_implementation="static"), first.sequences)
        if hasattr(transformers.generation.utils, "_slice_mm_encoder_output"):                  # not before 5.23
            assert torch.equal(w.generate(**inputs, **GREEDY, prefill_chunk_size=7), first.sequences)
        ids = torch.cat([first.sequences, first.sequences[:, -4:].flip(1)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(n, 8, dtype=torch.long)], 1)
        size = first.past_key_values.get_seq_length()
        second = w.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
        assert size < inputs["input_ids"].shape[1]
        whole = {**inputs, "input_ids": ids, "attention_mask": mask}
        if "mm_token_type_ids" in whole:
            whole["mm_token_type_ids"] = torch.where(ids == IMAGE, 1, torch.where(ids == VIDEO, 2, 0))
        assert torch.equal(second, w.generate(**whole, **GREEDY))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_clip_in_a_later_turn_equals_one_fresh_prompt(family):
    """A conversation on the reduced cache, with a clip in either turn, against the same conversation as one prompt."""
    model = MODELS.setdefault(family, build(family))
    once = make_inputs(model, [[Film()]], seed=3)
    again = make_inputs(model, [[Film(), Picture()]], seed=4)
    with mmcompress.wrap(model, config("spatio_temporal_merge", positions="closed")) as w:
        first = w.generate(**once, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, again["input_ids"]], 1)
        call = {k: v for k, v in again.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
        second = w.generate(**call, input_ids=ids, attention_mask=torch.ones_like(ids),
                            past_key_values=first.past_key_values, **GREEDY)
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name in {*once, *again} - {"input_ids", "attention_mask", "mm_token_type_ids", "batch_num_images"}:
            parts = [x[name] for x in (once, again) if name in x]
            both[name] = torch.cat(parts)
        if "mm_token_type_ids" in once:
            both["mm_token_type_ids"] = torch.where(ids == IMAGE, 1, torch.where(ids == VIDEO, 2, 0))
        assert torch.equal(second, w.generate(**both, **GREEDY))
        # and a third turn, of text alone, on what the second left
        third = w.generate(**once, **GREEDY, return_dict_in_generate=True)
        more = torch.cat([third.sequences, again["input_ids"][:, :3]], 1)
        out = w.generate(input_ids=more, attention_mask=torch.ones_like(more), past_key_values=third.past_key_values, **GREEDY)
        whole = {**once, "input_ids": more, "attention_mask": torch.ones_like(more)}
        if "mm_token_type_ids" in once:
            whole["mm_token_type_ids"] = torch.where(more == IMAGE, 1, torch.where(more == VIDEO, 2, 0))
        assert torch.equal(out, w.generate(**whole, **GREEDY))


def test_decoding_by_hand_goes_on_at_the_right_position(model):
    """forward with a clip, then forward token by token with the cache: what generate says (M-RoPE models add rope_deltas)."""
    inputs = make_inputs(model, [[Picture(), Film(8, (16, 24))]])
    with mmcompress.wrap(model, config("spatio_temporal_merge", positions="closed")) as w:
        expected = w.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, -4:].tolist()
        out = w(**inputs, use_cache=True)
        got = [int(out.logits[0, -1].argmax())]
        mask = inputs["attention_mask"]
        for _ in range(3):
            mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], 1)
            # Qwen2.5-VL takes no mask here: it would make a position of each of its columns
            out = w(input_ids=torch.tensor([[got[-1]]]), attention_mask=None if w.adapter.mrope else mask,
                    past_key_values=out.past_key_values)
            got.append(int(out.logits[0, -1].argmax()))
    assert got == expected


def test_remove_leaves_nothing(model, method):
    rows = rows_for(model.config.model_type)
    before = {k: id(v) for k, v in model.__dict__.items()}
    inputs = make_inputs(model, rows)
    stock = model(**inputs).logits
    w = mmcompress.wrap(model, config(method))
    w.generate(**inputs, max_new_tokens=2, do_sample=False)
    w(**inputs)
    assert w.remove() is model
    assert {k: id(v) for k, v in model.__dict__.items()} == before
    assert not any(m._forward_hooks for name, m in model.named_modules() if name.endswith("_proj"))
    assert torch.equal(model(**inputs).logits, stock)
    with pytest.raises(WrapError, match=r"was removed"):
        w(**inputs)


def test_gradients_reach_the_projector(model, method):
    inputs = make_inputs(model, [[Film()], [Picture(), Film()]], "right")
    ids = inputs["input_ids"]
    labels = ids.masked_fill((ids == IMAGE) | (ids == VIDEO) | (inputs["attention_mask"] == 0), -100)
    model = copy.deepcopy(model)
    with mmcompress.wrap(model, WrapConfig(video=video_reducer(method, 0.4))) as w:
        w(**inputs, labels=labels).loss.backward()
    part = model.model.visual.merger if hasattr(model.model, "visual") else model.model.multi_modal_projector
    grads = [p.grad for p in part.parameters() if p.grad is not None]
    assert grads and all(torch.isfinite(g).all() for g in grads) and sum(g.abs().sum() for g in grads) > 0


def test_bf16_and_eager(model, method):
    family = model.config.model_type
    rows = rows_for(family)
    for options in (dict(dtype=torch.bfloat16), dict(attn_implementation="eager")):
        other = build(family, **options)
        inputs = make_inputs(other, rows)
        with mmcompress.wrap(other, config(method)) as w:
            assert torch.isfinite(w(**inputs).logits).all()
            out = w.generate(**inputs, **GREEDY)
            assert out.shape[1] == inputs["input_ids"].shape[1] + 4
    with mmcompress.wrap(model, config(method)) as w:                                   # eager says what SDPA says
        sdpa = w(**(inputs := make_inputs(model, rows))).logits
        lengths = (w.prompt.column >= 0)
    with mmcompress.wrap(other, config(method)) as w:
        torch.testing.assert_close(w(**inputs).logits[lengths], sdpa[lengths], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_accelerate_checkpointing_and_copies(family):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
    from peft import LoraConfig, get_peft_model
    model = build(family)
    inputs = make_inputs(model, rows_for(family), "right")
    with mmcompress.wrap(model, config("spatio_temporal_merge")) as w:
        expected = w(**inputs).logits
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, expected)
        model.gradient_checkpointing_enable()
        model.train()
        w(**inputs, labels=inputs["input_ids"]).loss.backward()
        model.gradient_checkpointing_disable()
        model.eval()
    add_hook_to_module(model, ModelHook())
    with mmcompress.wrap(model, config("spatio_temporal_merge")):
        assert torch.equal(model(**inputs).logits, expected)
    remove_hook_from_module(model)
    tuned = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj", r=2))
    with mmcompress.wrap(tuned, config("spatio_temporal_merge")):
        assert torch.equal(tuned(**inputs).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_image_reducers_work_on_their_pictures(family):
    """All registered ones, but for those that read a [CLS] token where the tower has none."""
    model = MODELS.setdefault(family, build(family))
    inputs = make_inputs(model, [[Picture((30, 70))], [Film(), Picture()]])
    for name in METHODS:
        reducer = reducer_class("image", name)(keep=0.4)
        needs_cls = name in ("cls_topk", "visionzip") and family in ("llava_onevision", "qwen2_5_vl")
        with mmcompress.wrap(model, image=reducer) as w:
            if needs_cls:
                with pytest.raises(SignalError, match=r"\[CLS\]"):
                    w(**inputs)
                continue
            assert torch.isfinite(w(**inputs).logits).all(), name
            pictures = [i for i in w.last if i.modality == "image"]
            assert pictures and all(i.after == int(0.4 * i.before + 1e-9) for i in pictures), name
            assert all(i.after == i.before for i in w.last if i.modality == "video")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pure_form(family):
    model = MODELS.setdefault(family, build(family))
    inputs = make_inputs(model, rows_for(family))
    pure = mmcompress.compress(model, inputs, video=SpatioTemporalMerge(keep=0.3))
    assert not {"pixel_values", "pixel_values_videos"} & set(pure)
    with mmcompress.wrap(model, video=SpatioTemporalMerge(keep=0.3)) as w:
        assert torch.equal(model(**pure).logits, w(**inputs).logits)
    assert mmcompress.compress(model, row_of(model, inputs, rows_for(family), 2), video="evs").keys() >= {"input_ids"}


def test_layers_before_and_behind_a_video_reducer():
    """FastV inside the language model drops clips' tokens as it drops pictures'."""
    model = MODELS.setdefault("llava_next_video", build("llava_next_video"))
    inputs = make_inputs(model, rows_for("llava_next_video"))
    with mmcompress.wrap(model, video=SpatioTemporalMerge(keep=0.5), layers=[{"name": "fastv", "layer": 1, "keep": 0.5}]) as w:
        assert torch.isfinite(w(**inputs).logits).all()
        clips = [i for i in w.last if i.modality == "video"]
        assert all(i.after == 18 and i.at(1).after == 9 for i in clips)


@pytest.mark.parametrize("options, message", [
    (dict(family="qwen2_5_vl", layers=[{"name": "fastv", "layer": 1}]), r"rotary positions; use image=... and video"),
    (dict(family="internvl", layers=[{"name": "fastv", "layer": 1}]), r"frames stand between text"),
    (dict(family="llava_next_video", layers=[{"name": "in_layer", "layer": 1}]), r"InLayer reduces pictures"),
])
def test_what_does_not_work_says_so(options, message):
    family = options["family"]
    model = MODELS.setdefault(family, build(family))
    with pytest.raises(UnsupportedModelError, match=message), mmcompress.wrap(model, layers=options["layers"]) as w:
        w(**make_inputs(model, rows_for(family)))


def test_a_model_without_clips_refuses_them():
    from tiny import llava_next
    with pytest.raises(UnsupportedModelError, match=r"reads no clips.*llava_next_video"):
        mmcompress.wrap(llava_next(), video="evs")


def test_placeholders_and_pixels_must_match():
    model = MODELS.setdefault("qwen2_5_vl", build("qwen2_5_vl"))
    inputs = make_inputs(model, [[Film()]])
    with mmcompress.wrap(model, video="evs") as w:
        with pytest.raises(ValueError, match=r"video placeholders too many"):
            w(**{**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.full((1, 1), VIDEO)], 1), "attention_mask": None})
        with pytest.raises(ValueError, match=r"without video_grid_thw"):
            w(**{k: v for k, v in inputs.items() if k != "video_grid_thw"})
    other = MODELS.setdefault("internvl", build("internvl"))
    inputs = make_inputs(other, [[Film()]])
    with mmcompress.wrap(other, video="evs") as w, pytest.raises(ValueError, match=r"no multiple of the 36"):
        w(**{**inputs, "input_ids": inputs["input_ids"][:, :-20], "attention_mask": None, })
