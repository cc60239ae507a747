"""Everything a user of `generate` and `forward` meets: decoding modes, caches, turns, labels, errors."""

import copy

import hypothesis.strategies as st
import pytest
import torch
import transformers
from hypothesis import given, settings
from tiny import IMAGE, PAD, greedy_reference, llava, llava_next, make_inputs, row_of
from transformers import DynamicCache, StaticCache, StoppingCriteria, StoppingCriteriaList

import mmcompress
from mmcompress import SignalError, UnsupportedModelError, WrapError
from mmcompress.adapters import adapter_for
from mmcompress.image import AveragePool, ClsTopK, GlobalCom2, Uniform

ROWS = [[(48, 48)], [(30, 70), (100, 40)], []]
PICTURES = [[(48, 48)], [(30, 70), (100, 40)], [(24, 60)]]
REDUCER = GlobalCom2(keep=0.3)
MODEL = llava_next()


@pytest.fixture(scope="module")
def model():
    return llava_next()


def generate(w, inputs, **options):
    return w.generate(**inputs, **{"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, **options})


def test_beams_equal_rows_alone(model):
    inputs = make_inputs(model, ROWS)
    with mmcompress.wrap(model, image=REDUCER) as w:
        batch = generate(w, inputs, num_beams=3)
        several = generate(w, inputs, num_beams=3, num_return_sequences=2)
        for i in range(len(ROWS)):
            alone = generate(w, row_of(model, inputs, ROWS, i), num_beams=3)
            assert torch.equal(batch[i, -5:], alone[0, -5:])
    length = inputs["input_ids"].shape[1]
    assert torch.equal(several[::2], batch)
    assert torch.equal(several[:, :length], inputs["input_ids"].repeat_interleave(2, 0))


def test_beams_against_the_hand_made_prompt(model):
    """One beam-searched prompt with two pictures equals stock beam search over embeddings put together by hand."""
    inputs = make_inputs(model, [[(30, 70), (100, 40)]])
    pure = mmcompress.compress(model, inputs, image=REDUCER)
    embeds = model.get_input_embeddings()(pure["input_ids"])
    features = torch.cat(pure["mm_encoder_outputs"]["image"].pooler_output)
    embeds[pure["input_ids"] == IMAGE] = features
    expected = model.generate(inputs_embeds=embeds, attention_mask=pure["attention_mask"], num_beams=4, max_new_tokens=5,
                              do_sample=False, eos_token_id=None)
    with mmcompress.wrap(model, image=REDUCER) as w:
        assert torch.equal(generate(w, inputs, num_beams=4)[:, -5:], expected[:, -5:])


def test_sampling_follows_the_seed(model):
    inputs = make_inputs(model, ROWS)
    pure = mmcompress.compress(model, inputs, image=REDUCER)
    torch.manual_seed(3)
    expected = generate(model, pure, do_sample=True, num_return_sequences=2)
    with mmcompress.wrap(model, image=REDUCER) as w:
        torch.manual_seed(3)
        out = generate(w, inputs, do_sample=True, num_return_sequences=2)
    assert torch.equal(out[:, -5:], expected[:, -5:]) and len(out) == 2 * len(ROWS)


@pytest.mark.parametrize("positions", ["closed", "original"])
@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"prefill_chunk_size": 7}, {"use_cache": False}],
                         ids=["static cache", "chunked prefill", "no cache"])
def test_caches_agree(model, options, positions):
    inputs = make_inputs(model, ROWS)
    with mmcompress.wrap(model, image=REDUCER, positions=positions) as w:
        if "prefill_chunk_size" in options and not hasattr(transformers.generation.utils, "_slice_mm_encoder_output"):
            with pytest.raises(ValueError, match=r"does not split precomputed features into chunks"):
                generate(w, inputs, **options)
            return
        assert torch.equal(generate(w, inputs, **options), generate(w, inputs))


@pytest.mark.parametrize("side", ["left", "right"])
def test_original_positions(model, side):
    """Kept tokens and text keep the rotary positions they had: dense reference with explicit position ids."""
    inputs = make_inputs(model, PICTURES, side)
    with mmcompress.wrap(model, image=REDUCER, positions="original") as w:
        out = w(**inputs).logits
        items = w.last
        closed = None
        at = 0
        for i, row in enumerate(PICTURES):
            single = row_of(model, inputs, PICTURES, i)
            n = int((w.prompt.column[i] >= 0).sum())
            ids = single["input_ids"][0]
            where, kept = (ids == IMAGE).nonzero()[:, 0], []
            start = 0
            for item in items[at:at + len(row)]:
                kept += where[start:start + item.before][item.index].tolist()
                start += item.before
            at += len(row)
            columns = torch.tensor(sorted([*(ids != IMAGE).nonzero()[:, 0].tolist(), *kept]))
            with w.disable():
                features = torch.cat(model.get_image_features(single["pixel_values"], single["image_sizes"],
                                                              return_dict=True).pooler_output)
                embeds = model.get_input_embeddings()(single["input_ids"])
                embeds[0, where] = features
                hidden = model.model.language_model(inputs_embeds=embeds[:, columns], position_ids=columns[None],
                                                    attention_mask=torch.ones(1, len(columns), dtype=torch.long),
                                                    use_cache=False).last_hidden_state
            expected = model.lm_head(hidden)[0]
            mine = out[i, -n:] if side == "left" else out[i, :n]
            torch.testing.assert_close(mine, expected, atol=2e-4, rtol=2e-4)
            closed = expected if closed is None else closed
    with mmcompress.wrap(model, image=REDUCER) as w:
        assert not torch.allclose(w(**row_of(model, inputs, PICTURES, 0)).logits[0], closed, atol=1e-3)


@pytest.mark.parametrize("positions", ["closed", "original"])
@pytest.mark.parametrize("rows", [[[(48, 48)]], ROWS], ids=["one prompt", "a padded batch"])
def test_second_turn_on_the_cache_equals_from_scratch(model, rows, positions):
    inputs = make_inputs(model, rows)
    question = torch.randint(3, 97, (len(rows), 6), generator=torch.Generator().manual_seed(1))
    with mmcompress.wrap(model, image=REDUCER, positions=positions) as w:
        first = generate(w, inputs, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, question], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(rows), ids.shape[1] - inputs["input_ids"].shape[1],
                                                               dtype=torch.long)], 1)
        size = first.past_key_values.get_seq_length()
        second = generate(w, {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values},
                          return_dict_in_generate=True)
        assert size < inputs["input_ids"].shape[1]                               # the cache is the shorter one
        scratch = generate(w, {**inputs, "input_ids": ids, "attention_mask": mask})
        assert torch.equal(second.sequences, scratch)
        steps, lines = w.report.decode_steps, w.report.prompt_before
        generate(w, make_inputs(model, [[], []]))
        assert (w.report.decode_steps, w.report.prompt_before) == (steps, lines)        # a turn of text is not the pictures'
        # and a third
        ids = torch.cat([second.sequences, question.flip(1)], 1)
        mask = torch.cat([mask, torch.ones(len(rows), ids.shape[1] - mask.shape[1], dtype=torch.long)], 1)
        third = generate(w, {"input_ids": ids, "attention_mask": mask, "past_key_values": second.past_key_values})
        assert torch.equal(third, generate(w, {**inputs, "input_ids": ids, "attention_mask": mask}))


@pytest.mark.parametrize("positions", ["closed", "original"])
def test_a_new_picture_in_the_second_turn(model, positions):
    inputs = make_inputs(model, [[(48, 48)]])
    later = make_inputs(model, [[(100, 40)]], seed=5)
    with mmcompress.wrap(model, image=REDUCER, positions=positions) as w:
        first = generate(w, inputs, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, later["input_ids"]], 1)
        second = generate(w, {**later, "input_ids": ids, "attention_mask": torch.ones_like(ids),
                              "past_key_values": first.past_key_values})
        tiles = max(inputs["pixel_values"].shape[1], later["pixel_values"].shape[1])
        grow = lambda p: torch.cat([p, p.new_zeros(1, tiles - p.shape[1], *p.shape[2:])], 1)  # noqa: E731
        both = {"pixel_values": torch.cat([grow(inputs["pixel_values"]), grow(later["pixel_values"])]),
                "image_sizes": torch.cat([inputs["image_sizes"], later["image_sizes"]])}
        assert torch.equal(second, generate(w, {**both, "input_ids": ids, "attention_mask": torch.ones_like(ids)}))


@pytest.mark.parametrize("first_rows,keep", [([[]], 0.3), ([[(48, 48)]], 1.0)], ids=["text first", "kept whole first"])
def test_a_picture_after_turns_that_lost_nothing(model, first_rows, keep):
    inputs, later = make_inputs(model, first_rows), make_inputs(model, [[(100, 40)]], seed=5)
    with mmcompress.wrap(model, image=GlobalCom2(keep=keep)) as w:
        first = generate(w, inputs, return_dict_in_generate=True)
    with mmcompress.wrap(model, image=REDUCER) as w:
        ids = torch.cat([first.sequences, later["input_ids"]], 1)
        mask = torch.ones_like(ids)
        second = generate(w, {**later, "input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values})
        if keep == 1.0:
            assert [i.after for i in w.last] == [REDUCER.count(i.layout) for i in w.last] and len(w.last) == 1
        else:
            assert torch.equal(second, generate(w, {**later, "input_ids": ids, "attention_mask": mask}))
    assert torch.equal(second[:, :ids.shape[1]], ids)


def test_a_cache_from_another_prompt_is_refused(model):
    inputs = make_inputs(model, [[(48, 48)]])
    with mmcompress.wrap(model, image=REDUCER) as w:
        first = generate(w, inputs, return_dict_in_generate=True)
        other = torch.cat([first.sequences.flip(1), first.sequences], 1)
        with pytest.raises(ValueError, match=r"do not begin with the prompt that this cache was made for"):
            generate(w, {"input_ids": other, "past_key_values": first.past_key_values})


def test_a_hand_written_decoding_loop(model):
    """forward with a cache, the mask of the full prompt growing by one a step, as people write it."""
    inputs = make_inputs(model, ROWS)
    with mmcompress.wrap(model, image=REDUCER) as w:
        expected = generate(w, inputs)[:, -5:]
        out = w(**inputs, use_cache=True)
        mask, got = inputs["attention_mask"], [out.logits[:, -1:].argmax(-1)]
        assert out.past_key_values.get_seq_length() < mask.shape[1]
        for _ in range(4):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            out = w(input_ids=got[-1], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
            got.append(out.logits[:, -1:].argmax(-1))
        assert torch.equal(torch.cat(got, 1), expected)


def test_a_callers_own_cache(model):
    inputs = make_inputs(model, [[(48, 48)]])
    with mmcompress.wrap(model, image=REDUCER) as w:
        cache = DynamicCache(config=model.config.get_text_config())
        out = generate(w, {**inputs, "past_key_values": cache})
        assert torch.equal(out, generate(w, inputs))
        again = copy.deepcopy(cache)
        ids = torch.cat([out, out[:, -3:]], 1)
        second = generate(w, {"input_ids": ids, "past_key_values": again})
        assert torch.equal(second, generate(w, {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}))


def test_an_emptied_cache_serves_another_prompt(model):
    """A static cache is made once and reset between prompts: what it held before must not be looked for."""
    a, b, text = (make_inputs(model, rows, seed=seed) for rows, seed in (([[(48, 48)]], 0), ([[(100, 40)]], 1), ([[]], 2)))
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=300)
    with mmcompress.wrap(model, image=REDUCER) as w:
        for inputs in (a, b, text, a):
            assert torch.equal(generate(w, {**inputs, "past_key_values": cache}), generate(w, inputs))
            cache.reset()


def test_labels_against_a_dense_reference(model):
    """Loss and gradients of a reduced training step equal those of embeddings put together by hand."""
    inputs = make_inputs(model, [[(48, 48)], [(48, 48)]], "right")
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
    a, b = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    with mmcompress.wrap(a, image=REDUCER) as w:
        loss = w(**inputs, labels=labels).loss
        loss.backward()
    encoded = b.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True).pooler_output
    total, count = 0, 0
    for i in range(2):
        real = inputs["attention_mask"][i].bool()
        ids, want = inputs["input_ids"][i][real], labels[i][real]
        where = (ids == IMAGE).nonzero()[:, 0]
        embeds = b.get_input_embeddings()(ids)
        embeds = torch.cat([embeds[:where[0]], encoded[i][w.last[i].index], embeds[where[-1] + 1:]])
        want = torch.cat([want[:where[0]], torch.full((w.last[i].after,), -100), want[where[-1] + 1:]])
        logits = b.lm_head(b.model.language_model(inputs_embeds=embeds[None]).last_hidden_state)[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], want[1:], reduction="sum", ignore_index=-100)
        count += int((want[1:] != -100).sum())
    (total / count).backward()
    torch.testing.assert_close(loss, total / count)
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_gradient_checkpointing(model):
    inputs = make_inputs(model, ROWS, "right")
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
    grads = []
    for checkpointing in (False, True):
        tuned = copy.deepcopy(model).train()
        if checkpointing:
            tuned.gradient_checkpointing_enable()
        with mmcompress.wrap(tuned, image=REDUCER) as w:
            w(**inputs, labels=labels).loss.backward()
        grads.append(tuned.model.multi_modal_projector.linear_1.weight.grad)
    torch.testing.assert_close(*grads)


def test_trainer(model, tmp_path):
    """transformers' Trainer on a wrapped model: its loss goes down on shortened prompts, its checkpoint is a stock one."""
    from transformers import Trainer, TrainingArguments
    tuned = copy.deepcopy(model)
    one = {k: v[0] for k, v in make_inputs(tuned, [[(48, 48)]]).items()}
    one["labels"] = one["input_ids"].masked_fill(one["input_ids"] == IMAGE, -100)
    options = TrainingArguments(str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
                                logging_steps=1, use_cpu=True, save_steps=4, disable_tqdm=True)
    with mmcompress.wrap(tuned, image=REDUCER) as w:
        trainer = Trainer(model=tuned, args=options, train_dataset=[one] * 8)
        trainer.train()
        assert len(w.last) == 2 and w.prompt.reduced < w.prompt.full
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < float(losses[0])
    saved = type(tuned).from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(saved.lm_head.weight, tuned.lm_head.weight)


def test_eager_and_sdpa_select_the_same(model):
    inputs = make_inputs(model, ROWS)
    with mmcompress.wrap(model, image=REDUCER) as w:
        expected, chosen = w(**inputs).logits[:, -1], [i.index for i in w.last]
    eager = llava_next(attn_implementation="eager")
    eager.load_state_dict(model.state_dict())
    with mmcompress.wrap(eager, image=REDUCER) as w:
        torch.testing.assert_close(w(**inputs).logits[:, -1], expected, atol=1e-4, rtol=1e-4)
        assert all(torch.equal(a.index, b) for a, b in zip(w.last, chosen))


def test_the_pure_form_touches_nothing(model):
    inputs = make_inputs(model, ROWS)
    before = dict(model.__dict__)
    pure = mmcompress.compress(model, inputs, image=REDUCER)
    assert dict(model.__dict__) == before and "pixel_values" in inputs and "pixel_values" not in pure
    with mmcompress.wrap(model, image=REDUCER) as w:
        assert torch.equal(model(**pure).logits, w(**inputs).logits)
    texts = make_inputs(model, [[], []])
    assert torch.equal(mmcompress.compress(model, texts, image=REDUCER)["input_ids"], texts["input_ids"])


def test_packed_text_stays_packed(model):
    """Two texts in one row, told apart by their positions alone, as trainers pack them: ours must not join them."""
    ids = make_inputs(model, [[]])["input_ids"]
    packed = {"input_ids": torch.cat([ids, ids], 1), "position_ids": torch.arange(ids.shape[1]).repeat(2)[None]}
    stock = model(**packed, use_cache=False).logits
    with mmcompress.wrap(model, image=REDUCER, positions="original") as w:
        assert torch.equal(w(**packed, use_cache=False).logits, stock)


def test_text_only_calls_pass_through(model):
    inputs = make_inputs(model, [[], []])
    expected = generate(model, inputs)
    with mmcompress.wrap(model, image=REDUCER) as w:
        assert torch.equal(generate(w, inputs), expected)
        assert w.last == [] and "nothing was reduced" in str(w.report)


def test_disable_is_the_stock_model(model):
    inputs = make_inputs(model, ROWS)
    stock = model(**inputs).logits
    with mmcompress.wrap(model, image=REDUCER) as w:
        with w.disable():
            assert torch.equal(w(**inputs).logits, stock)
        assert w(**inputs).logits.shape != stock.shape
    assert torch.equal(model(**inputs).logits, stock)


def test_the_model_itself_is_wrapped(model):
    """Trainer, pipelines and PEFT call the model, not our handle."""
    inputs = make_inputs(model, ROWS)
    with mmcompress.wrap(model, image=REDUCER) as w:
        assert torch.equal(model(**inputs).logits, w(**inputs).logits)
        assert torch.equal(generate(model, inputs), generate(w, inputs))
        positional = model(inputs["input_ids"], inputs["pixel_values"], inputs["image_sizes"], inputs["attention_mask"])
        assert torch.equal(positional.logits, w(**inputs).logits)


def test_a_deep_copy_is_wrapped_by_itself(model):
    inputs = make_inputs(model, ROWS)
    with mmcompress.wrap(model, image=REDUCER) as w:
        twin = copy.deepcopy(model)
        expected = w(**inputs).logits
        torch.nn.init.zeros_(twin.lm_head.weight)
        assert twin(**inputs).logits.abs().sum() == 0 and torch.equal(w(**inputs).logits, expected)
    assert "forward" in twin.__dict__
    mmcompress.unwrap(twin)
    assert "forward" not in twin.__dict__ and twin.forward.__self__ is twin


def test_max_length_counts_the_callers_prompt(model):
    inputs = make_inputs(model, ROWS)
    length = inputs["input_ids"].shape[1]
    with mmcompress.wrap(model, image=REDUCER) as w:
        out = w.generate(**inputs, max_length=length + 4, do_sample=False, eos_token_id=None)
        assert out.shape[1] == length + 4 and torch.equal(out, generate(w, inputs, max_new_tokens=4))
        default = w.generate(**inputs, do_sample=False, eos_token_id=None)
    assert default.shape == model.generate(**inputs, do_sample=False, eos_token_id=None).shape


def test_criteria_and_streamers_see_the_callers_prompt(model):
    inputs = make_inputs(model, [[(48, 48)]])
    seen, put = [], []

    class Watch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(input_ids.clone())
            return torch.full((len(input_ids),), input_ids.shape[1] >= inputs["input_ids"].shape[1] + 3)

    class Streamer:
        def put(self, value):
            put.append(value.clone())

        def end(self):
            put.append("end")

    with mmcompress.wrap(model, image=REDUCER) as w:
        out = generate(w, inputs, stopping_criteria=StoppingCriteriaList([Watch()]), streamer=Streamer())
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3 and torch.equal(seen[-1], out)
    assert torch.equal(put[0], inputs["input_ids"]) and put[-1] == "end" and torch.equal(torch.cat(put[1:-1]), out[0, -3:])


def test_no_mask_given(model):
    inputs = make_inputs(model, ROWS)
    bare = {k: v for k, v in inputs.items() if k != "attention_mask"}
    with mmcompress.wrap(model, image=REDUCER) as w:
        assert torch.equal(generate(w, bare, pad_token_id=PAD), generate(w, inputs))     # inferred as transformers does
        one = row_of(model, inputs, ROWS, 0)
        with_mask = w(**one).logits
        del one["attention_mask"]
        torch.testing.assert_close(w(**one).logits, with_mask)


def test_report(model):
    inputs = make_inputs(model, ROWS)
    with mmcompress.wrap(model, image=GlobalCom2(keep=0.3, newlines="all")) as w:
        generate(w, inputs)
        report = w.report
    first = report.items[0]
    assert (first.tokens_before, first.tokens_after) == (36 + 12 * 13, 57)               # floor(.3 * 192)
    assert (first.newlines_before, first.newlines_after, first.patches_after) == (12, 12, 45)
    assert first.nominal == 5 * 36 and first.kept_nominal == 45 / 180
    assert [i.prompt for i in report.items] == [0, 1, 1]
    assert report.prompt_before == inputs["input_ids"].shape[1] > report.prompt_after
    # 2 layers x keys and values x 2 heads of 8 x 4 bytes, three prompts
    assert report.kv_bytes_after == 3 * report.prompt_after * 2 * 2 * 2 * 8 * 4
    assert list(report.milliseconds) == ["plan", "encode", "reduce", "pack", "prefill", "decode"] and report.decode_steps == 4
    assert all(v > 0 for v in report.milliseconds.values())
    text = str(report)
    assert "192 -> 57 tokens (29.7%; newlines 12 -> 12; 25.0% of 180 nominal patches)" in text and "decode" in text
    assert report.to_dict()["tokens_after"] == sum(i.tokens_after for i in report.items)


def test_gaps_that_flash_attention_misreads_are_refused():
    model = llava_next()
    inputs, later = make_inputs(model, [[(48, 48)]]), make_inputs(model, [[(100, 40)]], seed=5)
    with mmcompress.wrap(model, image=REDUCER, positions="original") as w:
        first = generate(w, inputs, return_dict_in_generate=True)
        model.config.text_config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match=r"prefill_chunk_size(: transformers| with positions='original' under flash_att)"):
            generate(w, inputs, prefill_chunk_size=7)
        ids = torch.cat([first.sequences, later["input_ids"]], 1)
        with pytest.raises(ValueError, match="a new picture in a later turn with positions='original'"):
            generate(w, {**later, "input_ids": ids, "attention_mask": torch.ones_like(ids),
                         "past_key_values": first.past_key_values})


@given(st.lists(st.lists(st.tuples(st.integers(40, 1400), st.integers(40, 1400)), max_size=5), min_size=1, max_size=3),
       st.one_of(st.floats(0.02, 1.0), st.integers(1, 150)), st.sampled_from(["closed", "original"]))
@settings(max_examples=40, deadline=None)
def test_prompts_of_any_pictures_keep_exact_budgets(rows, keep, positions):
    """1 to 5 pictures a prompt, any sizes: placeholders, features and masks all come to the sum of the counts."""
    model, reducer = MODEL, GlobalCom2(keep=keep)
    inputs = make_inputs(model, rows)
    pure = mmcompress.compress(model, inputs, image=reducer, positions=positions)
    if not any(rows):
        assert pure["input_ids"] is inputs["input_ids"]
        return
    adapter = adapter_for(model)
    counts = [sum(reducer.count(adapter.layout(*size)) for size in row) for row in rows]
    texts = ((inputs["input_ids"] != IMAGE) & (inputs["attention_mask"] == 1)).sum(1)
    assert (pure["input_ids"] == IMAGE).sum(1).tolist() == counts
    assert (pure["attention_mask"].sum(1) - texts).tolist() == counts
    assert pure["input_ids"].shape[1] == int((texts + torch.tensor(counts)).max()) or pure["input_ids"] is inputs["input_ids"]
    assert [len(f) for f in pure["mm_encoder_outputs"]["image"].pooler_output] == [c for c in counts if c]
    if "position_ids" in pure:
        real = pure["attention_mask"].bool()
        for ids, mask in zip(pure["position_ids"], real):
            assert (ids[mask].diff() > 0).all() and int(ids[mask][0]) == 0


def test_the_question_reaches_a_reducer_that_asks_for_it(model):
    """Embeddings of the text after the picture, padding masked out, one row a picture."""
    seen = []

    class Asking(Uniform):
        reads_question = True

        def reduce(self, x, k):
            seen.append((x.question, x.question_mask))
            return super().reduce(x, k)

    inputs = make_inputs(model, [[(48, 48)], [(48, 48)]])
    with mmcompress.wrap(model, image=Asking(keep=0.3)) as w:
        w(**inputs)
    (question, mask), = seen
    for i in range(2):
        ids = row_of(model, inputs, [[(48, 48)], [(48, 48)]], i)["input_ids"][0]
        after = ids[int((ids == IMAGE).nonzero()[-1]) + 1:]
        assert torch.equal(question[i][mask[i]], model.get_input_embeddings()(after))


def test_names_files_and_dicts(model, tmp_path):
    for image in ("globalcom2", {"name": "globalcom2", "keep": 0.25}, GlobalCom2(), "configs/globalcom2-25.yaml"):
        with mmcompress.wrap(model, image=image) as w:
            assert w.config.image == GlobalCom2(keep=0.25)
    with mmcompress.wrap(model, "configs/globalcom2-25.yaml") as w:
        assert w.config.image == GlobalCom2(keep=0.25) and w.config.positions == "closed"


def test_errors_say_what_to_do(model, tmp_path):
    inputs = make_inputs(model, [[(48, 48)]])
    with pytest.raises(UnsupportedModelError, match=r"no adapter for model_type 'llama'; known: .*whisper; adapters/"):
        mmcompress.wrap(model.model.language_model, image="globalcom2")
    with pytest.raises(ValueError, match=r"no image reducer named 'nope'; known: .*globalcom2.*uniform"):
        mmcompress.wrap(model, image="nope")
    with pytest.raises(ValueError, match=r"GlobalCom2 has no option kep; it has keep, temperature"):
        mmcompress.wrap(model, image={"name": "globalcom2", "kep": 0.1})
    with pytest.raises(ValueError, match=r"pass a reducer"):
        mmcompress.wrap(model, image=GlobalCom2)
    with pytest.raises(ValueError, match=r"nothing to reduce: pass image="):
        mmcompress.wrap(model)
    with pytest.raises(FileNotFoundError, match=r"no configuration at nowhere.yaml; pass a YAML"):
        mmcompress.wrap(model, "nowhere.yaml")
    with pytest.raises(ValueError, match=r"either a configuration file or image="):
        mmcompress.wrap(model, "configs/globalcom2-25.yaml", image="uniform")
    with pytest.raises(ValueError, match=r"positions='shut': 'closed' or 'original'"):
        mmcompress.wrap(model, image="uniform", positions="shut")
    (tmp_path / "bad.yaml").write_text("picture: {name: globalcom2}\n")
    with pytest.raises(ValueError, match=r"unknown keys picture; a configuration has image, video, audio, layers, budget"):
        mmcompress.wrap(model, tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match=r"temperature=-1"):
        GlobalCom2(temperature=-1)
    with pytest.raises(ValueError, match=r"paper_code=True fixes"):
        GlobalCom2(paper_code=True, alpha=0.3)
    with mmcompress.wrap(model, image=REDUCER) as w:
        few = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, 5)}
        with pytest.raises(ValueError, match=r"1 of 1 pictures have no placeholders in input_ids"):
            generate(w, few)
        many = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.full((1, 3), IMAGE)], 1),
                "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(1, 3, dtype=torch.long)], 1)}
        with pytest.raises(ValueError, match=r"prompt 0 has 3 image placeholders too many: there is no picture left"):
            generate(w, many)
        with pytest.raises(ValueError, match=r"needs input_ids; inputs_embeds"):
            w.generate(inputs_embeds=torch.randn(1, 4, 32), pixel_values=inputs["pixel_values"],
                       image_sizes=inputs["image_sizes"])
        with pytest.raises(ValueError, match=r"attention_mask must be the processor's 2-D mask"):
            w(**{**inputs, "attention_mask": torch.ones(1, 1, 4, 4)})
        with pytest.raises(ValueError, match=r"item=3: the last call had"):
            w(**inputs)
            w.plot(None, item=3)
    with mmcompress.wrap(llava_next("siglip"), image=ClsTopK()) as w, pytest.raises(SignalError, match=r"no \[CLS\] token"):
        w(**inputs)
    with pytest.raises(UnsupportedModelError, match=r"strategy='full' with a \[CLS\] vision tower"):
        mmcompress.compress(llava(), {**make_inputs(llava(), [[0]]), "vision_feature_select_strategy": "full"}, image="uniform")


def test_an_old_transformers_is_refused(model, monkeypatch):
    def forward(self, input_ids=None, pixel_values=None):
        raise AssertionError

    old = llava_next()
    monkeypatch.setattr(type(old), "forward", forward)
    with pytest.raises(UnsupportedModelError, match=r"no precomputed features .*transformers >= 5.18: pip install -U"):
        mmcompress.wrap(old, image="uniform")


def test_a_transformers_with_another_name_for_caches_is_refused(monkeypatch):
    def forward(self, input_ids=None, mm_encoder_outputs=None, cache=None):
        raise AssertionError

    new = llava_next()
    monkeypatch.setattr(type(new), "forward", forward)
    with pytest.raises(UnsupportedModelError, match=r"renamed to cache in 5.24.*pip install 'transformers>=5.18,<5.24'"):
        mmcompress.wrap(new, image="uniform")


def test_a_later_patch_is_not_overwritten(model):
    w = mmcompress.wrap(model, image=REDUCER)
    ours, model.__dict__["forward"] = model.__dict__["forward"], lambda *a, **k: None
    with pytest.raises(WrapError, match=r"forward was replaced after the wrap"):
        w.remove()
    model.__dict__["forward"] = ours
    w.remove()
    assert "forward" not in model.__dict__


def test_a_reducer_that_breaks_its_promise(model):
    class Liar(Uniform):
        def count(self, layout):
            return 7

        def __call__(self, x):
            return Uniform(keep=9)(x)

    with mmcompress.wrap(model, image=Liar()) as w, pytest.raises(ValueError, match=r"returned \(1, 9\).*promised \(1, 7\)"):
        w(**make_inputs(model, [[(48, 48)]]))


def test_register_and_save_ones_own(model, tmp_path):
    with mmcompress.wrap(model, image=Own(keep=0.5)) as w:
        with pytest.raises(ValueError, match=r"is not registered.*mmcompress.register"):
            w.save_pretrained(tmp_path)
        mmcompress.register("image", "own", f"{Own.__module__}:Own")
        try:
            w.save_pretrained(tmp_path)
        finally:
            from mmcompress import registry
            del registry._REDUCERS["image"]["own"]
    with pytest.raises(ValueError, match=r"image reducer 'globalcom2' is .* already"):
        mmcompress.register("image", "globalcom2", "elsewhere:Thing")
    with pytest.raises(ValueError, match=r"no slot 'smell'"):
        mmcompress.register("smell", "x", "a:b")


class Own(AveragePool):
    pass


def test_mistral_language_model():
    model = llava_next(language="mistral")
    rows = [[(48, 48)], [(100, 40)]]
    inputs = make_inputs(model, rows)
    with mmcompress.wrap(model, image=REDUCER) as w:
        out = generate(w, inputs)
    assert torch.equal(out[1, -5:], greedy_reference(model, row_of(model, inputs, rows, 1), REDUCER, 5))
