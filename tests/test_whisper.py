"""Whisper: the decoder attends to fewer encoder states, in every way of calling it."""

import copy

import pytest
import torch
from conftest import AUDIO_METHODS, audio_reducer
from tiny_audio import BINS, STATES, mel, whisper
from transformers.modeling_outputs import BaseModelOutput

import mmcompress
from mmcompress import SignalError, UnsupportedModelError, WrapConfig, WrapError
from mmcompress.audio import MeanPool, Stride
from mmcompress.audio.base import sound_budget
from mmcompress.layout import AudioLayout
from mmcompress.registry import reducer_class

MODEL = whisper()
FRAMES = (200, 121, 38)
ASKING = {name for name in AUDIO_METHODS if reducer_class("audio", name).reads_question}     # need a question in the prompt
HEARING = [name for name in AUDIO_METHODS if name not in ASKING]


def windows(frames=FRAMES, seed=0, dtype=torch.float32):
    """Spectrograms of recordings of these lengths, padded with digital silence as the feature extractor pads. (B, BINS, 200)"""
    g = torch.Generator().manual_seed(seed)
    pad = lambda x: torch.nn.functional.pad(x, (0, 2 * STATES - x.shape[1]), value=-1.5)  # noqa: E731
    return torch.stack([pad(mel(n, g)) for n in frames]).to(dtype)


def decode(model, **call):
    return model.generate(**{"max_new_tokens": 6, "eos_token_id": None, **call})


@pytest.fixture(params=HEARING)
def method(request):
    return request.param


def test_keep_one_is_bit_identical(method):
    x, ids = windows(), torch.tensor([[1, 5, 9]] * 3)
    stock, out = MODEL(input_features=x, decoder_input_ids=ids).logits, decode(MODEL, input_features=x)
    with mmcompress.wrap(MODEL, audio=audio_reducer(method, 1.0)) as w:
        assert torch.equal(w(input_features=x, decoder_input_ids=ids).logits, stock)
        assert torch.equal(decode(w, input_features=x), out)
        assert [i.after for i in w.last] == [STATES] * 3


def test_forward_and_generate_read_the_same_fewer_states(method):
    """Greedy decoding by hand on states reduced row by row, without wrap, cache or generate."""
    x, k = windows(), STATES // 2
    with mmcompress.wrap(MODEL, audio=audio_reducer(method, 0.5)) as w:
        out = decode(w, input_features=x)
        assert [i.after for i in w.last] == [k] * 3
        states = w(input_features=x, decoder_input_ids=out[:, :1]).encoder_last_hidden_state
        assert states.shape[1] == k
        alone = [w(input_features=row[None], decoder_input_ids=out[:1, :1]).encoder_last_hidden_state for row in x]
    torch.testing.assert_close(states, torch.cat(alone), atol=1e-5, rtol=1e-4)
    ids = torch.ones(3, 1, dtype=torch.long)
    for _ in range(6):
        logits = MODEL(encoder_outputs=BaseModelOutput(last_hidden_state=states), decoder_input_ids=ids).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(ids[:, -6:], out[:, -6:])


def test_beams_samples_static_cache_and_the_cache_is_smaller(method):
    x, k = windows(), STATES // 2
    with mmcompress.wrap(MODEL, audio=audio_reducer(method, 0.5)) as w:
        beams = decode(w, input_features=x, num_beams=3)
        for i in range(3):
            assert torch.equal(decode(w, input_features=x[i:i + 1], num_beams=3)[0], beams[i])
        torch.manual_seed(0)
        assert len(decode(w, input_features=x, do_sample=True, num_return_sequences=2)) == 6
        assert torch.equal(decode(w, input_features=x, cache_implementation="static"), decode(w, input_features=x))
        held = w(input_features=x, decoder_input_ids=torch.ones(3, 1, dtype=torch.long), use_cache=True).past_key_values
        keys = [layer.keys for layer in held.cross_attention_cache.layers]
        assert all(layer.shape[2] == k for layer in keys)
        assert sum(2 * layer.nbytes for layer in keys) == w.report.kv_bytes_after == w.report.kv_bytes_before // 2


def test_long_recordings_are_windows_of_one_call():
    """A recording of three windows: one record of all of them; with timestamps, which long recordings need."""
    g = torch.Generator().manual_seed(1)
    model = copy.deepcopy(MODEL)
    model.generation_config.no_timestamps_token_id, model.generation_config.max_initial_timestamp_index = 70, None
    long = mel(520, g)[None]
    with mmcompress.wrap(model, audio=MeanPool(keep=0.5)) as w:
        w.generate(input_features=long, attention_mask=torch.ones(1, 520, dtype=torch.long), return_timestamps=True,
                   max_new_tokens=4)
        assert len(w.last) >= 3 and all(i.after == STATES // 2 for i in w.last)
        assert len(w.report.items) == len(w.last) and "encode" in w.report.milliseconds
        with pytest.raises(ValueError, match=r"return_token_timestamps.*disable"):
            w.generate(input_features=long, return_token_timestamps=True)


def test_the_silence_behind_a_recording_is_seen_and_thinned_out_evenly():
    x = windows()
    with mmcompress.wrap(MODEL, audio=Stride(keep=0.3)) as w:
        decode(w, input_features=x)
        assert [i.layout for i in w.last] == [AudioLayout(STATES, 50, n) for n in (100, 61, 19)]
        for item in w.last:
            heard = int((item.index < item.layout.sound).sum())
            assert heard == sound_budget(item.layout, item.after)[0] == round(0.3 * item.layout.sound)
    silence = torch.full((1, BINS, 2 * STATES), -1.5)
    with mmcompress.wrap(MODEL, audio=MeanPool(keep=0.3)) as w:                         # nothing but silence
        decode(w, input_features=silence)
        assert w.last[0].after == 30 and w.last[0].layout.sound == 0


def test_sound_and_silence_share_any_budget_exactly():
    for n, sound in ((10, 0), (10, 1), (10, 9), (10, 10), (1500, 3)):
        for k in range(1, n + 1):
            a, b = sound_budget(AudioLayout(n, 50.0, sound), k)
            assert a + b == k and int(sound > 0) <= a <= sound and 0 <= b <= n - sound


def test_training_reads_fewer_states(method):
    model = copy.deepcopy(MODEL).train()
    with mmcompress.wrap(model, audio=audio_reducer(method, 0.5)) as w:
        out = w(input_features=windows(), labels=torch.tensor([[4, 5, 6]] * 3))
        out.loss.backward()
        model.gradient_checkpointing_enable()
        again = w(input_features=windows(), labels=torch.tensor([[4, 5, 6]] * 3))
        again.loss.backward()
    assert out.encoder_last_hidden_state.shape[1] == STATES // 2
    torch.testing.assert_close(again.loss, out.loss)
    grad = model.model.encoder.conv1.weight.grad
    assert torch.isfinite(grad).all() and grad.abs().sum() > 0


def test_bf16_and_eager(method):
    for options in (dict(dtype=torch.bfloat16), dict(attn_implementation="eager")):
        other = whisper(**options)
        x = windows(dtype=other.dtype)
        with mmcompress.wrap(other, audio=audio_reducer(method, 0.5)) as w:
            assert decode(w, input_features=x).shape[1] >= 6
            logits = w(input_features=x, decoder_input_ids=torch.ones(3, 2, dtype=torch.long)).logits
            assert torch.isfinite(logits).all()
    with mmcompress.wrap(MODEL, audio=audio_reducer(method, 0.5)) as w:
        torch.testing.assert_close(w(input_features=x, decoder_input_ids=torch.ones(3, 2, dtype=torch.long)).logits, logits,
                                   atol=2e-4, rtol=2e-4)


def test_remove_disable_copies_peft_and_accelerate():
    from accelerate.hooks import ModelHook, add_hook_to_module
    from peft import LoraConfig, get_peft_model
    model, x = copy.deepcopy(MODEL), windows()
    before, stock = {k: id(v) for k, v in model.__dict__.items()}, decode(MODEL, input_features=x)
    w = mmcompress.wrap(model, audio=MeanPool(keep=0.25))
    reduced = decode(w, input_features=x)
    with w.disable():
        assert torch.equal(decode(model, input_features=x), stock)
    twin = copy.deepcopy(model)
    assert torch.equal(decode(twin, input_features=x), reduced)
    with pytest.raises(WrapError, match=r"wrapped already"):
        mmcompress.wrap(model, audio="stride")
    w.remove()
    assert {k: id(v) for k, v in model.__dict__.items()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(decode(model, input_features=x), stock)
    assert torch.equal(decode(twin, input_features=x), reduced)                         # a copy has a wrap of its own
    mmcompress.unwrap(twin)
    assert torch.equal(decode(twin, input_features=x), stock)
    add_hook_to_module(model, ModelHook())
    with mmcompress.wrap(model, audio=MeanPool(keep=0.25)):
        assert torch.equal(decode(model, input_features=x), reduced)
    tuned = get_peft_model(copy.deepcopy(MODEL), LoraConfig(target_modules=["q_proj"], r=2))
    with mmcompress.wrap(tuned, audio=MeanPool(keep=0.25)):
        assert torch.equal(tuned.generate(input_features=x, max_new_tokens=6, eos_token_id=None), reduced)


def test_the_pure_form_and_a_saved_configuration(tmp_path):
    x = windows()
    pure = mmcompress.compress(MODEL, {"input_features": x}, audio=MeanPool(keep=0.4))
    assert pure["encoder_outputs"].last_hidden_state.shape[1] == 40 and "input_features" not in pure
    with mmcompress.wrap(MODEL, audio=MeanPool(keep=0.4)) as w:
        expected = decode(w, input_features=x)
        w.save_pretrained(tmp_path)
        again = mmcompress.compress(MODEL, {"input_features": x}, audio=MeanPool(keep=0.4))     # not reduced twice
        assert torch.equal(again["encoder_outputs"].last_hidden_state, pure["encoder_outputs"].last_hidden_state)
    assert torch.equal(decode(MODEL, **pure), expected)
    with mmcompress.from_pretrained(MODEL, tmp_path) as w:
        assert w.config == WrapConfig(audio=MeanPool(keep=0.4))
        assert torch.equal(decode(w, input_features=x), expected)


def test_what_whisper_cannot_give_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"no prompt with sound"):
        mmcompress.wrap(MODEL, layers=[{"name": "fastv"}])
    with pytest.raises(UnsupportedModelError, match=r"sees no pictures"):
        mmcompress.wrap(MODEL, image="uniform")
    for name in sorted(ASKING):
        with mmcompress.wrap(MODEL, audio=audio_reducer(name)) as w, pytest.raises(SignalError, match=r"Whisper|question"):
            decode(w, input_features=windows())
