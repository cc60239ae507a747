"""FastAdaSP against slow loops, a dense softmax and an independent decoder; layer reducers on recordings."""

import copy

import pytest
import torch
import torch.nn.functional as F
from dense import attention_map, rotate
from dense_audio import build, dense, embedded, slowly
from tiny import llava_next
from tiny_audio import AUDIO, Recording, make_inputs, row_of, rows_for

import mmcompress
from mmcompress import SignalError, UnsupportedModelError
from mmcompress.audio import FastAdaSP, MeanPool
from mmcompress.audio.fastadasp import join_neighbours, likeness
from mmcompress.layers import FastV, PyramidDrop, StagePool
from mmcompress.layers.attention import Reading
from mmcompress.layers.base import steps_of
from mmcompress.layers.masks import Columns
from mmcompress.layers.plan import Span, plan_layers
from mmcompress.layout import AudioLayout
from mmcompress.tokens import Tokens

FAMILIES = ("qwen2_audio", "voxtral", "audioflamingo3")
QUIET = dict(do_sample=False, eos_token_id=None, suppress_tokens=[AUDIO])
ONCE, OFTEN = FastAdaSP(2, 0.4), FastAdaSP(1, 0.7, "decay")
METHODS = {"once": ONCE, "constant": FastAdaSP(1, 0.7, "constant"), "decay": OFTEN, "mean": FastAdaSP(2, 0.3, weights="mean"),
           "closed": FastAdaSP(2, 0.4, positions="closed")}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return build(request.param)


def family(model):
    return model.config.model_type


def wrapped(model, *reducers, **options):
    return mmcompress.wrap(model, layers=list(reducers), **options)


# joining --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k", [(2, 1), (9, 8), (40, 17), (40, 1), (40, 40)])
def test_joining_equals_a_slow_loop(n, k):
    g = torch.Generator().manual_seed(n + k)
    h, s, w = torch.randn(3, n, 8, generator=g), torch.randn(3, n - 1, generator=g), torch.rand(3, n, generator=g) + 0.01
    s[1] = s[1].round()                                          # many ties: the earlier pair goes first
    got = join_neighbours(h, s, w, k)
    for b in range(3):
        groups, tokens = slowly(h[b], s[b], w[b], k)
        torch.testing.assert_close(got.tokens[b], tokens, atol=1e-5, rtol=1e-5)
        assert got.mass[b].tolist() == [len(x) for x in groups]
        assert got.source[b].tolist() == [i for i, x in enumerate(groups) for _ in x]
        assert got.index[b].tolist() == [max(x, key=lambda j: float(w[b, j])) for x in groups]
        alone = [i for i, x in enumerate(groups) if len(x) == 1]
        assert torch.equal(got.tokens[b, alone], h[b, [groups[i][0] for i in alone]])                 # untouched


def test_closed_forms_of_joining():
    h, w = torch.eye(4)[None], torch.tensor([[1.0, 3.0, 2.0, 2.0]])
    keys = torch.tensor([[[1.0, 0], [1, 0.1], [0, 1], [0, 1]]])
    s = likeness(keys)
    torch.testing.assert_close(s[0], torch.tensor([1 / 1.01**0.5, 0.1 / 1.01**0.5, 1.0]))
    three = join_neighbours(h, s, w, 3)                          # equal neighbours first
    assert three.source.tolist() == [[0, 1, 2, 2]] and three.index.tolist() == [[0, 1, 2]]
    two = join_neighbours(h, s, w, 2)
    torch.testing.assert_close(two.tokens[0], torch.tensor([[0.25, 0.75, 0, 0], [0, 0, 0.5, 0.5]]))
    assert two.index.tolist() == [[1, 2]]
    torch.testing.assert_close(join_neighbours(h, s, w, 1).tokens[0, 0], w[0] / 8)
    torch.testing.assert_close(join_neighbours(h, s, 0 * w, 1).tokens[0, 0], torch.full((4,), 0.25))
    x = Tokens(h, AudioLayout(4, 25.0), received=w, decoder_keys=keys[:, :, None])
    assert torch.equal(FastAdaSP(2, 0.5)(x).tokens, two.tokens)
    assert torch.equal(FastAdaSP(2, 0.5, weights="mean")(x).tokens, join_neighbours(h, s, torch.ones(1, 4), 2).tokens)
    with pytest.raises(SignalError, match="keys exist inside the language model"):
        ONCE(Tokens(h, AudioLayout(4, 25.0)))
    with pytest.raises(SignalError, match="attention that tokens receive"):
        ONCE(Tokens(h, AudioLayout(4, 25.0), decoder_keys=keys[:, :, None]))


def test_the_reducer_compiles_without_a_break():
    g = torch.Generator().manual_seed(0)
    x = Tokens(torch.randn(2, 30, 8, generator=g), AudioLayout(30, 25.0), received=torch.rand(2, 30, generator=g),
               decoder_keys=torch.randn(2, 30, 2, 4, generator=g))

    def reduce(x):
        out = ONCE(x)
        return out.tokens, out.index, out.source, out.mass
    for got, expected in zip(torch.compile(reduce, fullgraph=True, backend="aot_eager")(x), reduce(x)):
        torch.testing.assert_close(got, expected)


def test_schedules():
    shares = lambda reducer, depth: {s.layer: s.reducer.keep for s in steps_of([reducer], depth)}  # noqa: E731
    assert shares(FastAdaSP(2, 0.5), 8) == {2: 0.5}
    assert shares(FastAdaSP(3, 0.9, "constant"), 6) == {3: 0.9, 4: 0.9, 5: 0.9}
    assert shares(FastAdaSP(3, 0.9, "constant", last=4), 6) == {3: 0.9, 4: 0.9}
    decay = shares(FastAdaSP(3, 0.6, "decay"), 32)   # the code's l0 = 2; it removes none in layer 31
    assert list(decay) == list(range(3, 32))
    for layer, keep in decay.items():
        assert keep == pytest.approx(1 - 0.4 * (1 - (layer - 1 - 2) / (31 - 2)))
    assert all(s.reads == s.layer - 1 and s.signals == ("keys", "received") for s in steps_of([OFTEN], 4))
    assert FastAdaSP(2, weights="mean").steps()[0].signals == ("keys",)
    layout = AudioLayout(99, 25.0)
    plan = plan_layers(steps_of([FastAdaSP(1, 0.5, "constant")], 5), torch.ones(1, 99, dtype=torch.bool),
                       [Span(0, 0, layout, "audio")], "left", None, torch.device("cpu"))
    assert [s.columns for s in plan.stages] == [49, 24, 12, 6]


@pytest.mark.parametrize("options, message", [
    (dict(layer=0), r"layer=0"), (dict(keep=1.5), r"keep=1.5"), (dict(schedule="linear"), r"schedule='linear'"),
    (dict(weights="none"), r"weights='none'"), (dict(last=5), r"schedule='single' has one step"),
    (dict(schedule="decay", keep=5), r"a share of what reaches it"), (dict(schedule="decay", last=1), r"last=1"),
    (dict(positions="middle"), r"positions='middle'")])
def test_errors_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        FastAdaSP(**options)


def test_errors_of_a_schedule_and_of_a_model(model):
    with pytest.raises(ValueError, match=r"within\(depth\)"):
        OFTEN.steps()
    for reducer in (FastAdaSP(4, 0.5), FastAdaSP(4, 0.5, "decay"), FastAdaSP(1, 0.5, "decay", last=4)):
        with pytest.raises(ValueError, match=r"this language model has 4 layers"):
            wrapped(model, reducer)
    with pytest.raises(ValueError, match=r"both work at layer 3"):
        wrapped(model, OFTEN, StagePool(3, 2))


# attention received ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "bool", "additive", "flat"])
def test_received_attention_equals_a_dense_softmax(mask):
    """With grouped queries and padding; in tiles of any size; every real query pays one over what it sees, a head."""
    layer = build("qwen2_audio").model.language_model.layers[1]
    x = torch.randn(2, 23, 32, generator=torch.Generator().manual_seed(0))
    pads = [0, 0] if mask == "none" else [0, 9]
    position = torch.arange(23)[None] - torch.tensor(pads)[:, None]
    angle = position[..., None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    valid = position >= 0
    seen = torch.ones(23, 23).tril().bool() & valid[:, None]
    given = {"none": None, "bool": seen[:, None], "flat": valid,
             "additive": torch.zeros(2, 1, 23, 23).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)}[mask]
    kwargs = {"attention_mask": given, "position_embeddings": tuple(t.repeat(1, 1, 2) for t in (angle.cos(), angle.sin()))}
    with torch.no_grad():
        reading = Reading(layer, x, kwargs, Columns(None, 23, mask == "none"))
        results = [reading.received(valid, room) for room in (1, 700, 2**20)]
        some = reading.received(valid & (torch.arange(23) < 20))
        for b, pad in enumerate(pads):
            dense, _ = attention_map(layer, x[b, pad:], torch.arange(23 - pad))              # (H, L, L)
            for got in results:
                torch.testing.assert_close(got[b, pad:], dense.sum((0, 1)), atol=1e-5, rtol=1e-5)
                assert not got[b, :pad].any()
            torch.testing.assert_close(some[b, pad:], dense[:, :20 - pad].sum((0, 1)), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(results[0][b].sum(), torch.tensor(4.0 * (23 - pad)))
            k = layer.self_attn.k_proj(layer.input_layernorm(x[b, pad:])).unflatten(-1, (-1, 8)).transpose(0, 1)
            torch.testing.assert_close(reading.keys[b, :, pad:], rotate(k, torch.arange(23 - pad)), atol=1e-5, rtol=1e-5)


# against a dense decoder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, attention", [*((name, "sdpa") for name in METHODS), ("decay", "eager")])
def test_forward_equals_the_dense_decoder(model, name, attention):
    """So a batch is its rows alone, on both sides of padding, text alone and two recordings included."""
    if attention == "eager":
        model = build(family(model), attn_implementation="eager")
    rows, reducer = rows_for(family(model)), METHODS[name]
    for side in ("left", "right"):
        inputs = make_inputs(model, rows, side)
        with torch.no_grad(), wrapped(model, reducer) as w:
            out, prompt, items = w(**inputs).logits, w.prompt, w.last
        done = 0
        for i in range(len(rows)):
            with torch.no_grad():
                x, spans = embedded(model, row_of(model, inputs, rows, i))
                expected, columns = dense(model, x, spans, reducer)
            real = prompt.column[i] >= 0
            torch.testing.assert_close(out[i][real], expected, atol=3e-4, rtol=3e-4)
            for start, size in spans:
                item = items[done].at(3)
                mine = columns[(columns >= start) & (columns < start + size)] - start
                assert torch.equal(item.index, mine) and item.mass.sum() == size and (item.source >= 0).all()
                assert torch.equal(item.source.bincount(), item.mass.long()) and (item.source.diff() >= 0).all()
                done += 1
        assert done == len(items) == 4


@pytest.mark.parametrize("name", ["once", "decay", "closed"])
def test_generate_equals_a_dense_greedy_loop(model, name):
    rows, reducer = rows_for(family(model)), METHODS[name]
    inputs = make_inputs(model, rows)
    with wrapped(model, reducer) as w:
        out = w.generate(**inputs, max_new_tokens=4, **QUIET)
        assert torch.equal(out, w.generate(**inputs, max_new_tokens=4, use_cache=False, **QUIET))
    length = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :length], inputs["input_ids"])
    for i in range(len(rows)):
        with torch.no_grad():
            x, spans = embedded(model, row_of(model, inputs, rows, i))
            asked, tokens = len(x), []
            for _ in range(4):
                logits, _ = dense(model, x, spans, reducer, asked)
                logits[-1, AUDIO] = -torch.inf
                tokens.append(int(logits[-1].argmax()))
                x = torch.cat([x, model.get_input_embeddings()(torch.tensor([tokens[-1]]))])
        assert out[i, length:].tolist() == tokens


@pytest.mark.parametrize("name", ["once", "decay"])
def test_loss_and_gradients_equal_the_dense_decoder(model, name):
    """The answer's tokens are not among those whose attention is counted: training joins as inference does."""
    rows, reducer = [[Recording()], [Recording(77), Recording(120)], []], METHODS[name]
    inputs = make_inputs(model, rows, "right")
    lengths = inputs["attention_mask"].sum(1)
    labels = torch.where(torch.arange(inputs["input_ids"].shape[1]) >= lengths[:, None] - 2, inputs["input_ids"], -100)
    labels[inputs["attention_mask"] == 0] = -100
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    with wrapped(ours, reducer) as w:
        loss = w(**inputs, labels=labels).loss
        loss.backward()
        assert torch.equal(w(**inputs, labels=labels, return_dict=False)[0], loss)
    total, count = 0.0, 0
    for i in range(len(rows)):
        x, spans = embedded(theirs, row_of(theirs, inputs, rows, i))
        logits, columns = dense(theirs, x, spans, reducer, answers=range(len(x) - 2, len(x)))
        target = labels[i, :lengths[i]][columns]
        total = total + F.cross_entropy(logits[:-1], target[1:], ignore_index=-100, reduction="sum")
        count += int((target[1:] != -100).sum())
    (total / count).backward()
    torch.testing.assert_close(loss, total / count, atol=1e-5, rtol=1e-5)
    for (n, a), b in zip(ours.named_parameters(), theirs.parameters()):
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=3e-5, rtol=3e-3, msg=lambda m: f"{n}: {m}")  # noqa: B023
    assert next(p for n, p in ours.named_parameters() if "audio_tower" in n and p.requires_grad).grad.abs().sum() > 0


# what every method gets free ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_keep_one_is_bit_identical(model, side):
    inputs = make_inputs(model, rows_for(family(model)), side)
    with torch.no_grad():
        stock = model(**inputs).logits
        for reducer in (FastAdaSP(2, 1.0), FastAdaSP(1, 1.0, "constant")):
            with wrapped(model, reducer) as w:
                assert torch.equal(w(**inputs).logits, stock) and w.report.layers == []


@pytest.mark.parametrize("name", ["once", "decay"])
def test_beams_and_samples_equal_rows_alone(model, name):
    rows = rows_for(family(model))
    inputs = make_inputs(model, rows)
    with wrapped(model, METHODS[name]) as w:
        greedy = w.generate(**inputs, max_new_tokens=3, **QUIET)
        beams = w.generate(**inputs, max_new_tokens=3, num_beams=3, **QUIET)
        for i in range(len(rows)):
            alone = w.generate(**row_of(model, inputs, rows, i), max_new_tokens=3, num_beams=3, **QUIET)
            assert torch.equal(alone[0, -3:], beams[i, -3:])
        samples = w.generate(**inputs, max_new_tokens=3, **{**QUIET, "do_sample": True}, num_return_sequences=2, top_k=1)
        assert torch.equal(samples[::2], greedy) and torch.equal(samples[1::2], greedy)


def test_static_caches_equal_dynamic_ones(model):
    inputs = make_inputs(model, rows_for(family(model)))
    with wrapped(model, OFTEN) as w:
        expected = w.generate(**inputs, max_new_tokens=3, **QUIET)
        assert torch.equal(w.generate(**inputs, max_new_tokens=3, cache_implementation="static", **QUIET), expected)


@pytest.mark.parametrize("name", ["once", "decay", "closed"])
def test_a_second_turn_on_the_reduced_cache(model, name):
    """Text as one block over a batch equals the same tokens decoded one by one by the stock model, each prompt alone."""
    rows = rows_for(family(model))
    inputs = make_inputs(model, rows)
    with wrapped(model, METHODS[name]) as w:
        first = w.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True, **QUIET)
        lengths = [int(first.past_key_values.get_seq_length(i)) for i in range(4)]
        assert lengths[0] == inputs["input_ids"].shape[1] + 1 and lengths[3] < lengths[0]
        turn = torch.randint(3, 79, (len(rows), 5), generator=torch.Generator().manual_seed(1))
        ids = torch.cat([first.sequences, turn], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(rows), 7, dtype=torch.long)], 1)
        second = w.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=3,
                            **QUIET)
    for i in range(len(rows)):
        with wrapped(model, METHODS[name]) as w, torch.no_grad():
            one = w.generate(**row_of(model, inputs, rows, i), max_new_tokens=2, return_dict_in_generate=True, **QUIET)
            past, tokens = one.past_key_values, []
            for token in [int(one.sequences[0, -1]), *turn[i].tolist()]:
                out = model(input_ids=torch.tensor([[token]]), past_key_values=past)
            for _ in range(3):
                out.logits[0, -1, AUDIO] = -torch.inf
                tokens.append(int(out.logits[0, -1].argmax()))
                out = model(input_ids=torch.tensor([[tokens[-1]]]), past_key_values=past)
        assert second[i, -3:].tolist() == tokens


def test_a_new_recording_in_a_later_turn(model):
    """It is joined on top of the reduced cache, whose keys its queries see; a batch equals its rows alone."""
    first_rows, second_rows = [[Recording()], [Recording(77)]], [[Recording(120)], [Recording(160)]]
    one, two = make_inputs(model, first_rows), make_inputs(model, second_rows, seed=3)

    def talk(first, second):
        with wrapped(model, ONCE) as w:
            begun = w.generate(**first, max_new_tokens=2, return_dict_in_generate=True, **QUIET)
            ids = torch.cat([begun.sequences, second["input_ids"]], 1)
            mask = torch.cat([first["attention_mask"], torch.ones(len(ids), 2, dtype=torch.long), second["attention_mask"]], 1)
            out = w.generate(**{**second, "input_ids": ids, "attention_mask": mask}, past_key_values=begun.past_key_values,
                             max_new_tokens=3, **QUIET)
            assert w.last[0].at(3).after < w.last[0].before
            return out[:, -3:]
    both = talk(one, two)
    for i in range(2):
        assert torch.equal(talk(row_of(model, one, first_rows, i), row_of(model, two, second_rows, i))[0], both[i])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(model, reentrant):
    inputs = make_inputs(model, rows_for(family(model)), "right")
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == AUDIO) | (inputs["attention_mask"] == 0), -100)
    grads = []
    for saving in (False, True):
        twin = copy.deepcopy(model).train()
        if saving:
            twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
            twin.enable_input_require_grads()
        with wrapped(twin, OFTEN) as w:
            w(**inputs, labels=labels).loss.backward()
        grads.append({n: p.grad for n, p in twin.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-6, rtol=1e-4)


def test_bf16(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    inputs = make_inputs(half, rows_for(family(model)))
    with wrapped(half, OFTEN) as w:
        out = w(**inputs).logits
        assert out.dtype == torch.bfloat16 and torch.isfinite(out[w.prompt.column >= 0]).all()
        assert w.generate(**inputs, max_new_tokens=2, **QUIET).shape[1] == inputs["input_ids"].shape[1] + 2


def test_an_audio_reducer_before_and_the_report(model, tmp_path):
    """What MeanPool left is joined; masses multiply through; the report and the configuration know of it."""
    inputs = make_inputs(model, [[Recording()], [Recording()]])
    with mmcompress.wrap(model, audio=MeanPool(keep=0.5), layers=[ONCE]) as w:
        w(**inputs)
        report, items, columns = w.report, w.last, w.prompt.column.shape[1]
        w.save_pretrained(tmp_path)
    for item in items:
        left = item.at(2)
        assert item.after == item.before // 2 and left.after == int(item.after * 0.4) and item.at(1) is item
        assert left.mass.sum() == item.before and torch.equal(left.source.bincount(), left.mass.long())
    assert (report.layers[0].layer, report.layers[0].tokens, report.layers[0].columns) == \
        (2, sum(i.at(2).after for i in items), columns)
    assert f"from layer 2 of 4: {report.layers[0].tokens} audio tokens" in str(report)
    assert "FastAdaSP(layer=2, keep=0.4)" in str(report) and report.kv_bytes_after < report.kv_bytes_before
    with mmcompress.from_pretrained(model, tmp_path) as again:
        assert again.config.layers == (ONCE,)
    with wrapped(model, {"name": "fastadasp", "layer": 1, "keep": 0.9, "schedule": "decay"}) as w:
        assert w.config.layers == (FastAdaSP(1, 0.9, "decay"),)


def test_only_recordings_are_joined():
    """Pictures and clips of a prompt keep their columns, in the plan of any step whose reducer names its modalities."""
    layout = AudioLayout(10, 25.0)
    spans = [Span(0, 2, layout, "image"), Span(0, 14, layout, "audio"), Span(0, 26, layout, "video")]
    valid = torch.ones(1, 40, dtype=torch.bool)
    plan = plan_layers(steps_of([ONCE], 4), valid, spans, "left", None, torch.device("cpu"))
    assert [g.items for g in plan.stages[0].groups] == [[1]] and plan.stages[0].columns == 34
    assert plan.final.tolist() == [[*range(18), *range(24, 40)]]
    every = plan_layers(steps_of([StagePool(2, 2)], 4), valid, spans, "left", None, torch.device("cpu"))
    assert [g.items for g in every.stages[0].groups] == [[0, 1, 2]]
    assert plan_layers(steps_of([ONCE], 4), valid, spans[:1], "left", None, torch.device("cpu")) is None


# the other layer reducers on recordings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reducer", [FastV(2, 0.4), PyramidDrop(((1, 0.5), (3, 0.25))), StagePool(1, 3)], ids=repr)
def test_the_other_methods_work_on_recordings(model, reducer):
    rows = rows_for(family(model))
    for side in ("left", "right"):
        inputs = make_inputs(model, rows, side)
        with torch.no_grad(), wrapped(model, reducer) as w:
            out, prompt, items = w(**inputs).logits, w.prompt, w.last
            assert len(items) == 4 and all(i.modality == "audio" and i.at(3).after < i.before for i in items)
            for i in range(len(rows)):
                alone = w(**row_of(model, inputs, rows, i)).logits[0]
                torch.testing.assert_close(out[i][prompt.column[i] >= 0], alone, atol=3e-4, rtol=3e-4)
    inputs = make_inputs(model, rows)
    with wrapped(model, reducer) as w:
        out = w.generate(**inputs, max_new_tokens=3, **QUIET)
        for i in range(len(rows)):
            alone = w.generate(**row_of(model, inputs, rows, i), max_new_tokens=3, **QUIET)
            assert torch.equal(alone[0, -3:], out[i, -3:])


def test_blocks_of_a_recording_are_refused(model):
    with wrapped(model, StagePool(2, 4, dims=2)) as w, pytest.raises(SignalError, match=r"a recording; pass dims=1"):
        w(**make_inputs(model, [[Recording()]]))


def test_it_is_refused_where_nothing_can_be_heard():
    with pytest.raises(UnsupportedModelError, match=r"FastAdaSP reduces recordings.*does not hear"):
        mmcompress.wrap(llava_next(depth=4), layers=["fastadasp"])
