"""SpeechPrune against loops that follow its formulas token by token, in numpy and double precision."""

import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tiny_audio import FAMILIES, build, greedy_reference, make_inputs, row_of, rows_for, whisper

import mmcompress
from mmcompress import SignalError, WrapConfig
from mmcompress.audio import SpeechPrune
from mmcompress.audio import speech_prune as module
from mmcompress.audio.speech_prune import by_frames, first_by, received, shares, similarity
from mmcompress.layout import AudioLayout
from mmcompress.tokens import Tokens

HEADS, KV_HEADS, HEAD_DIM, DIM = 4, 2, 6, 12
KEEPS = st.one_of(st.floats(0.01, 1.0), st.integers(1, 150))


def tokens_of(n, rate=25.0, batch=2, seed=0, words=(5, 3), dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    noise = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    features = 0.5 * noise(batch, n, DIM) + noise(batch, n // 7 + 1, DIM).repeat_interleave(7, 1)[:, :n]
    lengths = torch.tensor([words[b % len(words)] for b in range(batch)])
    mask = torch.arange(max(words)) < lengths[:, None]
    question, *weights = noise(batch, max(words), DIM), noise(HEADS, HEAD_DIM, DIM), noise(KV_HEADS, HEAD_DIM, DIM)
    return Tokens(features.to(dtype), AudioLayout(n, rate), question=question.to(dtype), question_mask=mask,
                  weights=tuple(w.to(dtype) for w in weights))


def alone(x, b):
    real = x.question_mask[b]
    return replace(x, features=x.features[b:b + 1], question=x.question[b:b + 1, real],
                   question_mask=torch.ones(1, int(real.sum()), dtype=torch.bool))


# the formulas, by loops -------------------------------------------------------------------------------------------------

def unit(v):
    return v / math.sqrt(float((v * v).sum()))


def cosines(x, b):
    words = [unit(w) for w in x.question[b][x.question_mask[b]].double().numpy()]
    return [sum(float(unit(s) @ w) for w in words) / len(words) for s in x.features[b].double().numpy()]


def water_filling(p, size, total):
    """Quotas min(size, theta p): frames that overflow are filled one after the other, the rest share again."""
    full = set()
    while True:
        left = total - sum(size[i] for i in full)
        weight = sum(p[i] for i in range(len(p)) if i not in full)
        over = [i for i in range(len(p)) if i not in full and left * p[i] / weight > size[i]]
        if not over:
            return [size[i] if i in full else left * p[i] / weight for i in range(len(p))]
        full.add(max(over, key=lambda i: p[i] / size[i]))


def seats(p, size, total):
    quota = water_filling(p, size, total)
    won = [math.floor(q + 1e-9) for q in quota]
    by_remainder = sorted(range(len(p)), key=lambda i: (-(quota[i] - won[i]), i))
    for i in by_remainder[:total - sum(won)]:
        won[i] += 1
    return won


def phase_one(x, b, k1):
    n, rate, g = x.layout.length, x.layout.rate, cosines(x, b)
    frames = {}
    for i in range(n):
        frames.setdefault(int(i / rate), []).append(i)
    sums = [sum(g[i] for i in frame) * rate / len(frame) for frame in frames.values()]
    p = np.exp(sums) / np.exp(sums).sum()
    won = seats(list(p), [len(f) for f in frames.values()], k1)
    return sorted(i for f, m in zip(frames.values(), won) for i in sorted(f, key=lambda i: (-g[i], i))[:m])


def phase_two(x, b, some, k):
    """The whole attention map of every head, and how much of it each token receives."""
    s = np.sign(x.features[b].double().numpy()[some])
    total = np.zeros(len(some))
    for head in range(HEADS):
        q = s @ np.sign(x.weights[0][head].double().numpy()).T
        key = s @ np.sign(x.weights[1][head // (HEADS // KV_HEADS)].double().numpy()).T
        for i in range(len(some)):
            logits = [float(q[i] @ key[j]) / math.sqrt(HEAD_DIM) for j in range(len(some))]
            e = np.exp(np.array(logits) - max(logits))
            total += e / e.sum()
    return total / (HEADS * len(some))


def kept(x, b, k, k1):
    some = phase_one(x, b, k1) if k1 < x.layout.length else list(range(x.layout.length))
    score, g = phase_two(x, b, some, k), cosines(x, b)
    order = sorted(range(len(some)), key=lambda j: (-round(score[j], 9), -g[some[j]], some[j]))     # equals within rounding
    return sorted(some[j] for j in order[:k]), score


@pytest.mark.parametrize("n, rate", [(60, 25.0), (83, 25.0), (41, 12.5), (38, 12.5), (70, 50.0), (9, 25.0)])
@pytest.mark.parametrize("keep, first", [(0.3, None), (0.4, 0.7), (0.2, 1.0), (7, 8), (5, 5), (0.5, 3)])
def test_the_formulas(n, rate, keep, first):
    x = tokens_of(n, rate, seed=n)
    reducer = SpeechPrune(keep=keep, first=first)
    k = reducer.count(x.layout)
    k1 = max(k, {None: round((n * k) ** 0.5), 0.7: int(n * 0.7), 1.0: n}.get(first, first))
    out = reducer(x)
    for b in range(2):
        expected, score = kept(x, b, k, min(n, k1))
        assert out.index[b].tolist() == expected
        assert abs(score.sum() - 1) < 1e-9
    assert torch.equal(out.tokens, torch.stack([f[i] for f, i in zip(x.features, out.index)]))


def test_the_papers_axis_is_constant():
    """A mean over keys of rows that sum to 1 tells nothing; what is received does."""
    x = tokens_of(40)
    got = received(x.features, *x.weights)
    for b in range(2):
        np.testing.assert_allclose(got[b].numpy(), phase_two(x, b, list(range(40)), 8), atol=1e-6)
    torch.testing.assert_close(got.sum(1), torch.ones(2))
    assert (got.amax(1) > 3 / 40).all() and (got.amin(1) < 0.3 / 40).all()


def test_tiles_change_nothing(monkeypatch):
    x = tokens_of(61)
    whole = received(x.features, *x.weights)
    monkeypatch.setattr(module, "TILE", 7)
    torch.testing.assert_close(received(x.features, *x.weights), whole)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_shares_are_the_papers_floors_made_exact(data):
    size = data.draw(st.lists(st.integers(1, 25), min_size=1, max_size=12))
    total = data.draw(st.integers(1, sum(size)))
    sums = torch.tensor(data.draw(st.lists(st.floats(-25, 25), min_size=len(size), max_size=len(size))))
    p = sums.softmax(0)
    got = shares(torch.stack([p, p]), torch.tensor(size), total)
    assert torch.equal(got[0], got[1])
    won = got[0].tolist()
    assert sum(won) == total and all(0 <= a <= b for a, b in zip(won, size))
    quota = water_filling(p.double().clamp_min(1e-30).tolist(), size, total)
    assert all(abs(a - q) < 1 + 1e-3 for a, q in zip(won, quota))
    if max(total * p).item() < min(size):                           # nothing overflows: the paper's own counts, or one more
        assert all(math.floor(total * q - 1e-3) <= a <= math.floor(total * q + 1e-3) + 1 for a, q in zip(won, p.tolist()))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 130), rate=st.sampled_from([12.5, 25.0, 50.0]), keep=KEEPS, first=st.one_of(st.none(), KEEPS),
       seed=st.integers(0, 5))
def test_exact_count_in_order_and_alike_in_any_batch(n, rate, keep, first, seed):
    x, reducer = tokens_of(n, rate, batch=3, seed=seed), SpeechPrune(keep=keep, first=first)
    out, k = reducer(x), reducer.count(x.layout)
    assert out.index.shape == (3, k) and (out.index.diff(dim=1) > 0).all()
    assert (out.source >= 0).sum(1).tolist() == [k] * 3
    assert torch.equal(out.source.gather(1, out.index), torch.arange(k).expand(3, -1))
    for b in range(3):
        assert torch.equal(reducer(alone(x, b)).index[0], out.index[b])


def test_the_question_picks_its_second():
    """Four seconds of four subjects; the question is about the third, its tokens point the same way."""
    g = torch.Generator().manual_seed(0)
    subjects = torch.eye(DIM)[:4] * 3
    features = subjects.repeat_interleave(25, 0) + 0.1 * torch.randn(100, DIM, generator=g)
    x = replace(tokens_of(100, batch=1), features=features[None])
    for second in range(4):
        asked = replace(x, question=subjects[second].expand(1, 5, -1), question_mask=torch.ones(1, 5, dtype=torch.bool))
        assert (SpeechPrune(keep=20, first=25)(asked).index // 25 == second).all()
        g_, _ = similarity(asked.features, asked.question, asked.question_mask)
        half = by_frames(g_, asked.layout, 50)                          # it is full at 25, the others share the rest
        counts = torch.bincount(half[0] // 25, minlength=4).tolist()
        assert counts.pop(second) == 25 and sum(counts) == 25 and min(counts) > 0


def test_what_pads_a_question_is_not_read():
    x = tokens_of(50, words=(5, 3))
    wild = torch.where(x.question_mask[..., None], x.question, torch.nan)
    assert torch.equal(SpeechPrune(keep=0.3)(replace(x, question=wild)).index, SpeechPrune(keep=0.3)(x).index)


def test_without_a_question_the_first_phase_thins_evenly():
    x, reducer = tokens_of(80, words=(4, 0)), SpeechPrune(keep=20)
    out = reducer(x)
    silent = [replace(x, features=x.features[1:], question=q, question_mask=m) for q, m in
              ((None, None), (x.question[1:, :0], x.question_mask[1:, :0]))]
    for one in silent:
        assert torch.equal(reducer(one).index[0], out.index[1])
    assert out.index[1].tolist() == kept_evenly(x, 1, 20)
    assert not torch.equal(similarity(x.features, x.question, x.question_mask)[0][0], torch.zeros(80))


def kept_evenly(x, b, k):
    some = [int((i + 0.5) * 80 / 40) for i in range(40)]            # sqrt(80 * 20) of 80
    score = phase_two(x, b, some, k)
    return sorted(some[j] for j in sorted(range(40), key=lambda j: (-round(score[j], 9), j))[:k])


def test_ties_go_to_the_likelier_then_the_earlier():
    score, tie = torch.tensor([[0.0, 1, 0, 0, 1, 0]]), torch.tensor([[1.0, 2, 3, 1, 2, 1]])
    assert first_by(score, tie).tolist() == [[1, 4, 2, 0, 3, 5]]
    x = tokens_of(60, batch=2)
    same = replace(x, features=x.features[:, :1].expand(-1, 60, -1))
    out = SpeechPrune(keep=10, first=60)(same)
    assert out.index.tolist() == [list(range(10))] * 2
    spread = SpeechPrune(keep=10, first=30)(same).index             # 25, 25 and 10 tokens: equal shares, the earlier of equals
    assert torch.equal(spread, torch.arange(10).expand(2, -1))


def test_half_precision_ranks_like_float():
    x = tokens_of(90, dtype=torch.bfloat16)
    out = SpeechPrune(keep=0.3)(x)
    assert out.tokens.dtype == torch.bfloat16
    wide = replace(x, features=x.features.float(), question=x.question.float(), weights=tuple(w.float() for w in x.weights))
    assert torch.equal(out.index, SpeechPrune(keep=0.3)(wide).index)


def test_gradients_reach_what_is_kept_and_nothing_else():
    x = tokens_of(50)
    x = replace(x, features=x.features.requires_grad_(), question=x.question.requires_grad_())
    out = SpeechPrune(keep=0.3)(x)
    out.tokens.sum().backward()
    expected = torch.zeros(2, 50).scatter(1, out.index, 1.0)
    assert torch.equal(x.features.grad, expected[..., None].expand(-1, -1, DIM)) and x.question.grad is None


@pytest.mark.parametrize("first", [None, 1.0])
def test_compiles_whole(first):
    x, reducer = tokens_of(70), SpeechPrune(keep=0.3, first=first)

    def reduce(features, question, mask, query, key):
        out = reducer(Tokens(features, x.layout, question=question, question_mask=mask, weights=(query, key)))
        return out.tokens, out.index, out.source

    given_ = (x.features, x.question, x.question_mask, *x.weights)
    torch._dynamo.reset()
    for got, expected in zip(torch.compile(reduce, fullgraph=True, backend="aot_eager")(*given_), reduce(*given_)):
        assert torch.equal(got, expected)


def test_configuration():
    with pytest.raises(ValueError, match="first=0"):
        SpeechPrune(first=0)
    for reducer in (SpeechPrune(keep=0.4), SpeechPrune(keep=64, first=750), SpeechPrune(first=0.5)):
        assert WrapConfig.from_dict(WrapConfig(audio=reducer).to_dict()).audio == reducer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [None, 0.7])
def test_in_a_model_a_batch_equals_greedy_by_hand(family, first):
    model = build(family)
    rows = rows_for(family)
    inputs, config = make_inputs(model, rows), WrapConfig(audio=SpeechPrune(keep=0.4, first=first))
    length = inputs["input_ids"].shape[1]
    with mmcompress.wrap(model, config) as w:
        out = w.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)[:, length:]
    for i, row in enumerate(rows):
        if row:
            assert torch.equal(out[i], greedy_reference(model, row_of(model, inputs, rows, i), config, 3))


def test_whisper_is_asked_nothing():
    with mmcompress.wrap(whisper(), audio=SpeechPrune(keep=0.5)) as w, pytest.raises(SignalError, match="Whisper"):
        w.generate(input_features=torch.randn(1, 8, 200), max_new_tokens=3)
