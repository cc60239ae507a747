"""Sequences for language models: each order against a loop, and its inverse, for every number of books, frames and lengths."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from mmcompress.audio.codec import AudioTokens, Runs, arrange, collapse
from mmcompress.audio.codec.layouts import ORDERS

MANY = settings(max_examples=150, deadline=None)


@st.composite
def recordings(draw, most=4):
    """Tokens of 1 ... 5 books of different sizes, 0 ... 3 recordings, 0 ... 7 frames, each length between."""
    n_q, batch, frames = draw(st.integers(1, 5)), draw(st.integers(0, 3)), draw(st.integers(0, 7))
    vocab = tuple(draw(st.integers(1, most)) for _ in range(n_q))
    lengths = torch.tensor([draw(st.integers(0, frames)) for _ in range(batch)], dtype=torch.int64)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2 ** 31)))
    codes = (torch.rand(batch, n_q, frames, generator=g) * torch.tensor(vocab)[:, None]).long()
    return AudioTokens(codes, lengths, 50.0, vocab, "xcodec", 16_000)


def same(a, b):
    """Equal up to padding behind the longest recording."""
    most = int(b.lengths.max()) if len(b) else 0
    about = ("rate", "vocab", "codec", "sample_rate")
    return torch.equal(a.lengths, b.lengths) and torch.equal(a.codes[:, :, :most], b.codes[:, :, :most]) \
        and a.codes.shape == (len(b), b.n_q, most) and all(getattr(a, k) == getattr(b, k) for k in about)


def written_out(tokens, order, joint, b):
    """One recording's ids by loops, as lists: one, or one per book."""
    n, n_q = int(tokens.lengths[b]), tokens.n_q
    first = [sum(tokens.vocab[:k]) if joint else 0 for k in range(n_q)]
    pad = sum(tokens.vocab) if joint else max(tokens.vocab)
    code = lambda k, t: int(tokens.codes[b, k, t]) + first[k]  # noqa: E731
    if order == "flatten":
        return [code(k, t) for t in range(n) for k in range(n_q)]
    if order == "coarse_first":
        return [code(k, t) for k in range(n_q) for t in range(n)]
    if order == "parallel":
        return [[code(k, t) for t in range(n)] for k in range(n_q)]
    return [[pad] * k + [code(k, t) for t in range(n)] + [pad] * (n_q - 1 - k) if n else [] for k in range(n_q)]


@pytest.mark.parametrize("order", ORDERS)
@given(tokens=recordings(), joint=st.sampled_from([True, False, None]))
@MANY
def test_an_order_is_what_loops_write_and_comes_back(order, tokens, joint):
    sequence = arrange(tokens, order, joint)
    joint = sequence.joint if joint is None else joint
    for b in range(len(tokens)):
        expected = torch.tensor(written_out(tokens, order, joint, b), dtype=torch.int64)
        steps = int(sequence.lengths[b])
        assert steps == expected.shape[-1] and torch.equal(sequence.ids[b, ..., :steps], expected)
        assert (sequence.ids[b, ..., steps:] == sequence.pad).all()
    assert sequence.ids.shape[-1] == (int(sequence.lengths.max()) if len(tokens) else 0)
    assert sequence.mask.sum() == sequence.lengths.sum()
    assert not sequence.ids.numel() or int(sequence.ids.max()) < sequence.vocabulary
    assert same(sequence.restore(), tokens)


@pytest.mark.parametrize("order", ORDERS)
@given(tokens=recordings(), more=st.integers(0, 3), seed=st.integers(0, 99))
@MANY
def test_what_stands_behind_the_length_does_not_matter(order, tokens, more, seed):
    """As when a language model goes on writing."""
    sequence = arrange(tokens, order)
    ids = torch.nn.functional.pad(sequence.ids, (0, more))
    wild = torch.randint(-5, 99, ids.shape, generator=torch.Generator().manual_seed(seed))
    beyond = torch.arange(ids.shape[-1]) >= sequence.lengths.view(-1, *[1] * (ids.ndim - 1))
    assert same(replace(sequence, ids=torch.where(beyond, wild, ids)).restore(), tokens)


def test_the_defaults_by_example():
    tokens = AudioTokens(torch.tensor([[[1, 2, 3], [0, 1, 0]]]), torch.tensor([3]), 50.0, (4, 2), "xcodec", 16_000)
    assert arrange(tokens).ids.tolist() == [[1, 4, 2, 5, 3, 4]]
    assert arrange(tokens, "coarse_first").ids.tolist() == [[1, 2, 3, 4, 5, 4]]
    assert arrange(tokens, "parallel").ids.tolist() == [[[1, 2, 3], [0, 1, 0]]]
    assert arrange(tokens, "delay").ids.tolist() == [[[1, 2, 3, 4], [4, 0, 1, 0]]]
    assert arrange(tokens, "delay", joint=True).ids.tolist() == [[[1, 2, 3, 6], [6, 4, 5, 4]]]
    assert (arrange(tokens).pad, arrange(tokens).vocabulary, arrange(tokens, "delay").pad) == (6, 7, 4)


def test_the_delay_of_musicgen():
    """transformers' own pattern: what it calls the mask is where codes lie, after its one start step."""
    from transformers import MusicgenForCausalLM
    n_q, frames, pad = 4, 6, 50
    codes = torch.randint(0, 50, (1, n_q, frames))
    tokens = AudioTokens(codes, torch.tensor([frames]), 50.0, (50,) * n_q, "encodec", 32_000)
    ids = torch.cat([torch.full((n_q, 1), pad), codes[0]], 1)
    build = MusicgenForCausalLM.build_delay_pattern_mask
    fake = type("Model", (), {"num_codebooks": n_q, "config": type("Config", (), {"audio_channels": 1})})()
    _, mask = build(fake, ids, pad_token_id=pad, max_length=frames + n_q)
    ours = arrange(tokens, "delay")
    assert ours.pad == pad and ours.ids.shape == (1, n_q, frames + n_q - 1)
    assert torch.equal(ours.ids[0] == pad, mask[:, 1:] == pad)


def test_what_a_language_model_wrote_wrong():
    tokens = AudioTokens(torch.zeros(1, 3, 2, dtype=torch.int64), torch.tensor([2]), 50.0, (4, 2, 2), "xcodec", 16_000)
    with pytest.raises(ValueError, match="order='rows': one of flatten"):
        arrange(tokens, "rows")
    flat, delayed = arrange(tokens), arrange(tokens, "delay")
    for sequence, wrong, message in (
            (flat, dict(lengths=torch.tensor([5])), "cut it to 3"), (delayed, dict(lengths=torch.tensor([2])), "at least 3"),
            (flat, dict(lengths=torch.tensor([7])), r"0 \.\.\. 6"), (flat, dict(ids=flat.ids[:, None]), r"ids \(B, L\)"),
            (delayed, dict(ids=delayed.ids[:, :2]), r"ids \(B, n_q, L\)"), (flat, dict(ids=flat.ids.float()), "int64"),
            (flat, dict(ids=flat.ids.flip(1)), "code .* in book 0 of recording 0, frame 0")):
        with pytest.raises(ValueError, match=message):
            replace(sequence, **wrong).restore()


# runs -------------------------------------------------------------------------------------------------------------------

def runs_by_loop(frames, longest):
    """[(codes, duration)] of a list of frames."""
    runs = []
    for frame in frames:
        if runs and runs[-1][0] == frame and (longest is None or runs[-1][1] < longest):
            runs[-1][1] += 1
        else:
            runs.append([frame, 1])
    return runs


@given(tokens=recordings(most=2), longest=st.sampled_from([None, 1, 2, 3]))
@MANY
def test_runs_are_what_a_loop_finds_and_come_back(tokens, longest):
    runs = collapse(tokens, longest)
    for b in range(len(tokens)):
        expected = runs_by_loop(tokens.codes[b, :, :int(tokens.lengths[b])].T.tolist(), longest)
        n = int(runs.tokens.lengths[b])
        assert [[c, d] for c, d in zip(runs.tokens.codes[b, :, :n].T.tolist(), runs.durations[b, :n].tolist())] == expected
        assert not runs.durations[b, n:].any()
    assert same(runs.expand(), tokens)


def test_runs_save_tokens():
    tokens = AudioTokens(torch.tensor([[[3, 3, 3, 1, 1, 3]]]), torch.tensor([6]), 50.0, (4,), "xcodec", 16_000)
    runs = collapse(tokens)
    assert runs.tokens.codes.tolist() == [[[3, 1, 3]]] and runs.durations.tolist() == [[3, 2, 1]]
    assert runs.tokens_per_second == 25.0 and collapse(tokens, 1).tokens_per_second == 50.0
    with pytest.raises(ValueError, match="longest=0"):
        collapse(tokens, 0)
    for wrong in (torch.tensor([[3, 2]]), torch.tensor([[3.0, 2, 1]]), torch.tensor([[3, 0, 1]])):
        with pytest.raises(ValueError, match="durations"):
            Runs(runs.tokens, wrong).expand()
