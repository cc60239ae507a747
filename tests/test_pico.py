"""The embedded model: it reads, and every method keeps its promises on it through the real processor."""

import random

import pytest
import torch
from conftest import METHODS, reducers
from tiny import greedy_reference

import mmcompress
from mmcompress.eval import evaluate
from mmcompress.image import ClsTopK, GlobalCom2, GlobalRank, Random
from mmcompress.pico import prompt, scenes


def asked(processor, sizes, seed=0):
    """One question about a fresh scene of each size: (processor inputs of the batch, inputs of each alone, answers)."""
    rng = random.Random(seed)
    images, texts, answers = [], [], []
    for size in sizes:
        kind, image, objects = scenes.scene(rng, *size, kind="cards")
        (question, answer), = scenes.questions(rng, kind, objects, 1)
        images.append(image)
        texts.append(prompt(question))
        answers.append(answer)
    one = [processor(images=i, text=t, return_tensors="pt") for i, t in zip(images, texts)]
    return processor(images=images, text=texts, return_tensors="pt", padding=True), one, answers


SIZES = [(336, 336), (168, 336), (210, 300)]


def test_pico_reads(pico):
    rows = {r.kind: r for r in evaluate(*pico, {"all": None}, 60, seed="test", progress=False)}
    assert rows["all"].accuracy >= 0.95 and rows["cards"].accuracy >= 0.95


def test_the_helper_prompt_is_the_chat_template(pico):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what word is on the red card?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "fish"}]},
            {"role": "user", "content": [{"type": "text", "text": "how many cards are there?"}]}]
    text = pico[1].apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == prompt("what word is on the red card?", "how many cards are there?", answers=("fish",))


def test_keep_one_is_bit_identical(pico, method):
    model, processor = pico
    inputs, _, _ = asked(processor, SIZES)
    with torch.inference_mode():
        stock = model(**inputs).logits
        with mmcompress.wrap(model, image=reducers(1.0)[method]) as w:
            assert torch.equal(w(**inputs).logits, stock)
    assert "forward" not in model.__dict__


def test_a_padded_batch_generates_what_greedy_loops_do(pico, method):
    """Batch equals single equals a loop without cache, from the processor's own output, sizes mixed."""
    model, processor = pico
    inputs, one, _ = asked(processor, SIZES)
    reducer = reducers(0.3)[method]
    with mmcompress.wrap(model, image=reducer) as w:
        out = w.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert [i.after for i in w.last] == [reducer.count(i.layout) for i in w.last]
    for i, alone in enumerate(one):
        assert torch.equal(out[i, -4:], greedy_reference(model, alone, reducer, 4))


def test_two_turns_about_one_picture(pico):
    """The second question is answered from the reduced cache as from scratch, and rightly."""
    model, processor = pico
    rng = random.Random(5)
    _, image, objects = scenes.scene(rng, 336, 336, kind="cards")
    first, second = (f"what number is on the {o['color']} card?" for o in objects[:2])
    inputs = processor(images=image, text=prompt(first), return_tensors="pt")
    with mmcompress.wrap(model, image=GlobalRank(keep=0.25)) as w:
        out = w.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        more = processor.tokenizer(f"USER: {second} ASSISTANT:", add_special_tokens=False, return_tensors="pt").input_ids
        ids = torch.cat([out.sequences, more], 1)
        again = w.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=out.past_key_values,
                           max_new_tokens=8, do_sample=False)
        scratch = w.generate(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, max_new_tokens=8,
                             do_sample=False)
    assert torch.equal(again, scratch)
    length = inputs["input_ids"].shape[1]
    answers = [processor.decode(out.sequences[0, length:], skip_special_tokens=True).strip(),
               processor.decode(again[0, ids.shape[1]:], skip_special_tokens=True).strip()]
    assert answers == [o["number"] for o in objects[:2]]


def test_a_stock_pipeline_on_a_wrapped_model(pico):
    from transformers import pipeline
    model, processor = pico
    _, image, objects = scenes.scene(random.Random(5), 336, 336, kind="cards")
    question = f"what number is on the {objects[0]['color']} card?"
    with mmcompress.wrap(model, image=GlobalRank(keep=0.25)) as w:
        chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        out = pipeline("image-text-to-text", model=model, processor=processor)(text=chat, max_new_tokens=8)
        assert w.report.tokens_after == 186
    assert out[0]["generated_text"][-1]["content"].strip() == objects[0]["number"]


def test_what_the_figures_rest_on(pico):
    """A small sample of the README's table: far apart enough that 80 questions tell."""
    found = {r.method: r.accuracy for r in evaluate(*pico, {
        "ours@0.1": GlobalRank(keep=0.1), "random@0.1": Random(keep=0.1), "cls@0.1": ClsTopK(keep=0.1),
        "gc2@0.25": GlobalCom2(keep=0.25)}, 80, seed="test", progress=False) if r.kind == "cards"}
    assert found["ours"] > 0.8 > found["cls"] > found["random"] + 0.1 and found["gc2"] > 0.7


def test_scenes_are_deterministic_and_answers_true():
    for seed in range(20):
        a = scenes.scene(random.Random(seed), 336, 336)
        b = scenes.scene(random.Random(seed), 336, 336)
        assert a[0] == b[0] and a[2] == b[2] and a[1].tobytes() == b[1].tobytes() and a[1].size == (336, 336)
        kind, _, objects = a
        for question, answer in scenes.questions(random.Random(seed), kind, objects, 10):
            if question.startswith("what number is on the ") and "says" not in question:
                assert answer == next(o["number"] for o in objects if o["color"] == question.split()[5])
            if question.startswith("what is the price"):
                assert answer == next(o["number"] for o in objects if question[:-1].endswith(" " + o["word"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_bf16(dtype):
    model, processor = mmcompress.pico.load(dtype)
    inputs, _, answers = asked(processor, SIZES, seed=2)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    for name in METHODS:
        with mmcompress.wrap(model, image=reducers(0.5)[name]) as w:
            out = w.generate(**inputs, max_new_tokens=8, do_sample=False)
            assert out.shape[0] == len(answers)
    with mmcompress.wrap(model, image=GlobalRank(keep=0.5)) as w:
        out = w.generate(**inputs, max_new_tokens=8, do_sample=False)
    said = processor.batch_decode(out[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    assert [s.strip() for s in said] == answers


def test_training_and_undoing(method):
    """Gradients reach the projector under PEFT and accelerate hooks, and both ends of the wrap leave pico as it was."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from peft import LoraConfig, get_peft_model
    model, processor = mmcompress.pico.load()
    inputs, _, _ = asked(processor, SIZES[:2])
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == 4) | (inputs["attention_mask"] == 0), -100)
    with torch.no_grad():
        stock = model(**inputs).logits
    before = set(model.__dict__)
    with mmcompress.wrap(model, image=reducers(0.3)[method]) as w, pytest.raises(mmcompress.WrapError, match="wrapped already"):
        mmcompress.wrap(model, image="uniform")
    assert set(model.__dict__) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock)
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    tuned = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=[], r=2))
    model.model.multi_modal_projector.requires_grad_(True)
    with mmcompress.wrap(tuned, image=reducers(0.3)[method]) as w:
        out = tuned(**inputs, labels=labels)
        assert out.logits.shape[1] == w.prompt.reduced < stock.shape[1]
        out.loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert any("lora_B" in n and p.grad.abs().sum() > 0 for n, p in tuned.named_parameters() if p.grad is not None)


def test_the_reducer_compiles_on_picos_tokens(pico, method):
    from mmcompress.adapters import adapter_for
    from mmcompress.tokens import Tokens
    model, processor = pico
    _, one, _ = asked(processor, [(300, 200)])
    adapter, reducer = adapter_for(model), reducers(0.3)[method]
    layouts = adapter.layouts(one[0])
    with torch.no_grad():
        encoded = adapter.encode(one[0], reducer.captures)
        x = Tokens(encoded.features[0][None], layouts[0], encoded.state(layouts, [0]))
        torch._dynamo.reset()
        got = torch.compile(lambda x: reducer(x).index, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(got, reducer(x).index)
