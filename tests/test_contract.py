"""What every method gets free: ARCHITECTURE's list, for every registered reducer, on tiny models of the real classes."""

import copy

import pytest
import torch
from conftest import reducers
from tiny import IMAGE, greedy_reference, llava, llava_next, make_inputs, row_of

import mmcompress
from mmcompress import WrapError
from mmcompress.registry import reducer_class

ROWS = [[(48, 48)], [(30, 70), (100, 40)], [], [(48, 48)]]      # one, two, no pictures, and a layout seen before


@pytest.fixture(scope="module")
def model():
    return llava_next()


def wrapped(model, method, keep=0.4, **options):
    return mmcompress.wrap(model, image=reducer_class("image", method)(keep=keep), **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_keep_one_is_bit_identical(model, method, side):
    inputs = make_inputs(model, ROWS, side)
    stock = model(**inputs)
    with wrapped(model, method, keep=1.0) as w:
        assert torch.equal(w(**inputs).logits, stock.logits)
        assert [i.after for i in w.last] == [i.before for i in w.last]
    if side == "left":
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        with wrapped(model, method, keep=1.0) as w:
            assert torch.equal(w.generate(**inputs, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_single(model, method, side):
    inputs = make_inputs(model, ROWS, side)
    with wrapped(model, method) as w:
        out = w(**inputs).logits
        lengths = (w.prompt.column >= 0).sum(1).tolist()
        for i in range(len(ROWS)):
            alone = w(**row_of(model, inputs, ROWS, i)).logits[0]
            assert len(alone) == lengths[i]
            mine = out[i, -lengths[i]:] if side == "left" else out[i, :lengths[i]]
            torch.testing.assert_close(mine, alone, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_equals_a_greedy_loop_without_cache(model, method, side):
    """Independent of the wrap: embeddings put together by hand, one prompt at a time, no cache, no padding."""
    inputs = make_inputs(model, ROWS, side)
    reducer = reducers(0.4)[method]
    with mmcompress.wrap(model, image=reducer) as w:
        out = w.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :length], inputs["input_ids"])                    # the caller's prompt is put back
    for i in range(len(ROWS)):
        single = row_of(model, inputs, ROWS, i)
        if ROWS[i]:
            assert torch.equal(out[i, length:], greedy_reference(model, single, reducer, 5))
        else:
            stock = model.generate(**single, max_new_tokens=5, do_sample=False, eos_token_id=None)
            assert torch.equal(out[i, length:], stock[0, -5:])


def test_beams_samples_caches_and_a_second_turn(model, method):
    """A batch under beam search equals its rows alone; static cache equals dynamic; turn two on the cache equals scratch."""
    inputs = make_inputs(model, ROWS)
    greedy = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, suppress_tokens=[IMAGE])
    with wrapped(model, method) as w:
        beams = w.generate(**inputs, num_beams=3, **greedy)
        for i in range(len(ROWS)):
            alone = w.generate(**row_of(model, inputs, ROWS, i), num_beams=3, **greedy)
            assert torch.equal(beams[i, -4:], alone[0, -4:])
        torch.manual_seed(0)
        samples = w.generate(**inputs, **{**greedy, "do_sample": True}, num_return_sequences=2)
        assert torch.equal(samples[::2, :inputs["input_ids"].shape[1]], inputs["input_ids"])
        first = w.generate(**inputs, **greedy, return_dict_in_generate=True)
        assert torch.equal(w.generate(**inputs, **greedy, cache_implementation="static"), first.sequences)
        ids = torch.cat([first.sequences, first.sequences[:, -4:].flip(1)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(ROWS), 8, dtype=torch.long)], 1)
        second = w.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **greedy)
        assert torch.equal(second, w.generate(**{**inputs, "input_ids": ids, "attention_mask": mask}, **greedy))


def test_remove_leaves_nothing(model, method):
    before = {k: id(v) for k, v in model.__dict__.items()}
    inputs = make_inputs(model, ROWS)
    stock = model(**inputs).logits
    parameters = [p.clone() for p in model.parameters()]
    w = wrapped(model, method)
    assert w.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == len(ROWS)
    w(**inputs)
    assert w.remove() is model and w.remove() is model
    assert {k: id(v) for k, v in model.__dict__.items()} == before
    assert model.forward.__func__ is type(model).forward and model.generate.__func__ is type(model).generate
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters()))
    assert not any(m._forward_hooks for name, m in model.named_modules() if name.endswith("_proj"))
    assert torch.equal(model(**inputs).logits, stock)
    with pytest.raises(WrapError, match=r"was removed"):
        w(**inputs)


def test_gradients_reach_projector_and_vision_tower(model, method):
    inputs = make_inputs(model, [[(48, 48)], [(100, 40)]], "right")
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
    model = copy.deepcopy(model)
    with wrapped(model, method) as w:
        w(**inputs, labels=labels).loss.backward()
    projector = model.model.multi_modal_projector.linear_1.weight.grad
    assert projector.abs().sum() > 0 and torch.isfinite(projector).all()
    assert model.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0


def test_double_wrap_is_refused(model, method):
    with wrapped(model, method), pytest.raises(WrapError, match=r"wrapped already.*remove\(\).*unwrap"):
        mmcompress.wrap(model, image="uniform")
    assert mmcompress.unwrap(model) is model                                     # fine without a wrap
    mmcompress.wrap(model, image="uniform")
    assert "forward" not in mmcompress.unwrap(model).__dict__


def test_reducer_compiles_without_a_break(model, method):
    from test_tokens import ADAPTER, tokens_of
    layout = ADAPTER.layout(70, 48)
    reducer, x = reducers(0.3)[method], tokens_of(layout)

    def reduce(x):
        out = reducer(x)
        return out.tokens, out.index, out.source

    torch._dynamo.reset()
    for got, expected in zip(torch.compile(reduce, fullgraph=True, backend="aot_eager")(x), reduce(x)):
        torch.testing.assert_close(got, expected)


def test_configuration_round_trip(model, method, tmp_path):
    w = mmcompress.wrap(model, image=reducers(0.37)[method], positions="original")
    w.save_pretrained(tmp_path)
    w.remove()
    again = mmcompress.from_pretrained(model, tmp_path)
    assert again.config == w.config
    again.remove()
    with mmcompress.wrap(model, tmp_path / "mmcompress.json") as third:
        assert third.config == w.config


def test_bf16(model, method):
    model = llava_next().to(torch.bfloat16)
    inputs = make_inputs(model, ROWS)
    reducer = reducers(0.4)[method]
    with mmcompress.wrap(model, image=reducer) as w:
        out = w(**inputs)
        assert out.logits.dtype == torch.bfloat16 and torch.isfinite(out.logits).all()
        assert [i.after for i in w.last] == [reducer.count(i.layout) for i in w.last]
        batch = w.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert batch.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("order", ["hooks first", "wrap first"])
def test_accelerate_hooks(method, order):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
    model = llava_next()
    inputs = make_inputs(model, ROWS)
    with wrapped(model, method) as w:
        expected = w(**inputs).logits
    hook = AlignDevicesHook(execution_device="cpu", io_same_device=True)
    if order == "hooks first":
        add_hook_to_module(model, hook)
        hooked = model.__dict__["forward"]
        w = wrapped(model, method)
    else:
        w = wrapped(model, method)
        add_hook_to_module(model, hook)
    assert torch.equal(w(**inputs).logits, expected) and torch.equal(model(**inputs).logits, expected)
    w.remove()
    if order == "hooks first":
        assert model.__dict__["forward"] is hooked
    stock = model(**inputs).logits
    remove_hook_from_module(model)
    assert torch.equal(model(**inputs).logits, stock) and stock.shape != expected.shape


@pytest.mark.parametrize("order", ["peft first", "wrap first"])
def test_peft(method, order):
    from peft import LoraConfig, get_peft_model
    inputs = make_inputs(model := llava_next(), ROWS)
    with wrapped(model, method) as w:
        expected = w(**inputs).logits
    lora = LoraConfig(target_modules=r".*language_model.*q_proj", r=2)
    if order == "peft first":
        tuned = get_peft_model(model, lora)
        w = wrapped(tuned, method)
    else:
        w = wrapped(model, method)
        tuned = get_peft_model(model, lora)
    assert torch.equal(tuned(**inputs).logits, expected)                         # a fresh LoRA changes nothing
    length = inputs["input_ids"].shape[1]
    out = tuned.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(out[:, :length], inputs["input_ids"])
    tuned(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)).loss.backward()
    assert any("lora" in n and p.grad is not None and p.grad.abs().sum() > 0 for n, p in tuned.named_parameters())
    w.remove()
    assert "forward" not in model.__dict__ and tuned(**inputs).logits.shape != expected.shape


def test_llava_one_and_a_half(method):
    model = llava()
    rows = [[0], [0, 0], []]
    inputs = make_inputs(model, rows)
    reducer = reducers(0.3)[method]
    stock = model(**inputs).logits
    with mmcompress.wrap(model, image=reducer) as w:
        out = w.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert [i.after for i in w.last] == [10] * 3                             # floor(.3 * 36)
    for i in range(2):
        assert torch.equal(out[i, -4:], greedy_reference(model, row_of(model, inputs, rows, i), reducer, 4))
    with wrapped(model, method, keep=1.0) as w:
        assert torch.equal(w(**inputs).logits, stock)


@pytest.mark.parametrize("tower", ["siglip", "dinov2"])
@pytest.mark.parametrize("family", [llava, llava_next])
def test_other_towers(method, tower, family):
    model = family(tower)
    rows = [[(48, 48)], [(100, 40)]]
    inputs = make_inputs(model, rows)
    reducer = reducers(0.4)[method]
    needs_cls = method in ("cls_topk", "visionzip")
    if tower == "siglip" and needs_cls:
        with pytest.raises(mmcompress.SignalError, match=r"no \[CLS\] token"), mmcompress.wrap(model, image=reducer) as w:
            w(**inputs)
        assert "forward" not in model.__dict__
        return
    with mmcompress.wrap(model, image=reducer) as w:
        out = w.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(out[0, -3:], greedy_reference(model, row_of(model, inputs, rows, 0), reducer, 3))
