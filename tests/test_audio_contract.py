"""What every method and every adapter of recordings gets free: ARCHITECTURE's list, on tiny models of the real classes."""

import copy

import pytest
import torch
import transformers
from conftest import AUDIO_METHODS, audio_reducer
from tiny_audio import (
    AUDIO,
    FAMILIES,
    FilmWithSound,
    Recording,
    build,
    greedy_reference,
    make_inputs,
    row_of,
    rows_for,
    tokens_of,
)
from tiny_video import IMAGE, VIDEO, Film, Picture

import mmcompress
from mmcompress import UnsupportedModelError, WrapConfig, WrapError
from mmcompress.audio import MeanPool, Stride
from mmcompress.registry import reducer_class

MODELS = {}
GREEDY = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, suppress_tokens=[AUDIO, IMAGE, VIDEO])
OMNI = "qwen2_5_omni_thinker"


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny(request.param)


@pytest.fixture(params=AUDIO_METHODS)
def method(request):
    return request.param


def tiny(family):
    return MODELS.setdefault(family, build(family))


def skip_if_refused(model, method):
    """Merging inside the encoder needs one of Whisper's shape; that it is refused elsewhere is tested by itself."""
    if reducer_class("audio", method).in_encoder and model.config.model_type == OMNI:
        pytest.skip("refused, see test_merging_is_refused_in_an_encoder_of_another_shape")


def config(method, keep=0.4, **options):
    return WrapConfig(audio=audio_reducer(method, keep), **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_keep_one_is_bit_identical(model, method, side):
    skip_if_refused(model, method)
    inputs = make_inputs(model, rows_for(model.config.model_type), side)
    stock = model(**inputs)
    with mmcompress.wrap(model, config(method, 1.0)) as w:
        assert torch.equal(w(**inputs).logits, stock.logits)
        assert [i.after for i in w.last] == [i.before for i in w.last]
    if side == "left":
        expected = model.generate(**inputs, **GREEDY)
        with mmcompress.wrap(model, config(method, 1.0)) as w:
            assert torch.equal(w.generate(**inputs, **GREEDY), expected)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with mmcompress.wrap(model, config(method, 1.0)) as w:
        assert torch.equal(w(**inputs, labels=labels).loss, model_loss(model, w, inputs, labels))


def model_loss(model, w, inputs, labels):
    with w.disable():
        return model(**inputs, labels=labels).loss


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_single(model, method, side):
    skip_if_refused(model, method)
    rows = rows_for(model.config.model_type)
    inputs = make_inputs(model, rows, side)
    with mmcompress.wrap(model, config(method)) as w:
        out = w(**inputs).logits
        lengths = (w.prompt.column >= 0).sum(1).tolist()
        spans = w.last.spans
        for i in range(len(rows)):
            alone = w(**row_of(model, inputs, rows, i)).logits[0]
            mine = out[i, -len(alone):] if side == "left" else out[i, :len(alone)]
            if rows[i]:
                assert len(alone) == lengths[i]
                assert all(any(torch.equal(s, t) for t in spans) for s in w.last.spans)
                torch.testing.assert_close(mine, alone, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_equals_a_greedy_loop_without_cache(model, method, side):
    skip_if_refused(model, method)
    rows = rows_for(model.config.model_type)
    inputs, chosen = make_inputs(model, rows, side), config(method)
    with mmcompress.wrap(model, chosen) as w:
        out = w.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        heard = [i for i in w.last if i.modality == "audio"]
        assert [i.before for i in heard] == [tokens_of(model, r.frames) for row in rows for r in row
                                             if isinstance(r, Recording)]
        assert all(i.after == chosen.audio.count(i.layout) < i.before for i in heard)
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
    skip_if_refused(model, method)
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
            assert torch.equal(w.generate(**inputs, **GREEDY, num_beams=3, prefill_chunk_size=7), beams)
        ids = torch.cat([first.sequences, first.sequences[:, -4:].flip(1)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(n, 8, dtype=torch.long)], 1)
        size = first.past_key_values.get_seq_length()
        second = w.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
        assert size < inputs["input_ids"].shape[1]
        if not w.config.audio.reads_question:       # asked again, the words of both turns would choose other tokens
            assert torch.equal(second, w.generate(**{**inputs, "input_ids": ids, "attention_mask": mask}, **GREEDY))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_recording_in_a_later_turn_equals_one_fresh_prompt(family):
    model = tiny(family)
    once, again = make_inputs(model, [[Recording(90)]], seed=3), make_inputs(model, [[Recording(150), Recording(80)]], seed=4)
    with mmcompress.wrap(model, config("mean_pool", positions="closed")) as w:
        first = w.generate(**once, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, again["input_ids"]], 1)
        call = {k: v for k, v in again.items() if k not in ("input_ids", "attention_mask")}
        second = w.generate(**call, input_ids=ids, attention_mask=torch.ones_like(ids),
                            past_key_values=first.past_key_values, **GREEDY)
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name in {*once, *again} - {"input_ids", "attention_mask"}:
            both[name] = torch.cat([x[name] for x in (once, again) if name in x])
        assert torch.equal(second, w.generate(**both, **GREEDY))


def test_decoding_by_hand_goes_on_at_the_right_position(model):
    """forward with a recording, then forward token by token with the cache: what generate says."""
    inputs = make_inputs(model, [[Recording(160)]])
    with mmcompress.wrap(model, config("mean_pool", positions="closed")) as w:
        expected = w.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, -4:].tolist()
        out = w(**inputs, use_cache=True)
        got = [int(out.logits[0, -1].argmax())]
        mask = inputs["attention_mask"]
        for _ in range(3):
            mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], 1)
            out = w(input_ids=torch.tensor([[got[-1]]]), attention_mask=None if w.adapter.mrope else mask,
                    past_key_values=out.past_key_values)
            got.append(int(out.logits[0, -1].argmax()))
    assert got == expected


def test_remove_leaves_nothing(model, method):
    skip_if_refused(model, method)
    rows = rows_for(model.config.model_type)
    before = {k: id(v) for k, v in model.__dict__.items()}
    inputs = make_inputs(model, rows)
    stock = model(**inputs).logits
    w = mmcompress.wrap(model, config(method))
    w.generate(**inputs, max_new_tokens=2, do_sample=False)
    w(**inputs)
    assert w.remove() is model
    assert {k: id(v) for k, v in model.__dict__.items()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(**inputs).logits, stock)
    with pytest.raises(WrapError, match=r"was removed"):
        w(**inputs)


def test_gradients_reach_the_projector(model, method):
    skip_if_refused(model, method)
    inputs = make_inputs(model, [[Recording()], [Recording(99), Recording(120)]], "right")
    ids = inputs["input_ids"]
    labels = ids.masked_fill((ids == AUDIO) | (inputs["attention_mask"] == 0), -100)
    model = copy.deepcopy(model)
    with mmcompress.wrap(model, config(method)) as w:
        loss = w(**inputs, labels=labels).loss
    loss.backward()
    part = model.model.audio_tower.proj if model.config.model_type == OMNI else model.model.multi_modal_projector
    grads = [p.grad for p in part.parameters() if p.grad is not None]
    assert torch.isfinite(loss)
    assert grads and all(torch.isfinite(g).all() for g in grads) and sum(g.abs().sum() for g in grads) > 0


def test_bf16_and_eager(model, method):
    skip_if_refused(model, method)
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
    with mmcompress.wrap(model, config("mean_pool")) as w:
        expected = w(**inputs).logits
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, expected)
        model.gradient_checkpointing_enable()
        model.train()
        w(**inputs, labels=inputs["input_ids"]).loss.backward()
        model.gradient_checkpointing_disable()
        model.eval()
    add_hook_to_module(model, ModelHook())
    with mmcompress.wrap(model, config("mean_pool")):
        assert torch.equal(model(**inputs).logits, expected)
    remove_hook_from_module(model)
    tuned = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj", r=2))
    with mmcompress.wrap(tuned, config("mean_pool")):
        assert torch.equal(tuned(**inputs).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pure_form(family):
    model = tiny(family)
    inputs = make_inputs(model, rows_for(family))
    pure = mmcompress.compress(model, inputs, audio=MeanPool(keep=0.3))
    assert "input_features" not in pure
    with mmcompress.wrap(model, audio=MeanPool(keep=0.3)) as w:
        expected = w(**inputs).logits
        generated = w.generate(**inputs, **GREEDY)
    assert torch.equal(model(**pure).logits, expected)
    assert torch.equal(model.generate(**pure, **GREEDY)[:, -4:], generated[:, -4:])


def test_pictures_clips_and_recordings_of_one_prompt_each_by_its_own_reducer():
    model = tiny(OMNI)
    rows = [[Picture((16, 24)), Recording(120), Film(6, (16, 24))], [], [Film(4, (24, 24)), Recording(60)]]
    for side in ("left", "right"):
        inputs = make_inputs(model, rows, side)
        chosen = WrapConfig(image="uniform", video="evs", audio=MeanPool(keep=0.5))
        with mmcompress.wrap(model, chosen) as w:
            out = w.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
            assert [i.modality for i in w.last] == ["image", "video", "video", "audio", "audio"]
            assert all(i.after == chosen.reducers[i.modality].count(i.layout) for i in w.last)
        for i in (0, 2):
            assert torch.equal(out[i, -4:], greedy_reference(model, row_of(model, inputs, rows, i), chosen, 4))


@pytest.mark.parametrize("name", AUDIO_METHODS)
def test_sound_between_the_frames_of_its_clip(name):
    """`use_audio_in_video`: video and audio placeholders in turn; every kept token stays in its place between the others."""
    model = tiny(OMNI)
    skip_if_refused(model, name)
    rows = [[FilmWithSound()], [], [FilmWithSound(Film(4, (16, 16)), Recording(77))]]
    inputs = make_inputs(model, rows)
    chosen = WrapConfig(video="spatio_temporal_merge", audio=audio_reducer(name, 0.4))
    with mmcompress.wrap(model, WrapConfig(video={"name": "evs", "keep": 1.0}, audio=audio_reducer(name, 1.0))) as w:
        assert torch.equal(w(**inputs).logits, model_logits(model, w, inputs))
    with mmcompress.wrap(model, chosen) as w:
        out = w.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert {i.modality for i in w.last} == {"video", "audio"}
    for i in (0, 2):
        assert torch.equal(out[i, -4:], greedy_reference(model, row_of(model, inputs, rows, i), chosen, 4))


def model_logits(model, w, inputs):
    with w.disable():
        return model(**inputs).logits


@pytest.mark.parametrize("name", [n for n in AUDIO_METHODS if reducer_class("audio", n).in_encoder])
def test_merging_is_refused_in_an_encoder_of_another_shape(name):
    model = tiny(OMNI)
    with pytest.raises(UnsupportedModelError, match=r"encoder.*SpectralPool"), mmcompress.wrap(model, config(name)) as w:
        w(**make_inputs(model, [[Recording()]]))


def test_spans_tile_the_recording_where_nothing_is_dropped():
    model = tiny("qwen2_audio")
    inputs = make_inputs(model, [[Recording(160)], [Recording(77)]])
    with mmcompress.wrap(model, audio=MeanPool(keep=0.3)) as w:
        w(**inputs)
        for item, spans in zip(w.last, w.last.spans, strict=True):
            assert spans[0, 0] == 0 and spans[-1, 1] == pytest.approx(item.layout.seconds) == item.before / 25
            torch.testing.assert_close(spans[1:, 0], spans[:-1, 1])
    with mmcompress.wrap(model, audio=Stride(keep=0.3)) as w:                           # dropped tokens have no span
        w(**inputs)
        for item, spans in zip(w.last, w.last.spans, strict=True):
            torch.testing.assert_close(spans[:, 1] - spans[:, 0], torch.full((item.after,), 1 / 25))
            torch.testing.assert_close(spans[:, 0] * 25, item.index.float())


def test_the_cache_is_as_small_as_the_report_says(model):
    inputs = make_inputs(model, rows_for(model.config.model_type))
    with mmcompress.wrap(model, audio=MeanPool(keep=0.3)) as w:
        held = w(**inputs, use_cache=True).past_key_values
        assert sum(layer.keys.nbytes + layer.values.nbytes for layer in held.layers) == w.report.kv_bytes_after
        assert w.report.kv_bytes_after < w.report.kv_bytes_before


def test_what_does_not_fit_says_so():
    model = tiny("qwen2_audio")
    inputs = make_inputs(model, [[Recording()]])
    with mmcompress.wrap(model, audio=Stride(keep=0.5)) as w:
        more = torch.cat([inputs["input_ids"], torch.full((1, 1), AUDIO)], 1)
        with pytest.raises(ValueError, match=r"audio placeholders too many.*input_features"):
            w(**{**inputs, "input_ids": more, "attention_mask": None})
        with pytest.raises(ValueError, match=r"without feature_attention_mask"):
            w(input_ids=inputs["input_ids"], input_features=inputs["input_features"])
        ids = inputs["input_ids"]
        legacy = torch.cat([ids[:, :ids[0].tolist().index(AUDIO) + 1], ids[:, -3:]], 1)         # one placeholder a recording
        with pytest.raises(ValueError, match=r"audio placeholders too many"):
            w(**{**inputs, "input_ids": legacy, "attention_mask": torch.ones_like(legacy)})
    with pytest.raises(UnsupportedModelError, match=r"sees no pictures.*image="):
        mmcompress.wrap(model, image="uniform")
    with pytest.raises(UnsupportedModelError, match=r"reads no clips"):
        mmcompress.wrap(model, video="evs")
    with pytest.raises(ValueError, match=r"time spans"):
        with mmcompress.wrap(tiny(OMNI), image="uniform") as w:
            w(**make_inputs(tiny(OMNI), [[Picture((16, 24))]]))
        _ = w.last[0].spans
    flamingo = tiny("audioflamingo3")
    inputs = make_inputs(flamingo, [[Recording(430)]])
    with mmcompress.wrap(flamingo, audio=Stride(keep=0.5)) as w, pytest.raises(ValueError, match=r"whole number of windows"):
        w(**{**inputs, "input_ids": inputs["input_ids"].clone().index_fill(1, torch.tensor([20]), AUDIO + 1 - 10)})
