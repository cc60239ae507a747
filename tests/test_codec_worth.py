"""What books are worth, against closed forms and against all choices tried."""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tiny_codec import model_of, noise

from mmcompress.audio.codec import AudioTokens, choose, detokenize, gains, prefix_errors, relative_error, tokenize, usage
from mmcompress.audio.reading import as_sound


def tokens_of(codes, vocab, lengths=None, rate=50.0):
    codes = torch.as_tensor(codes)
    lengths = torch.full((len(codes),), codes.shape[2]) if lengths is None else torch.tensor(lengths)
    return AudioTokens(codes, lengths, rate, vocab, "xcodec", 16_000)


def frames(*lengths, n_q=3, vocab=16):
    return tokens_of(torch.zeros(len(lengths), n_q, max(lengths), dtype=torch.int64), (vocab,) * n_q, lengths)


# use --------------------------------------------------------------------------------------------------------------------

def test_a_uniform_a_constant_and_a_skewed_book():
    """H = log2 K, 0, and 1/2 * 1 + 1/4 * 2 + 2 * 1/8 * 3 = 1.75 bits."""
    t = torch.arange(64)
    skewed = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])[t % 8]
    found = usage(tokens_of(torch.stack([t % 16, 0 * t + 5, skewed])[None], (16, 16, 8)))
    assert found.entropy.tolist() == [4.0, 0.0, 1.75] and found.frames == 64
    assert found.perplexity.tolist() == pytest.approx([16, 1, 2 ** 1.75])
    assert found.used.tolist() == [1.0, 1 / 16, 0.5]
    assert found.entropy_kbps == pytest.approx(50 * 5.75 / 1000) and found.nominal_kbps == pytest.approx(50 * 11 / 1000)


def test_padding_is_not_counted():
    codes = torch.zeros(2, 1, 8, dtype=torch.int64)
    codes[0, 0, :2] = torch.tensor([1, 2])
    codes[1, 0, :2] = torch.tensor([3, 4])
    found = usage(tokens_of(codes, (8,), (2, 2)))
    assert found.entropy.item() == 2.0 and found.used.item() == 0.5 and found.frames == 4
    with pytest.raises(ValueError, match="no frames"):
        usage(tokens_of(codes, (8,), (0, 0)))


@given(seed=st.integers(0, 10 ** 6), size=st.integers(1, 20), n=st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_entropy_lies_between_its_bounds(seed, size, n):
    codes = torch.randint(0, size, (1, 1, n), generator=torch.Generator().manual_seed(seed))
    found = usage(tokens_of(codes, (size,)))
    shares = [float((codes == c).double().mean()) for c in codes.unique()]
    assert found.entropy.item() == pytest.approx(-sum(p * math.log2(p) for p in shares), abs=1e-12)
    assert 0 <= found.entropy.item() <= math.log2(min(size, n)) + 1e-9
    assert found.entropy_kbps <= found.nominal_kbps + 1e-9


# what books repair ------------------------------------------------------------------------------------------------------

def test_gains_add_up_to_the_whole():
    errors = torch.tensor([[0.5, 0.4, 0.45], [0.9, 0.2, 0.1]], dtype=torch.float64)
    found = gains(errors)
    assert torch.allclose(found, torch.tensor([[0.5, 0.1, -0.05], [0.1, 0.7, 0.1]], dtype=torch.float64))
    assert torch.allclose(found.sum(1), 1 - errors[:, -1]) and float(gains(errors, silence=2.0)[0, 0]) == 1.5


def test_the_error_of_a_sound():
    x = torch.randn(100)
    assert relative_error(x, x) == 0
    assert relative_error(x, 0 * x) == pytest.approx(1) == relative_error(x, 2 * x)
    assert relative_error(x, 0.9 * x) == pytest.approx(0.01, rel=1e-4)
    assert relative_error(0 * x, 0 * x) == 0 and relative_error(0 * x, x) == 1


def test_errors_of_prefixes_are_those_of_their_sounds():
    model = model_of("dac")
    sounds = [as_sound(noise(n * 0.02, seed=n), 16_000) for n in (4, 6)]
    tokens = tokenize(model, sounds)
    whole = detokenize(model, tokens)
    errors = prefix_errors(model, tokens, whole)
    assert errors.shape == (2, 5) and (errors[:, -1] < 1e-8).all() and (errors[:, :-1] > 1e-3).all()
    third = [relative_error(a.samples, b.samples) for a, b in zip(whole, detokenize(model, tokens.prefix(3)))]
    assert errors[:, 2].tolist() == pytest.approx(third)
    lengths = prefix_errors(model, tokens, sounds, lambda reference, decoded: float(len(reference) - len(decoded)))
    assert not lengths.any()
    with pytest.raises(ValueError, match="1 references for 2"):
        prefix_errors(model, tokens, whole[:1])
    with pytest.raises(ValueError, match="to=16000"):
        prefix_errors(model, tokens, [as_sound(s, to=24_000) for s in sounds])


# how many to buy --------------------------------------------------------------------------------------------------------

def test_one_recording_gets_what_fits():
    tokens, errors = frames(10, n_q=4), torch.tensor([[0.5, 0.3, 0.2, 0.1]])
    assert [choose(errors, tokens, tokens_per_second=r).item() for r in (50, 99, 100, 199, 200, 10_000)] == [1, 1, 2, 3, 4, 4]
    assert [choose(errors, tokens, kbps=k).item() for k in (0.2, 0.41, 0.6, 0.8)] == [1, 2, 3, 4]


def test_books_that_do_not_help_are_not_bought():
    tokens = frames(10, 10, n_q=3)
    assert choose(torch.tensor([[0.5, 0.6, 0.7], [0.5, 0.4, 0.4]]), tokens, tokens_per_second=150).tolist() == [1, 2]
    # a weak second book before a strong third one: bought together
    assert choose(torch.tensor([[0.5, 0.5, 0.1], [0.5, 0.4, 0.35]]), tokens, tokens_per_second=100).tolist() == [3, 1]


def test_long_recordings_weigh_more_and_cost_more():
    tokens, errors = frames(10, 20, n_q=2), torch.tensor([[0.5, 0.2], [0.5, 0.1]])
    assert choose(errors, tokens, tokens_per_second=50 * 50 / 30).tolist() == [1, 2]
    assert choose(errors, tokens, tokens_per_second=50 * 49 / 30).tolist() == [2, 1]


@given(drops=st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=4), books=st.integers(0, 8))
@settings(max_examples=150, deadline=None)
def test_with_diminishing_gains_it_is_the_best_of_all(drops, books):
    """Recordings of one length, books of one size: against every choice."""
    gained = torch.tensor([sorted(row, reverse=True) for row in drops], dtype=torch.float64)
    errors = torch.cat([torch.full((len(drops), 1), 200.0, dtype=torch.float64), 200 - gained.cumsum(1)], 1)
    tokens = frames(*[10] * len(drops), n_q=4)
    total = len(drops) + books
    found = choose(errors, tokens, tokens_per_second=50 * total / len(drops))
    assert int(found.sum()) <= total and (found >= 1).all()
    cost = lambda choice: sum(float(errors[b, n - 1]) for b, n in enumerate(choice))  # noqa: E731
    best = min(cost(c) for c in itertools.product(range(1, 5), repeat=len(drops)) if sum(c) <= total)
    assert cost(found.tolist()) == pytest.approx(best)


@given(seed=st.integers(0, 10 ** 6), limit=st.floats(0.2, 0.9))
@settings(max_examples=60, deadline=None)
def test_the_budget_holds_for_any_curve(seed, limit):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (4,), generator=g).tolist()
    tokens, errors = frames(*lengths, n_q=4), torch.rand(4, 4, generator=g)
    found = choose(errors, tokens, kbps=limit)
    assert sum(n * length * 4 for n, length in zip(found.tolist(), lengths)) <= limit * 1000 / 50 * sum(lengths) * (1 + 1e-6)
    before, after = errors[:, 0], errors.gather(1, found[:, None] - 1)[:, 0]
    assert (after <= before).all()


def test_choices_that_cannot_be_made():
    tokens, errors = frames(10, n_q=3), torch.rand(1, 3)
    for wrong, message in ((dict(kbps=0.1), "takes 0.2"), (dict(), "one of them"),
                           (dict(kbps=1, tokens_per_second=50), "one of them")):
        with pytest.raises(ValueError, match=message):
            choose(errors, tokens, **wrong)
    with pytest.raises(ValueError, match=r"pass \(B, n_q\)"):
        choose(errors[0], tokens, kbps=1)


def test_spectral_and_semantic_errors():
    from mmcompress.audio.codec import semantic_error, spectral_error

    x, y = noise(0.4), noise(0.4, seed=1)
    assert spectral_error(x, x) == 0 and spectral_error(x, 10 * x) == pytest.approx(math.log(10), abs=1e-3)
    model = model_of("xcodec")
    distortion = semantic_error(model)
    assert distortion(x, x) == 0 and distortion(x, y) > 0
    with torch.no_grad():                                           # the teacher by hand: mean of its hidden states
        f, g = (torch.stack(model.semantic_model(torch.nn.functional.pad(s[None], (160, 160)),
                                                 output_hidden_states=True).hidden_states).mean(0)[0].double() for s in (x, y))
    assert distortion(x, y) == pytest.approx(float((g - f).square().sum() / (f - f.mean(0)).square().sum()), rel=1e-6)
