"""Reducers inside the language model: against an independent dense decoder, and the list of what every method gets free."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import layer_reducer
from dense import dense, embedded, fastv, pool, pyramid
from tiny import IMAGE, llava, llava_next, make_inputs, row_of

import mmcompress
from mmcompress import SignalError, UnsupportedModelError, WrapError
from mmcompress.image import AveragePool, GlobalCom2, GlobalRank, Uniform
from mmcompress.layers import FastV, InLayer, PyramidDrop, StagePool

ROWS = [[(48, 48)], [(30, 70), (100, 40)], [], [(48, 48)]]      # one, two, no pictures, and a layout seen before
QUIET = dict(do_sample=False, eos_token_id=None, suppress_tokens=[IMAGE])


@pytest.fixture(scope="module")
def model():
    return llava_next(depth=4)


def wrapped(model, *reducers, **options):
    return mmcompress.wrap(model, layers=list(reducers), **options)


# against the dense decoder --------------------------------------------------------------------------------------------


def cases(sizes):
    """Reducer -> the rules by which an independent decoder does the same."""
    return [(FastV(2, 0.4), {2: fastv(0.4)}), (FastV(1, 0.25), {1: fastv(0.25)}),
            (PyramidDrop(((1, 0.5), (3, 0.2))), {1: pyramid(sizes, 0.5), 3: pyramid(sizes, 0.2)}),
            (PyramidDrop(((2, 0.3),), positions="original"), {2: pyramid(sizes, 0.3, renumber=False)}),
            (StagePool(1, 8), {1: pool(8)}), (StagePool(3, 3), {3: pool(3)})]


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_forward_equals_the_dense_decoder(number, attention):
    model = llava_next(depth=4, attn_implementation=attention)
    for side in ("left", "right"):
        inputs = make_inputs(model, ROWS, side)
        reducer = cases([])[number][0]
        with wrapped(model, reducer) as w:
            out, prompt = w(**inputs).logits, w.prompt
            items = w.last
        done = 0
        for i in range(len(ROWS)):
            single = row_of(model, inputs, ROWS, i)
            x, spans = embedded(model, single)
            rules = cases([layout.tokens for _, layout in spans])[number][1] if spans else {}
            expected, columns = dense(model, x, spans, rules, [len(x) - 1])
            real = prompt.column[i] >= 0
            torch.testing.assert_close(out[i][real], expected, atol=2e-4, rtol=2e-4)
            for start, layout in spans:                          # the same tokens stay
                mine = items[done].at(3).index + start
                assert torch.equal(mine, columns[(columns >= start) & (columns < start + layout.tokens)])
                done += 1


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients_equal_the_dense_decoder(number, side):
    """Mixed batch of rows with one, two and no pictures, and several answers in a row: queries are the tokens before each."""
    model = llava_next(depth=4)
    inputs = make_inputs(model, ROWS, side)
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    for i in range(len(ROWS)):
        text = ((ids[i] != IMAGE) & (inputs["attention_mask"][i] == 1)).nonzero()[:, 0]
        chosen = torch.cat([text[2:4], text[-2:]])               # two answers, the first before any picture
        labels[i, chosen] = ids[i, chosen]
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    with wrapped(ours, cases([])[number][0]) as w:
        loss = w(**inputs, labels=labels).loss
        loss.backward()
    total, count = 0.0, 0
    for i in range(len(ROWS)):
        single = row_of(theirs, inputs, ROWS, i)
        mine = labels[i][inputs["attention_mask"][i].bool()]
        answer = mine != -100
        queries = [c for c in range(len(mine) - 1) if answer[c + 1] and not answer[c]]
        x, spans = embedded(theirs, single)
        rules = cases([layout.tokens for _, layout in spans])[number][1] if spans else {}
        logits, columns = dense(theirs, x, spans, rules, queries)
        target = mine[columns]
        total = total + F.cross_entropy(logits[:-1], target[1:], ignore_index=-100, reduction="sum")
        count += int((target[1:] != -100).sum())
    (total / count).backward()
    torch.testing.assert_close(loss, total / count, atol=1e-5, rtol=1e-5)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        if b.grad is not None and a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=2e-5, rtol=2e-3, msg=lambda m: f"{name}: {m}")  # noqa: B023
    assert ours.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("number", range(6))
def test_generate_equals_a_dense_greedy_loop(model, number):
    """No cache, no batch, no padding on their side; per-layer caches on ours."""
    inputs = make_inputs(model, ROWS)
    with wrapped(model, cases([])[number][0]) as w:
        out = w.generate(**inputs, max_new_tokens=5, **QUIET)
        uncached = w.generate(**inputs, max_new_tokens=5, use_cache=False, **QUIET)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :length], inputs["input_ids"]) and torch.equal(out, uncached)
    embed = model.get_input_embeddings()
    for i in range(len(ROWS)):
        with torch.no_grad():
            x, spans = embedded(model, row_of(model, inputs, ROWS, i))
            rules = cases([layout.tokens for _, layout in spans])[number][1] if spans else {}
            asked, tokens = len(x) - 1, []
            for _ in range(5):
                logits, _ = dense(model, x, spans, rules, [asked])
                logits[-1, IMAGE] = -torch.inf
                tokens.append(int(logits[-1].argmax()))
                x = torch.cat([x, embed(torch.tensor([tokens[-1]]))])
        assert out[i, length:].tolist() == tokens


def test_an_image_reducer_before_and_a_layer_reducer_after():
    """The dense decoder gets what GlobalCom2 left and applies FastV to it; reading order and budgets multiply."""
    model = llava_next(depth=4)
    inputs = make_inputs(model, [[(48, 48)], [(100, 40)]])
    with mmcompress.wrap(model, image=GlobalCom2(keep=0.5), layers=[FastV(2, 0.5)]) as w:
        out, prompt, items, report = w(**inputs).logits, w.prompt, w.last, w.report
        generated = w.generate(**inputs, max_new_tokens=4, **QUIET)
    for i in range(2):
        single = row_of(model, inputs, [[0], [0]], i)
        small = mmcompress.compress(model, single, image=GlobalCom2(keep=0.5))
        x = model.get_input_embeddings()(small["input_ids"][0])
        placeholders = (small["input_ids"][0] == IMAGE).nonzero()[:, 0]
        x[placeholders] = small["mm_encoder_outputs"]["image"].pooler_output[0]
        span = (int(placeholders[0]), type("Layout", (), {"tokens": len(placeholders)}))
        expected, _ = dense(model, x, [span], {2: fastv(0.5)}, [len(x) - 1])
        torch.testing.assert_close(out[i][prompt.column[i] >= 0], expected, atol=2e-4, rtol=2e-4)
        n = items[i].layout.tokens
        assert items[i].after == n // 2 and items[i].at(2).after == n // 2 // 2 and items[i].at(1) is items[i]
        assert set(items[i].at(2).index.tolist()) < set(items[i].index.tolist())
        with mmcompress.wrap(model, image=GlobalCom2(keep=0.5), layers=[FastV(2, 0.5)]) as w:
            assert torch.equal(w.generate(**single, max_new_tokens=4, **QUIET)[0, -4:], generated[i, -4:])
    assert report.layers[0].layer == 2 and report.layers[0].tokens == sum(i.at(2).after for i in items)
    assert report.tokens_mean == (2 * report.tokens_after + 2 * report.layers[0].tokens) / 4


def test_an_image_reducer_in_a_layer():
    """AveragePool on hidden states equals AveragePool's own partition applied to the dense decoder's."""
    model = llava_next(depth=4)
    inputs = make_inputs(model, [[(48, 48)]])
    reducer = AveragePool(keep=0.3)
    with wrapped(model, InLayer(2, reducer)) as w:
        out, item = w(**inputs).logits[0], w.last[0]
    x, [(start, layout)] = embedded(model, inputs)
    source = item.at(2).source
    groups = [[start + p for p in (source == s).nonzero()[:, 0].tolist()] for s in range(reducer.count(layout))]
    index = item.at(2).index

    hidden, positions = x, torch.arange(len(x))
    from dense import run_layer
    for number, layer in enumerate(model.model.language_model.layers):
        if number == 2:
            keep = torch.cat([torch.arange(start), start + index, torch.arange(start + layout.tokens, len(x))])
            pooled = torch.stack([hidden[g].mean(0) for g in groups])
            hidden = torch.cat([hidden[:start], pooled, hidden[start + layout.tokens:]])
            positions = keep
        hidden, _ = run_layer(layer, hidden, positions)
    expected = model.lm_head(model.model.language_model.norm(hidden))
    torch.testing.assert_close(out, expected, atol=2e-4, rtol=2e-4)
    assert torch.equal(item.at(2).mass, torch.tensor([float(len(g)) for g in groups]))


# LLaVolta's pooling ---------------------------------------------------------------------------------------------------


def test_one_dimensional_pooling_is_avg_pool1d():
    from test_tokens import ADAPTER, tokens_of

    from mmcompress.layers import StridedPool
    x = tokens_of(ADAPTER.layout(48, 48))
    for stride in (1, 2, 3, 8, 192):
        got = StridedPool(stride)(x)
        expected = F.avg_pool1d(x.features.transpose(1, 2), stride, stride, ceil_mode=False).transpose(1, 2)
        torch.testing.assert_close(got.tokens[:, :expected.shape[1]], expected, atol=1e-5, rtol=1e-5)
        assert got.tokens.shape[1] == -(-192 // stride)
        position = F.avg_pool1d(torch.arange(192.0)[None], stride, stride).floor().long()
        assert torch.equal(got.index[:1, :position.shape[1]], position)


def test_two_dimensional_pooling_is_avg_pool2d_of_thumbnail_and_canvas():
    from test_tokens import ADAPTER, tokens_of

    from mmcompress.layers import StridedPool
    layout = ADAPTER.layout(48, 48)                                             # 6 x 6 thumbnail, 12 x 12 canvas
    x = tokens_of(layout)
    got = StridedPool(4, dims=2)(x)
    grid = lambda t, h, w: t.unflatten(1, (h, w)).movedim(3, 1)  # noqa: E731
    flat = lambda t: t.movedim(1, 3).flatten(1, 2)  # noqa: E731
    thumbnail = flat(F.avg_pool2d(grid(x.features[:, :36], 6, 6), 2))
    canvas = x.features[:, 36:].unflatten(1, (12, 13))
    cells = flat(F.avg_pool2d(canvas[:, :, :12].movedim(3, 1), 2)).unflatten(1, (6, 6))
    newlines = canvas[:, :, 12].unflatten(1, (6, 2)).mean(2)
    expected = torch.cat([thumbnail, torch.cat([cells, newlines[:, :, None]], 2).flatten(1, 2)], 1)
    torch.testing.assert_close(got.tokens, expected, atol=1e-5, rtol=1e-5)
    assert (got.index.diff() > 0).all() and got.index[0, 0] == 0 and got.index[0, 9] == 36
    ragged = ADAPTER.layout(70, 48)
    pooled = StridedPool(8, dims=2)
    assert pooled(tokens_of(ragged)).tokens.shape[1] == pooled.count(ragged)
    alone = StridedPool(4, dims=2)(tokens_of(ADAPTER.layout(20, 20)))
    assert alone.tokens.shape[1] == StridedPool(4, dims=2).count(ADAPTER.layout(20, 20))


# what every method gets free ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_keep_one_is_bit_identical(model, layer_method, side):
    inputs = make_inputs(model, ROWS, side)
    stock = model(**inputs).logits
    with wrapped(model, layer_reducer(layer_method, 1.0) if layer_method != "pyramid_drop" else PyramidDrop(((1, 1.0),))) as w:
        assert torch.equal(w(**inputs).logits, stock) and w.report.layers == []
    if side == "left":
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        with wrapped(model, FastV(2, 1.0)) as w:
            assert torch.equal(w.generate(**inputs, max_new_tokens=5, do_sample=False), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_batches_beams_samples_and_caches_equal_rows_alone(layer_method, attention):
    model = llava_next(depth=4, attn_implementation=attention)
    inputs = make_inputs(model, ROWS)
    with wrapped(model, layer_reducer(layer_method)) as w:
        greedy = w.generate(**inputs, max_new_tokens=4, **QUIET)
        static = w.generate(**inputs, max_new_tokens=4, cache_implementation="static", **QUIET)
        beams = w.generate(**inputs, max_new_tokens=4, num_beams=3, **QUIET)
        assert torch.equal(static, greedy)
        for i in range(len(ROWS)):
            single = row_of(model, inputs, ROWS, i)
            assert torch.equal(w.generate(**single, max_new_tokens=4, **QUIET)[0, -4:], greedy[i, -4:])
            assert torch.equal(w.generate(**single, max_new_tokens=4, num_beams=3, **QUIET)[0, -4:], beams[i, -4:])
        torch.manual_seed(0)
        several = w.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=2, top_k=1, eos_token_id=None,
                             suppress_tokens=[IMAGE])
        assert torch.equal(several[::2], greedy) and torch.equal(several[1::2], greedy)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_a_second_turn_on_the_reused_cache(model, layer_method, implementation):
    """Turn two of text, as one block over a batch, equals the same tokens decoded one by one, each prompt alone."""
    from transformers import StaticCache
    inputs = make_inputs(model, ROWS)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=400) if implementation == "static" else None
    with wrapped(model, layer_reducer(layer_method)) as w:
        first = w.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, past_key_values=cache, **QUIET)
        cache = first.past_key_values
        lengths = [int(cache.get_seq_length(i)) for i in range(4)]
        assert lengths[0] == inputs["input_ids"].shape[1] + 2 and lengths[3] < lengths[0]
        turn = torch.randint(3, 97, (len(ROWS), 6), generator=torch.Generator().manual_seed(1))
        ids = torch.cat([first.sequences, turn], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(ROWS), ids.shape[1] - lengths[0] + 2, dtype=torch.long)], 1)
        second = w.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, **QUIET)
    # by hand: the same prompts one at a time, teacher-forced token by token without a cache of their own
    for i in range(len(ROWS)):
        single = row_of(model, inputs, ROWS, i)
        with wrapped(model, layer_reducer(layer_method)) as w:
            one = w.generate(**single, max_new_tokens=3, return_dict_in_generate=True, **QUIET)
            assert torch.equal(one.sequences[0, -3:], first.sequences[i, -3:])
            past, tokens, step = one.past_key_values, [], torch.cat([one.sequences[0, -1:], turn[i]])
            for token in step.tolist():                          # one at a time: nothing but decoding is trusted
                out = model(input_ids=torch.tensor([[token]]), past_key_values=past)
            for _ in range(4):
                out.logits[0, -1, IMAGE] = -torch.inf
                tokens.append(int(out.logits[0, -1].argmax()))
                out = model(input_ids=torch.tensor([[tokens[-1]]]), past_key_values=past)
        assert second[i, -4:].tolist() == tokens


def test_a_new_picture_in_a_later_turn(model, layer_method):
    """Its tokens are ranked and dropped on top of the reduced cache; a batch equals its rows alone, padding in the middle."""
    first_rows, second_rows = [[(48, 48)], [(30, 70)]], [[(100, 40)], [(48, 48)]]
    one, two = make_inputs(model, first_rows), make_inputs(model, second_rows, seed=3)

    def talk(first, second):
        with wrapped(model, layer_reducer(layer_method)) as w:
            begun = w.generate(**first, max_new_tokens=2, return_dict_in_generate=True, **QUIET)
            ids = torch.cat([begun.sequences, second["input_ids"]], 1)
            new = begun.sequences.shape[1] - first["input_ids"].shape[1]
            said = torch.ones(len(ids), new, dtype=torch.long)
            mask = torch.cat([first["attention_mask"], said, second["attention_mask"]], 1)
            out = w.generate(**{**second, "input_ids": ids, "attention_mask": mask}, past_key_values=begun.past_key_values,
                             max_new_tokens=3, return_dict_in_generate=True, **QUIET)
            lengths = [int(out.past_key_values.get_seq_length(i)) for i in range(4)]
            assert w.last[0].at(3).after < w.last[0].before
            return out.sequences[:, -3:], lengths
    both, lengths = talk(one, two)
    assert lengths[3] < lengths[0]
    for i in range(2):
        alone, _ = talk(row_of(model, one, first_rows, i), row_of(model, two, second_rows, i))
        assert torch.equal(alone[0], both[i])


@pytest.mark.parametrize("reducer", [StagePool(1, 4), StagePool(1, 4, positions="closed"), InLayer(2, Uniform(keep=0.3)),
                                     InLayer(2, Uniform(keep=0.3), positions="closed")], ids=repr)
def test_a_conversation_on_the_cache_equals_one_fresh_prompt(model, reducer):
    """Where the choice does not depend on the question, two turns with a picture each are one prompt with both pictures."""
    one, two = make_inputs(model, [[(48, 48)]]), make_inputs(model, [[(48, 48)]], seed=3)
    with wrapped(model, reducer) as w:
        begun = w.generate(**one, max_new_tokens=2, return_dict_in_generate=True, **QUIET)
        ids = torch.cat([begun.sequences, two["input_ids"]], 1)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        later = w.generate(**{**two, **whole}, past_key_values=begun.past_key_values, max_new_tokens=4,
                           return_dict_in_generate=True, output_logits=True, **QUIET)
        pictures = {k: torch.cat([one[k], two[k]]) for k in ("pixel_values", "image_sizes")}
        fresh = w.generate(**whole, **pictures, max_new_tokens=4, return_dict_in_generate=True, output_logits=True, **QUIET)
    assert torch.equal(later.sequences, fresh.sequences)
    for a, b in zip(later.logits, fresh.logits):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)
    for layer in range(4):
        assert later.past_key_values.get_seq_length(layer) == fresh.past_key_values.get_seq_length(layer)


def test_a_callers_own_decoding_loop(model, layer_method):
    inputs = make_inputs(model, ROWS)
    with wrapped(model, layer_reducer(layer_method)) as w:
        expected = w.generate(**inputs, max_new_tokens=4, **QUIET)[:, -4:]
        out = w(**inputs, position_ids=inputs["attention_mask"].cumsum(1).sub(1).clamp_min(0), use_cache=True)
        mask, tokens = inputs["attention_mask"], []
        for _ in range(4):
            logits = out.logits[:, -1].clone()
            logits[:, IMAGE] = -torch.inf
            tokens.append(logits.argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], 1)
            positions = mask.sum(1, keepdim=True) - 1
            out = w(input_ids=tokens[-1], attention_mask=mask, position_ids=positions, past_key_values=out.past_key_values)
    assert torch.equal(torch.cat(tokens, 1), expected)


def test_remove_leaves_nothing(model, layer_method):
    inputs = make_inputs(model, ROWS)
    stock = model(**inputs).logits
    hooks = {name: list(m._forward_pre_hooks) for name, m in model.named_modules()}
    w = wrapped(model, layer_reducer(layer_method))
    w.generate(**inputs, max_new_tokens=2, **QUIET)
    assert w.remove() is model
    assert {name: list(m._forward_pre_hooks) for name, m in model.named_modules()} == hooks
    assert "_mmcompress" not in model.__dict__ and torch.equal(model(**inputs).logits, stock)
    with pytest.raises(WrapError, match="was removed"):
        w(**inputs)


def test_configuration_round_trip(model, layer_method, tmp_path):
    w = mmcompress.wrap(model, image=GlobalRank(keep=0.5), layers=[layer_reducer(layer_method)])
    w.save_pretrained(tmp_path)
    w.remove()
    with mmcompress.from_pretrained(model, tmp_path) as again:
        assert again.config == w.config
    with mmcompress.wrap(model, layers=layer_method if layer_method != "pyramid_drop" else PyramidDrop.for_depth(4)) as third:
        assert len(third.config.layers) == 1


def test_bf16(layer_method):
    model = llava_next(depth=4).to(torch.bfloat16)
    inputs = make_inputs(model, ROWS)
    with wrapped(model, layer_reducer(layer_method)) as w:
        out = w(**inputs)
        assert out.logits.dtype == torch.bfloat16 and torch.isfinite(out.logits).all()
        assert w.generate(**inputs, max_new_tokens=3, **QUIET).shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(layer_method, reentrant):
    plain = llava_next(depth=4).train()
    inputs = make_inputs(plain, ROWS, "right")
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    grads = []
    for model in (plain, saving):
        with wrapped(model, layer_reducer(layer_method)) as w:
            w(**inputs, labels=labels).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-6, rtol=1e-4)


def test_two_forwards_before_one_backward(model, layer_method):
    """State travels with the call: the second forward does not disturb the first one's graph."""
    tuned = copy.deepcopy(model)
    a, b = make_inputs(tuned, [[(48, 48)]]), make_inputs(tuned, [[(30, 70)], [(48, 48)]], seed=5)

    def loss(w, inputs):
        return w(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)).loss
    with wrapped(tuned, layer_reducer(layer_method)) as w:
        loss(w, a).backward()
        loss(w, b).backward()
        apart = [p.grad.clone() for p in tuned.parameters() if p.grad is not None]
        tuned.zero_grad()
        (loss(w, a) + loss(w, b)).backward()
    for x, y in zip(apart, (p.grad for p in tuned.parameters() if p.grad is not None)):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)


def test_packed_rows_stay_packed(layer_method):
    """Two conversations packed in one row by position ids that begin again: each is as if it were alone."""
    model = llava_next(depth=4)
    rows = [[(48, 48)], [(30, 70)]]
    apart = make_inputs(model, rows)
    singles = [row_of(model, apart, rows, i) for i in range(2)]
    labels = [s["input_ids"].masked_fill(s["input_ids"] == IMAGE, -100) for s in singles]
    for one in labels:
        one[:, 0] = -100
        one[:, 1:-4] = -100                                      # one answer each, at the end
    packed = {"input_ids": torch.cat([s["input_ids"] for s in singles], 1), "pixel_values": apart["pixel_values"],
              "image_sizes": apart["image_sizes"], "labels": torch.cat(labels, 1),
              "position_ids": torch.cat([torch.arange(s["input_ids"].shape[1]) for s in singles])[None]}
    with wrapped(model, layer_reducer(layer_method)) as w:
        if layer_method in ("fastv", "pyramid_drop"):            # queries of the other conversation see nothing of this one
            w(**packed, use_cache=False)
            mine = [i.at(3).index for i in w.last]
            for s, one, found in zip(singles, labels, mine):
                w(**s, labels=one)
                assert torch.equal(w.last[0].at(3).index, found)
        out = w(**packed, use_cache=False).logits[0]
        lengths = []
        for s, one in zip(singles, labels):
            alone = w(**s, labels=one).logits[0]
            torch.testing.assert_close(out[sum(lengths):sum(lengths) + len(alone)], alone, atol=2e-4, rtol=2e-4)
            lengths.append(len(alone))
    assert sum(lengths) == len(out)


@pytest.mark.parametrize("order", ["peft first", "wrap first"])
def test_peft(layer_method, order):
    from peft import LoraConfig, get_peft_model
    model = llava_next(depth=4)
    inputs = make_inputs(model, ROWS)
    with wrapped(model, layer_reducer(layer_method)) as w:
        expected = w(**inputs).logits
    lora = LoraConfig(target_modules=r".*language_model.*q_proj", r=2)
    tuned = get_peft_model(model, lora) if order == "peft first" else model
    w = wrapped(tuned, layer_reducer(layer_method))
    tuned = tuned if order == "peft first" else get_peft_model(model, lora)
    assert torch.equal(tuned(**inputs).logits, expected)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    tuned(**inputs, labels=labels).loss.backward()
    assert any("lora" in n and p.grad is not None and p.grad.abs().sum() > 0 for n, p in tuned.named_parameters())
    w.remove()


def test_accelerate_hooks_and_copies(layer_method):
    from accelerate import dispatch_model
    model = llava_next(depth=4)
    inputs = make_inputs(model, ROWS)
    w = wrapped(model, layer_reducer(layer_method))
    expected = w(**inputs).logits
    twin = copy.deepcopy(model)                                  # a copy is wrapped by itself
    mmcompress.unwrap(model)
    assert torch.equal(twin(**inputs).logits, expected) and model(**inputs).logits.shape != expected.shape
    mmcompress.unwrap(twin)
    dispatched = dispatch_model(twin, {"": "cpu"}, force_hooks=True)
    with wrapped(dispatched, layer_reducer(layer_method)) as w:
        assert torch.equal(w(**inputs).logits, expected)


def test_llava_one_and_a_half(layer_method):
    model = llava()
    reducer = {"fastv": FastV(1, 0.3), "pyramid_drop": PyramidDrop(((1, 0.3),)), "stage_pool": StagePool(1, 4, dims=2),
               "in_layer": InLayer(1, Uniform(keep=0.3))}.get(layer_method)
    if reducer is None:
        pytest.skip("a newcomer's layer reducer with layers of its own")
    rows = [[0], [0, 0], []]
    inputs = make_inputs(model, rows)
    with wrapped(model, reducer) as w:
        out = w.generate(**inputs, max_new_tokens=4, **QUIET)
        for i in range(3):
            assert torch.equal(w.generate(**row_of(model, inputs, rows, i), max_new_tokens=4, **QUIET)[0, -4:], out[i, -4:])


def flash_like(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """What FlashAttention computes from what transformers hands it: a 2-D mask of keys, queries at the end of the keys."""
    positions = kwargs.get("position_ids")
    if positions is not None and len(query) == 1 and query.shape[2] > 1 and attention_mask is None:
        assert (positions.diff() == 1).all(), "transformers would take these positions for packed sequences"
    groups, q, k = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    seen = torch.ones(q, k, dtype=torch.bool).tril(k - q)[None, None]
    if attention_mask is not None:
        assert attention_mask.shape == (len(query), k)
        seen = seen & attention_mask.bool()[:, None, None]
    logits = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, -1e9)
    return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], [ROWS[0], ROWS[3]]], ids=["ragged", "one", "even"])
def test_the_masks_of_flash_attention(layer_method, rows):
    """FlashAttention's contract played on the CPU, where the real one does not run: 2-D masks per layer, no gaps shown."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask
    AttentionInterface.register("flash_like", flash_like)
    AttentionMaskInterface.register("flash_like", flash_attention_mask)
    model, flash = llava_next(depth=4), llava_next(depth=4)
    flash.model.language_model.config._attn_implementation = "flash_like"
    for side in ("left", "right"):
        inputs = make_inputs(model, rows, side)
        outs = []
        for one in (model, flash):
            with wrapped(one, layer_reducer(layer_method)) as w:
                outs.append((w(**inputs).logits, w.prompt.column >= 0, w.generate(**inputs, max_new_tokens=4, **QUIET)))
        (a, real, x), (b, _, y) = outs
        torch.testing.assert_close(a[real], b[real], atol=2e-4, rtol=2e-4)
        assert torch.equal(x, y)


def test_reducers_compile_without_a_break(layer_method):
    from dataclasses import replace

    from test_tokens import ADAPTER, tokens_of
    x = tokens_of(ADAPTER.layout(70, 48))
    x = replace(x, attention=torch.rand(x.features.shape[:2], generator=torch.Generator().manual_seed(0)))
    for step in layer_reducer(layer_method).steps():
        def reduce(x, reducer=step.reducer):
            out = reducer(x)
            return out.tokens, out.index, out.source
        torch._dynamo.reset()
        for got, expected in zip(torch.compile(reduce, fullgraph=True, backend="aot_eager")(x), reduce(x)):
            torch.testing.assert_close(got, expected)


# reports and errors ---------------------------------------------------------------------------------------------------


def test_report_counts_columns_layer_by_layer(model):
    inputs = make_inputs(model, [[(48, 48)]])
    length = inputs["input_ids"].shape[1]
    with wrapped(model, PyramidDrop(((1, 0.5), (3, 0.25)))) as w:
        out = w.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True, **QUIET)
        report = w.report
    held = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert held == [length, length - 96, length - 96, length - 144]
    assert report.kv_bytes_after == sum(2 * layer.keys.numel() * 4 for layer in out.past_key_values.layers)
    assert [(x.layer, x.tokens, x.columns) for x in report.layers] == [(1, 96, length - 96), (3, 48, length - 144)]
    assert report.tokens_mean == (192 + 96 + 96 + 48) / 4 and report.flops_after < report.flops_before
    assert "from layer 3 of 4: 48 image tokens" in str(report) and report.to_dict()["layers"][0]["tokens"] == 96


def test_plot_of_a_layer_shows_what_is_left_there(model):
    from PIL import Image
    inputs = make_inputs(model, [[(48, 48)]])
    with mmcompress.wrap(model, image=Uniform(keep=0.5), layers=[FastV(2, 0.5)]) as w:
        w(**inputs)
        picture = Image.new("RGB", (48, 48))
        said = [[t.get_text() for t in w.plot(picture, layer=layer).texts] for layer in (None, 1, 2, 3)]
    assert said[0] == said[1] and said[2] == said[3]
    assert "192 → 96 tokens" in said[0] and "192 → 48 tokens" in said[2]
    assert any("decoder layer 2" in t for t in said[2])


def test_prefill_flops_are_those_of_the_matrix_products():
    """Counted by torch itself on eager attention, whose full maps cost twice the causal half."""
    from torch.utils.flop_counter import FlopCounterMode

    from mmcompress.flops import prefill_flops
    model = llava_next(depth=3, attn_implementation="eager")
    lm, config = model.model.language_model, model.config
    with FlopCounterMode(display=False) as counter:
        lm(inputs_embeds=torch.zeros(2, 50, 32), use_cache=False)
    attention = 2 * 3 * 2 * 50 * 50 * 32                          # rows x layers x 2 n n d: the half that is not counted
    rope = 2 * (8 // 2) * 50                                      # inverse frequencies times positions, as a matrix product
    assert abs(counter.get_total_flops() - prefill_flops(config, 2, [50] * 3) - attention) <= rope


def test_disable_and_reconfigure(model):
    inputs = make_inputs(model, [[(48, 48)]])
    stock = model(**inputs).logits
    with mmcompress.wrap(model, image=Uniform(keep=0.5)) as w:
        w.configure(mmcompress.WrapConfig(layers=(FastV(2, 0.5),)))
        assert w(**inputs).logits.shape[1] == stock.shape[1] - 96
        with w.disable():
            assert torch.equal(w(**inputs).logits, stock)
        w.configure(mmcompress.WrapConfig(image=Uniform(keep=0.25)))
        assert w(**inputs).logits.shape[1] == stock.shape[1] - 144


def test_errors_say_what_to_do(model):
    with pytest.raises(ValueError, match=r"layer=0.*wrap\(model, image="):
        FastV(0, 0.5)
    with pytest.raises(ValueError, match=r"this language model has 4 layers"):
        wrapped(model, FastV(4, 0.5))
    with pytest.raises(ValueError, match=r"both work at layer 2"):
        wrapped(model, FastV(2, 0.5), StagePool(2, 2))
    with pytest.raises(ValueError, match=r"layers must rise"):
        PyramidDrop(((3, 0.5), (2, 0.25)))
    with pytest.raises(ValueError, match=r"stride=0"):
        StagePool(2, 0)
    with pytest.raises(ValueError, match=r"dims=3"):
        StagePool(2, 2, dims=3)
    with pytest.raises(ValueError, match=r"its count depends on data"):
        InLayer(2, GlobalCom2(keep=0.5, paper_code=True))
    both = mmcompress.wrap(model, image=Uniform(keep=0.5), layers=[StagePool(2, 4, dims=2)])
    with pytest.raises(SignalError, match=r"places on it are no longer a grid"), both as w:
        w(**make_inputs(model, [[(48, 48)]]))
    with pytest.raises(ValueError, match=r"compress\(\) reduces pictures, clips and recordings before the language model"):
        mmcompress.compress(model, {}, image=None)
    inputs = make_inputs(model, [[(48, 48)]])
    with wrapped(model, FastV(2, 0.5)) as w:
        for option in ({"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 16}, {"assistant_model": model}):
            with pytest.raises(ValueError, match=r"cache's layers have different lengths"):
                w.generate(**inputs, max_new_tokens=2, **option)
        cache = w(**inputs, use_cache=True).past_key_values
        cache.crop(-20)
        with pytest.raises(ValueError, match=r"cropped to .* columns"):
            w(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert "forward" not in model.__dict__


def test_sliding_windows_are_refused():
    model = llava_next(depth=4, language="mistral")
    model.config.text_config.sliding_window = 16
    model.config.text_config.layer_types = ["sliding_attention"] * 4
    with pytest.raises(UnsupportedModelError, match="sliding-window attention counts columns"):
        wrapped(model, FastV(2, 0.5))
