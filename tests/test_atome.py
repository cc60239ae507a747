"""A-ToMe inside the encoders: the step against a slow loop, and on every family exact counts, batches, gradients, no traces."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_audio import (
    AUDIO,
    STATES,
    Recording,
    build,
    greedy_reference,
    make_inputs,
    mel,
    row_of,
    rows_for,
    tokens_of,
    whisper,
)

import mmcompress
from mmcompress.adapters import adapter_for
from mmcompress.audio import ATome, MeanPool
from mmcompress.audio.atome import counts, least, merge_adjacent, removable
from mmcompress.errors import SignalError, UnsupportedModelError
from mmcompress.layout import AudioLayout
from mmcompress.tokens import Tokens

FAMILIES = ("qwen2_audio", "voxtral", "audioflamingo3")
METHOD = ATome(keep=0.6, layers=(0, 1), size_weighted=True)
MODELS = {}


@pytest.fixture(params=FAMILIES)
def model(request):
    if request.param not in MODELS:
        MODELS[request.param] = build(request.param)
    return MODELS[request.param]


@pytest.fixture(scope="module")
def listener():
    return whisper()


def recordings(*frames, seed=0):
    """Whisper's input: recordings of these many mel frames, digital silence behind them."""
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.nn.functional.pad(mel(n, g), (0, 2 * STATES - n), value=-1.5) for n in frames])


def enter(tower, x):
    """What enters the first layer."""
    gelu = torch.nn.functional.gelu
    return gelu(tower.conv2(gelu(tower.conv1(x)))).mT + tower.embed_positions.weight


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# the step -------------------------------------------------------------------------------------------------------------


def slow_merge(hidden, keys, size, parts, goals, pairing, weighted):
    """One row, by the definition: lists, a loop over pairs in order of likeness. -> hidden, size, groups of columns"""
    key = keys.double().mean(1)
    alike = [float(torch.cosine_similarity(key[i], key[i + 1], dim=0)) for i in range(len(key) - 1)]
    joined, start = set(), 0
    for length, goal in zip(parts, goals):
        pairs = range(start, start + length - 1, 2 if pairing == "even_odd" else 1)
        matched, used = [], set()
        for i in sorted(pairs, key=lambda i: (-alike[i], i)):
            if not {i, i + 1} & used:
                matched.append(i)
                used |= {i, i + 1}
        joined |= set(matched[:length - goal])
        start += length
    groups, i = [], 0
    while i < start:
        groups.append([i, i + 1] if i in joined else [i])
        i += len(groups[-1])
    weight = lambda c: float(size[c]) if weighted else 1.0  # noqa: E731
    mean = [sum(weight(c) * hidden[c].double() for c in g) / sum(weight(c) for c in g) for g in groups]
    return torch.stack(mean), torch.tensor([float(sum(size[c] for c in g)) for g in groups]), groups


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_step_is_the_slow_loop(data):
    pairing = data.draw(st.sampled_from(["even_odd", "greedy"]))
    weighted, seed = data.draw(st.booleans()), data.draw(st.integers(0, 999))
    parts = [data.draw(st.tuples(*[st.integers(0, 23)] * 2).filter(any)) for _ in range(3)]
    goals = [tuple(data.draw(st.integers(p - removable(p, 1, pairing), p)) for p in row) for row in parts]
    g = torch.Generator().manual_seed(seed)
    n, width = max(map(sum, parts)) + data.draw(st.integers(0, 2)), max(map(sum, goals))
    hidden, keys = torch.randn(3, n, 5, generator=g), torch.randn(3, n, 2, 4, generator=g)
    if data.draw(st.booleans()):
        keys = keys.round()[:, :, :1, :1].expand_as(keys)                       # many ties
    size = torch.randint(1, 9, (3, n), generator=g).float()
    out, mass, slot = merge_adjacent(hidden, keys, size, torch.tensor(parts), torch.tensor(goals), width, pairing, weighted)
    assert out.shape == (3, width, 5) and slot.shape == (3, n)
    for row in range(3):
        mean, sizes, groups = slow_merge(hidden[row], keys[row], size[row], parts[row], goals[row], pairing, weighted)
        k = sum(goals[row])
        assert len(groups) == k
        torch.testing.assert_close(out[row, :k].double(), mean, atol=1e-5, rtol=1e-5)
        assert torch.equal(mass[row, :k], sizes)
        assert [int(slot[row, c]) for g in groups for c in g] == [j for j, g in enumerate(groups) for _ in g]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pairing", ["even_odd", "greedy"])
def test_constant_signals_merge_exactly(pairing, dtype):
    hidden = torch.randn(1, 1, 7).to(dtype).expand(2, 31, 7)
    size = torch.randint(1, 9, (2, 31)).float()
    now, then = torch.tensor([[31], [20]]), torch.tensor([[22], [14]])
    out, mass, _ = merge_adjacent(hidden, torch.randn(2, 31, 2, 4), size, now, then, 22, pairing)
    assert torch.equal(out, hidden[:, :22])
    assert torch.equal(mass[0].sum(), size[0].sum()) and torch.equal(mass[1, :14].sum(), size[1, :20].sum())


def test_what_is_unlike_stays_and_what_is_alike_merges():
    """Two steady sounds and a change between them: the pairs within a sound go, the pair across it stays."""
    a, b = torch.eye(2)
    keys = torch.stack([a, a, a, b, b, b, b, b])[None, :, None]
    hidden = torch.arange(8.0)[None, :, None]

    def step(k, size=1.0, **how):
        sizes = torch.tensor([[size, 1, 1, 1, 1, 1, 1, 1]])
        return merge_adjacent(hidden, keys, sizes, torch.tensor([[8]]), torch.tensor([[k]]), k, **how)[0][0, :, 0].tolist()

    assert step(5) == [0.5, 2, 3, 4.5, 6.5]                                     # (2, 3) is a pair, and unlike
    assert step(6, pairing="greedy") == [0.5, 2, 3.5, 5, 6, 7]
    assert step(7, 3.0, size_weighted=True) == [0.25, 2, 3, 4, 5, 6, 7] and step(7, 3.0)[0] == 0.5


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.integers(1, 6), st.integers(1, 2), st.sampled_from(["even_odd", "greedy"]), st.floats(0, 1),
       st.floats(0, 1))
def test_schedules_are_exact_and_within_reach(n, steps, parts, pairing, share, sound):
    low = least(n, steps, parts, pairing)
    k = low + round(share * (n - low))
    out = counts(n, k, steps, parts, pairing)
    assert out[-1] == k and len(out) == steps
    for a, b in pairwise((n, *out)):
        assert 0 <= a - b <= removable(a, parts, pairing)
    whole = (n,) if parts == 1 else (round(sound * n), n - round(sound * n))
    path = ATome(keep=1, pairing=pairing).lengths(whole, k, steps)
    assert path[0] == whole and [sum(p) for p in path[1:]] == list(out)
    for before, after in pairwise(path):
        assert all(0 <= a - b <= removable(a, 1, pairing) for a, b in zip(before, after))
    if parts == 2:                                                              # the silence pays its share
        assert abs(path[-1][0] - k * whole[0] / n) <= 1 + steps


def test_every_layer_removes_the_same_share():
    out = (1500, *counts(1500, 750, 4, 2, "even_odd"))
    assert all(abs(b / a - 0.5 ** 0.25) < 1e-3 for a, b in pairwise(out))


def test_layers_by_default():
    assert ATome().after(1) == (0,) and ATome().after(4) == (0, 1, 2, 3) and ATome().after(12) == tuple(range(12))
    assert ATome().after(32) == (0, 4, 8, 12, 16, 20, 24, 28)
    assert ATome(layers=[-1, 0, 3]).after(4) == (0, 3)


# inside the families' encoders ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_keep_one_is_bit_identical(model):
    inputs = make_inputs(model, rows_for(model.config.model_type))
    stock, before = model(**inputs).logits, hooks(model)
    with mmcompress.wrap(model, audio=ATome(keep=1.0)) as w:
        assert torch.equal(w(**inputs).logits, stock)
    assert hooks(model) == before


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [METHOD, ATome(keep=0.7, layers=(0, 1, 2), pairing="greedy")])
def test_counts_are_exact_and_rows_equal_rows_alone(model, method, side):
    rows = rows_for(model.config.model_type)
    inputs = make_inputs(model, rows, side)
    with mmcompress.wrap(model, audio=method) as w:
        out = w(**inputs).logits
        assert [i.after for i in w.last] == [int(i.before * method.keep) for i in w.last]
        for item in w.last:
            assert torch.equal(item.source.sort().values, item.source) and set(item.source.tolist()) == set(range(item.after))
            assert torch.equal(item.source[item.index], torch.arange(item.after))
            assert torch.equal(item.mass, item.source.bincount().float())
            assert item.spans[0, 0] == 0 and torch.equal(item.spans[1:, 0], item.spans[:-1, 1])
        lengths = (w.prompt.column >= 0).sum(1).tolist()
        for i in range(len(rows)):
            alone = w(**row_of(model, inputs, rows, i)).logits[0]
            mine = out[i, -lengths[i]:] if side == "left" else out[i, :lengths[i]]
            torch.testing.assert_close(mine, alone, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_generate_equals_a_greedy_loop(model):
    rows = rows_for(model.config.model_type)
    inputs = make_inputs(model, rows)
    length = inputs["input_ids"].shape[1]
    with mmcompress.wrap(model, audio=METHOD) as w:
        out = w.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        for i, row in enumerate(rows):
            if row:
                assert torch.equal(out[i, length:], greedy_reference(model, row_of(model, inputs, rows, i), w.config, 4))


@torch.no_grad()
def test_beams_equal_those_of_rows_alone(model):
    rows = rows_for(model.config.model_type)
    inputs = make_inputs(model, rows)
    length = inputs["input_ids"].shape[1]
    more = dict(max_new_tokens=4, num_beams=3, do_sample=False, eos_token_id=None)
    with mmcompress.wrap(model, audio=METHOD) as w:
        out = w.generate(**inputs, **more)
        for i in range(len(rows)):
            alone = row_of(model, inputs, rows, i)
            assert torch.equal(w.generate(**alone, **more)[0, alone["input_ids"].shape[1]:], out[i, length:])


@torch.no_grad()
def test_by_hand_with_an_encoder_of_one_row_at_a_time(model):
    """Layers called one by one, no hooks, no padding, no mask; merging by the slow loop."""
    adapter, tower = adapter_for(model), model.model.audio_tower
    inputs = make_inputs(model, [[Recording(99)], [Recording(160)]])
    layouts = adapter.audio_layouts(inputs, inputs["input_ids"])
    encoded = adapter.encode_audio(inputs, layouts, METHOD)
    for row, layout in enumerate(layouts):
        states = (adapter.frames(inputs)[row] - 1) // 2 + 1
        sound = inputs["input_features"][row:row + 1]
        x, size = enter(tower, sound)[:, :states], torch.ones(states)
        k = METHOD.count(layout) * adapter.states_per_token
        for layer, goal in zip(tower.layers, [*counts(states, k, 2, 1, "even_odd"), None]):
            keys = layer.self_attn.k_proj(layer.self_attn_layer_norm(x))[0].unflatten(-1, (2, -1))
            x = layer(x, attention_mask=None)
            if goal is not None:
                mean, size, _ = slow_merge(x[0], keys, size, (x.shape[1],), (goal,), "even_odd", True)
                x = mean[None].float()
        if adapter.states_per_token == 2:
            x = tower.layer_norm(tower.avg_pooler(x.mT).mT)
        else:
            x = tower.layer_norm(x).reshape(1, -1, 4 * x.shape[2])
        torch.testing.assert_close(encoded.features[row], model.model.multi_modal_projector(x)[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_budgets_of_tokens_and_windows_divided_exactly(model):
    """So many tokens a recording, whatever its length: rows of a batch end with very different counts."""
    long = Recording(200 if model.config.model_type == "qwen2_audio" else 430)
    rows = [[long], [Recording(200), Recording(150)]]
    inputs = make_inputs(model, rows)
    with mmcompress.wrap(model, audio=ATome(keep=37, layers=(0, 1, 2))) as w:
        out = w(**inputs).logits
        assert [i.after for i in w.last] == [min(37, i.before) for i in w.last]
        lengths = (w.prompt.column >= 0).sum(1).tolist()
        for i in range(len(rows)):
            alone = w(**row_of(model, inputs, rows, i)).logits[0]
            torch.testing.assert_close(out[i, -lengths[i]:], alone, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_encoder(model, checkpointing):
    model = copy.deepcopy(model).train()
    inputs = make_inputs(model, rows_for(model.config.model_type))
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == AUDIO, -100)
    with mmcompress.wrap(model, audio=METHOD) as w:
        w(**inputs).loss.backward()
        plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert plain["model.audio_tower.conv1.weight"].abs().sum() > 0
        if checkpointing:
            model.zero_grad()
            model.gradient_checkpointing_enable({"use_reentrant": False})
            w(**inputs).loss.backward()
            for n, p in model.named_parameters():
                if n in plain:
                    torch.testing.assert_close(p.grad, plain[n], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_eager_equals_sdpa_and_bfloat16_runs(model):
    name = model.config.model_type
    inputs = make_inputs(model, rows_for(name))
    with mmcompress.wrap(model, audio=METHOD) as w:
        fast = w(**inputs).logits
    slow = build(name, attn_implementation="eager")
    slow.load_state_dict(model.state_dict())
    assert slow.model.audio_tower.config._attn_implementation == "eager"
    with mmcompress.wrap(slow, audio=METHOD) as w:
        real = (w(**inputs).logits, w.prompt.column >= 0)
        torch.testing.assert_close(real[0][real[1]], fast[real[1]], atol=2e-4, rtol=2e-4)
    half = copy.deepcopy(model).bfloat16()
    with mmcompress.wrap(half, audio=METHOD) as w:
        out = w(**make_inputs(half, rows_for(name))).logits
        assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())


def test_older_transformers_cannot_recompute_hooked_layers(model, monkeypatch):
    from transformers.modeling_layers import GradientCheckpointingLayer
    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", torch.nn.Module.__call__, raising=False)
    model = copy.deepcopy(model).train()
    inputs = make_inputs(model, [[Recording()]])
    with mmcompress.wrap(model, audio=METHOD) as w:
        w(**inputs)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with pytest.raises(ValueError, match="gradient checkpointing of the audio encoder"):
            w(**inputs)


def test_errors_leave_no_hooks(model):
    inputs = make_inputs(model, [[Recording()]])
    tokens = tokens_of(model, 160)
    before = hooks(model)
    with mmcompress.wrap(model, audio=ATome(keep=0.3, layers=(1,))) as w:
        with pytest.raises(ValueError, match=r"ATome\(keep=0.3\) leaves a recording .* 1 merging layers .*pass keep="):
            w(**inputs)
        w.configure(mmcompress.WrapConfig(audio=ATome(keep=-(-tokens // 2), layers=(1,))))     # exactly what one layer can
        w(**inputs)
        assert hooks(model) == before
        w.configure(mmcompress.WrapConfig(audio=ATome(keep=0.5, layers=(3,))))
        with pytest.raises(ValueError, match="has 3 layers"):
            w(**inputs)
    last, held = model.model.audio_tower.layers[2], type(model.model.audio_tower.layers[2]).forward
    last.forward = lambda *a, **k: 1 / 0
    try:
        with mmcompress.wrap(model, audio=METHOD) as w, pytest.raises(ZeroDivisionError):
            w(**inputs)
    finally:
        del last.__dict__["forward"]
    assert last.forward.__func__ is held and hooks(model) == before


# Whisper --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_whisper_decodes_from_the_merged_states(listener):
    x = recordings(200, 120, 37, 200)
    before = hooks(listener)
    stock = listener.generate(input_features=x, max_new_tokens=6)
    with mmcompress.wrap(listener, audio=ATome(keep=1.0)) as w:
        assert torch.equal(w.generate(input_features=x, max_new_tokens=6), stock)
    with mmcompress.wrap(listener, audio=METHOD) as w:
        states = listener.model.encoder(x).last_hidden_state
        assert states.shape == (4, 60, 32)
        for item, n in zip(w.last, (100, 60, 19, 100)):
            assert item.after == 60 and item.before == 100 and item.layout.sound == n
            assert set(item.source[:n].tolist()).isdisjoint(item.source[n:].tolist())          # sound and silence apart
            assert abs(int(item.source[n - 1]) + 1 - 0.6 * n) <= 1
            assert torch.equal(item.mass, item.source.bincount().float())
        for i in range(4):
            torch.testing.assert_close(listener.model.encoder(x[i:i + 1]).last_hidden_state[0], states[i], atol=1e-4, rtol=1e-4)
        for options in ({}, {"num_beams": 3}):
            out = w.generate(input_features=x, max_new_tokens=6, **options)
            assert [i.after for i in w.last] == [60] * 4
            w.active = False
            pure = mmcompress.compress(listener, {"input_features": x}, audio=METHOD)
            assert torch.equal(listener.generate(**pure, max_new_tokens=6, **options), out)
            w.active = True
    assert hooks(listener) == before


@torch.no_grad()
def test_whisper_by_hand(listener):
    encoder, x = listener.model.encoder, recordings(130)
    with mmcompress.wrap(listener, audio=METHOD):
        out = encoder(x).last_hidden_state
    hidden, size, path = enter(encoder, x), torch.ones(100), METHOD.lengths((65, 35), 60, 2)
    for i, layer in enumerate(encoder.layers):
        keys = layer.self_attn.k_proj(layer.self_attn_layer_norm(hidden))[0].unflatten(-1, (2, -1))
        hidden = layer(hidden, None)
        if i < 2:
            mean, size, _ = slow_merge(hidden[0], keys, size, path[i], path[i + 1], "even_odd", True)
            hidden = mean[None].float()
    torch.testing.assert_close(out, encoder.layer_norm(hidden), atol=1e-4, rtol=1e-4)


def test_whisper_trains_copies_and_forgets(listener):
    x, labels = recordings(200, 90), torch.randint(3, 70, (2, 5))
    model = copy.deepcopy(listener).train()
    with mmcompress.wrap(model, audio=METHOD):
        twin = copy.deepcopy(model)
        model(input_features=x, labels=labels).loss.backward()
        assert model.model.encoder.conv1.weight.grad.abs().sum() > 0
        twin.gradient_checkpointing_enable({"use_reentrant": False})
        twin(input_features=x, labels=labels).loss.backward()
        torch.testing.assert_close(twin.model.encoder.conv1.weight.grad, model.model.encoder.conv1.weight.grad)
        handle = twin._mmcompress
        assert handle.model is twin and [i.after for i in handle.last] == [60, 60]
        mmcompress.unwrap(twin)
        assert twin.eval().model.encoder(x).last_hidden_state.shape[1] == 100
        with pytest.raises(ValueError, match="expects the mel"):
            model.model.encoder(x[:, :, :50])
        assert model._mmcompress.merging is None and len(model.model.encoder.layers[0]._forward_hooks) == 0
        model.model.encoder.layerdrop = 0.1
        with pytest.raises(ValueError, match="layerdrop"):
            model.model.encoder(x)
    assert hooks(model) == hooks(listener)


@torch.no_grad()
def test_whisper_says_what_it_cannot_reach(listener):
    with mmcompress.wrap(listener, audio=ATome(keep=0.5, layers=(1,))), pytest.raises(ValueError, match=r"keep=0\.51 or more"):
        listener.model.encoder(recordings(200))
    with mmcompress.wrap(listener, audio=ATome(keep=0.51, layers=(1,))):
        for n in (200, 199, 121, 1, 64):
            assert listener.model.encoder(recordings(n)).last_hidden_state.shape[1] == 51
        assert listener.model.encoder(torch.full((1, 8, 200), -1.5)).last_hidden_state.shape[1] == 51      # silence alone


# what it refuses ------------------------------------------------------------------------------------------------------


def test_refusals():
    for bad in (dict(pairing="chain"), dict(layers=()), dict(layers=("1",)), dict(keep=0.0)):
        with pytest.raises(ValueError):
            ATome(**bad)
    with pytest.raises(SignalError, match="inside the audio encoder"):
        ATome(keep=0.5)(Tokens(torch.randn(1, 8, 4), AudioLayout(8, 25.0)))
    with pytest.raises(ValueError):
        mmcompress.WrapConfig(audio=ATome(), budget=0.5)
    model = build("qwen2_5_omni_thinker")
    with mmcompress.wrap(model, audio=ATome()), pytest.raises(UnsupportedModelError, match="Whisper's shape"):
        model(**make_inputs(model, [[Recording()]]))
    with mmcompress.wrap(model, audio=MeanPool(keep=0.5)):
        model(**make_inputs(model, [[Recording()]]))


def test_is_configured_by_name(tmp_path):
    method = ATome(keep=0.4, layers=(0, 2), pairing="greedy")
    config = mmcompress.WrapConfig(audio=method)
    config.save(tmp_path)
    assert mmcompress.WrapConfig.load(tmp_path).audio == method
    assert mmcompress.wrap(whisper(), audio="atome").config.audio == ATome()
