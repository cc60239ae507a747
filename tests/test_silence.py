"""EnergyPrune and SilencePrune against loops over tokens, on spectrograms whose pauses are known."""

import math
import sys
from dataclasses import replace
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tiny_audio import FAMILIES, STATES, build, greedy_reference, make_inputs, mel, row_of, rows_for, whisper

import mmcompress
from mmcompress import SignalError, WrapConfig
from mmcompress.audio import EnergyPrune, SilencePrune
from mmcompress.audio.base import evenly
from mmcompress.audio.silence_prune import quiet, spectral_change, thin, to_sound
from mmcompress.layout import AudioLayout
from mmcompress.tokens import Tokens

BINS, FLOOR = 8, -0.5
BOTH = [EnergyPrune, SilencePrune]


def tokens_of(level, rate=25.0, sound=-1, spread=0.0, seed=0, dtype=torch.float32):
    """A recording whose tokens are this loud. level (N,) or (B, N)"""
    g = torch.Generator().manual_seed(seed)
    level = torch.as_tensor(level, dtype=torch.float32).view(-1, len(level) if isinstance(level, list) else level.shape[-1])
    spectrum = level[..., None] + spread * torch.randn(*level.shape, BINS, generator=g)
    features = torch.randn(*level.shape, 4, generator=g)
    return Tokens(features.to(dtype), AudioLayout(level.shape[1], rate, sound), mel=spectrum)


def random_recording(n, rate, sound, seed, batch=2):
    """Words and pauses of 1 to 20 tokens, behind them digital silence."""
    g = torch.Generator().manual_seed(seed)
    level = torch.empty(batch, n)
    for row in level:
        at, on = 0, bool(torch.rand((), generator=g) < 0.5)
        while at < n:
            length = int(torch.randint(1, 21, (), generator=g))
            row[at:at + length] = 1.0 if on else 0.1
            at, on = at + length, not on
    x = tokens_of(level, rate, sound, spread=0.15, seed=seed)
    x.mel[:, sound if sound >= 0 else n:] = FLOOR
    return x


# the rules, by loops ----------------------------------------------------------------------------------------------------

def pauses_by_loops(loud, rate, depth, edge):
    """-> {token: tokens to the nearest sound} of the pauses"""
    n, ordered = len(loud), sorted(loud)
    floor, level = (np.float32(ordered[i]) for i in (n * 5 // 100, n - 1 - n // 10))
    limit = min(floor + np.float32(depth) * (level - floor), level - np.float32(0.25))
    noise = [i for i in range(n) if loud[i] >= limit]
    far = {i: min(abs(i - j) for j in noise) for i in range(n)}
    return {i: d for i, d in far.items() if d > edge * rate}


def flux_by_loops(spectrum):
    n, spectrum = len(spectrum), spectrum.double().numpy()
    return [np.mean(np.abs(spectrum[min(i + 1, n - 1)] - spectrum[max(i - 1, 0)])) / 2 for i in range(n)]


def thin_by_loops(weight, seats):
    """Points at 1/2, 3/2, ... on a line on which each position takes min(1, c weight), in fractions."""
    share, certain = {}, set()
    positive = [i for i, w in enumerate(weight) if w]
    while True:
        rest = [i for i in positive if i not in certain]
        c = Fraction(seats - len(certain), sum(weight[i] for i in rest)) if rest else Fraction(0)
        over = {i for i in rest if c * weight[i] > 1}
        if not over:
            break
        certain |= over
    share = {i: Fraction(1) if i in certain else c * weight[i] for i in positive}
    out, at = [], Fraction(0)
    for i in positive:
        if any(at <= Fraction(2 * j + 1, 2) < at + share[i] for j in range(math.floor(at), math.floor(at) + 2)):
            out.append(i)
        at += share[i]
    assert at == seats
    return out


def kept(x, b, k, depth, edge, end, change):
    layout = x.layout
    n = layout.sound or layout.length
    tail = layout.length - n
    share = k - max(1, round(k * n / layout.length))                # what is behind a recording gets when all get the same
    of_tail = max(k - n, min(share, tail, round(end * layout.rate)))
    silence = [n + (2 * i + 1) * tail // (2 * of_tail) for i in range(of_tail)]
    k, loud = k - of_tail, x.mel[b, :n].mean(-1).tolist()
    pause = pauses_by_loops(loud, layout.rate, depth, edge)
    rest = [i for i in range(n) if i not in pause]
    if k >= len(rest):
        nearest = sorted(pause, key=lambda i: (pause[i], -loud[i], i))
        return sorted(rest + nearest[:k - len(rest)]) + silence
    flux = flux_by_loops(x.mel[b, :n])
    mean = sum(flux[i] for i in rest) / len(rest)
    weight = [0 if i in pause else min(1 << 15, round(256 * (1 + change * flux[i] / max(mean, 1e-9)))) for i in range(n)]
    return thin_by_loops(weight, k) + silence


@pytest.mark.parametrize("n, rate, sound", [(120, 25.0, -1), (75, 12.5, -1), (150, 50.0, 97), (100, 50.0, 0), (7, 25.0, -1)])
@pytest.mark.parametrize("keep", [0.95, 0.7, 0.5, 0.3, 1])
@pytest.mark.parametrize("options", [(0.3, 0.1, 1.0, 1.0), (0.5, 0.0, 0.2, 3.0)])
def test_silence_prune(n, rate, sound, keep, options):
    x = random_recording(n, rate, sound, seed=n)
    reducer = SilencePrune(keep, *options)
    out = reducer(x)
    for b in range(2):
        assert out.index[b].tolist() == kept(x, b, reducer.count(x.layout), *options)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 1 << 15), min_size=1, max_size=40).filter(any), st.data())
def test_thinning_is_exact_and_even(weight, data):
    seats = data.draw(st.integers(1, sum(w > 0 for w in weight)))
    got = thin(torch.tensor([weight, weight]), torch.tensor([[seats], [1]]))
    assert got[0].nonzero()[:, 0].tolist() == thin_by_loops(weight, seats)
    assert got.sum(1).tolist() == [seats, 1]


@given(st.integers(1, 2000), st.data())
@settings(max_examples=40, deadline=None)
def test_equal_weights_are_thinned_like_a_stride(n, data):
    k = data.draw(st.integers(1, n))
    assert torch.equal(thin(torch.full((1, n), 256), torch.tensor([[k]]))[0].nonzero()[:, 0], evenly(n, k))


def test_thinning_counts_exactly_over_an_hour():
    g = torch.Generator().manual_seed(0)
    weight = torch.randint(1, 1 << 15, (1, 180_000), generator=g)
    for k in (1, 17, 60_001, 179_999, 180_000):
        assert int(thin(weight, torch.tensor([[k]])).sum()) == k


@pytest.mark.parametrize("method", BOTH)
@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 160), rate=st.sampled_from([12.5, 25.0, 50.0]), share=st.floats(0, 1), seed=st.integers(0, 5),
       keep=st.one_of(st.floats(0.01, 1.0), st.integers(1, 170)))
def test_exact_count_in_order_and_alike_in_any_batch(method, n, rate, keep, share, seed):
    x, reducer = random_recording(n, rate, int(share * n), seed, batch=3), method(keep=keep)
    out, k = reducer(x), reducer.count(x.layout)
    assert out.index.shape == (3, k) and (out.index.diff(dim=1) > 0).all()
    assert torch.equal(out.source.gather(1, out.index), torch.arange(k).expand(3, -1)) and int((out.source >= 0).sum()) == 3 * k
    for b in range(3):
        one = replace(x, features=x.features[b:b + 1], mel=x.mel[b:b + 1])
        assert torch.equal(reducer(one).index[0], out.index[b])


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("keep", [0.6, 0.5, 0.4])
def test_the_silence_between_two_tones_goes_first(method, keep):
    level = [1.0] * 30 + [0.0] * 40 + [0.9] * 30
    index = method(keep=keep)(tokens_of(level, spread=0.01)).index[0]
    within = ((index >= 30) & (index < 70)).sum()
    assert within == {EnergyPrune: 0, SilencePrune: 4 if keep == 0.6 else within}[method]      # 0.1 s at both ends are no pause
    assert ((index < 30) | (index >= 70)).sum() == round(100 * keep) - within


def test_long_pauses_give_up_their_middle_until_all_are_short():
    """Pauses of 30 and 8 tokens, of which 2 at each end are edges: what goes is further from sound than what stays."""
    x = tokens_of([1.0] * 10 + [0.0] * 30 + [1.0] * 10 + [0.0] * 8 + [1.0] * 10)
    far = {i: min(i - 9, 40 - i) for i in range(10, 40)} | {i: min(i - 49, 58 - i) for i in range(50, 58)}
    for gone in range(1, 26 + 4 + 1):
        keeps = SilencePrune(keep=68 - gone)(x).index[0].tolist()
        lost = [i for i in range(68) if i not in keeps]
        assert len(lost) == gone and all(far[i] > 2 for i in lost)
        assert min(far[i] for i in lost) >= max(far[i] for i in far if i in keeps)


def test_silence_behind_a_recording_goes_first_but_for_a_second():
    """A window of 4 s whose first 1.6 s are a tone."""
    x = tokens_of([1.0] * 80 + [FLOOR] * 120, 50.0, 80, spread=0.01)
    for end, k, behind in ((1.0, 150, 70), (1.0, 130, 50), (1.0, 100, 50), (1.0, 50, 30), (0.1, 85, 5), (0.1, 50, 5),
                           (0.0, 80, 0), (0.0, 50, 0), (0.0, 90, 10)):
        index = SilencePrune(keep=k, end=end)(x).index[0]
        assert torch.equal(index[k - behind:], 80 + evenly(120, behind)) and (index[:k - behind] < 80).all()


def test_energy_prune_leaves_the_silence_behind_a_recording_its_share():
    x = tokens_of([1.0] * 80 + [FLOOR] * 120, 50.0, 80)
    index = EnergyPrune(keep=50)(x).index[0]
    assert index[:20].tolist() == list(range(20)) and torch.equal(index[20:], 80 + evenly(120, 30))


def test_energy_prune_keeps_the_loudest():
    x = random_recording(90, 25.0, -1, seed=1)
    for b, index in enumerate(EnergyPrune(keep=33)(x).index):
        loud = x.mel[b].mean(-1).tolist()
        assert index.tolist() == sorted(sorted(range(90), key=lambda i: (-loud[i], i))[:33])


def test_equals_are_settled_by_time_alone():
    x = tokens_of([0.5] * 40)
    assert EnergyPrune(keep=10)(x).index[0].tolist() == list(range(10))
    assert torch.equal(SilencePrune(keep=10)(x).index[0], evenly(40, 10))


def test_a_hum_below_the_level_by_less_than_10_db_is_no_pause():
    level = torch.tensor([1.0, 0.8]).repeat_interleave(20)
    assert not quiet(level[None], 0.9).any()
    assert quiet(2 * level[None], 0.9)[0].tolist() == [False] * 20 + [True] * 20
    assert to_sound(torch.tensor([[True, True, False, True, True, True, False, True]])).tolist() == [[2, 1, 0, 1, 2, 1, 0, 1]]


@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_spectral_change_is_half_the_difference_of_the_neighbours(n):
    x = random_recording(n, 25.0, -1, seed=n)
    got = spectral_change(x.mel)
    for b in range(2):
        np.testing.assert_allclose(got[b].numpy(), flux_by_loops(x.mel[b]), atol=1e-6)


def test_what_changes_stays_more_densely():
    """A tone that jumps from band to band in its middle third."""
    spectrum = torch.zeros(1, 90, BINS)
    band = torch.where((torch.arange(90) >= 30) & (torch.arange(90) < 60), torch.arange(90) % BINS, 0)
    spectrum[0, torch.arange(90), band] = 1.0
    x = replace(tokens_of([0.5] * 90), mel=spectrum)
    counts = [torch.bincount(SilencePrune(keep=30, change=c)(x).index[0] // 30, minlength=3).tolist() for c in (0.0, 1.0, 50.0)]
    assert counts[0] == [10, 10, 10] and counts[1][1] > 14 and counts[2][1] > counts[1][1]
    assert all(sum(c) == 30 and min(c) > 0 for c in counts[:2])


def test_without_torchaudio_the_error_names_the_way_out(monkeypatch):
    x = random_recording(60, 25.0, -1, seed=0)
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    with pytest.raises(ImportError, match=r"pip install 'mmcompress\[audio\]'; SilencePrune\(change=0\)"):
        SilencePrune(keep=0.3)(x)
    assert SilencePrune(keep=0.3, change=0)(x).index.shape == (2, 18)
    assert EnergyPrune(keep=0.3)(x).index.shape == (2, 18)


@pytest.mark.parametrize("method", BOTH)
def test_half_precision_gradients_and_missing_spectrograms(method):
    x = random_recording(60, 25.0, -1, seed=2)
    half = method(keep=0.3)(replace(x, features=x.features.bfloat16()))
    assert half.tokens.dtype == torch.bfloat16 and torch.equal(half.index, method(keep=0.3)(x).index)
    features = x.features.clone().requires_grad_()
    method(keep=0.3)(replace(x, features=features)).tokens.sum().backward()
    assert torch.equal(features.grad[..., 0], torch.zeros(2, 60).scatter(1, half.index, 1.0))
    with pytest.raises(SignalError, match="no spectrogram"):
        method(keep=0.3)(replace(x, mel=None))


@pytest.mark.parametrize("reducer", [EnergyPrune(keep=0.4), SilencePrune(keep=0.4), SilencePrune(keep=0.9, change=0)], ids=str)
def test_compiles_whole(reducer):
    x = random_recording(100, 25.0, 80, seed=4)

    def reduce(features, spectrum):
        out = reducer(Tokens(features, x.layout, mel=spectrum))
        return out.tokens, out.index, out.source

    torch._dynamo.reset()
    compiled = torch.compile(reduce, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x.features, x.mel), reduce(x.features, x.mel)):
        assert torch.equal(got, expected)


def test_configuration():
    for bad in (dict(depth=0), dict(depth=1.0), dict(edge=-1), dict(change=float("nan")), dict(keep=0)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SilencePrune(**bad)
    for reducer in (EnergyPrune(keep=0.4), SilencePrune(keep=64), SilencePrune(keep=0.5, depth=0.2, edge=0.0, change=2.0)):
        assert WrapConfig.from_dict(WrapConfig(audio=reducer).to_dict()).audio == reducer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", BOTH)
def test_in_a_model_a_batch_equals_greedy_by_hand(family, method):
    model = build(family)
    rows = rows_for(family)
    inputs, config = make_inputs(model, rows), WrapConfig(audio=method(keep=0.4))
    length = inputs["input_ids"].shape[1]
    with mmcompress.wrap(model, config) as w:
        out = w.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)[:, length:]
    for i, row in enumerate(rows):
        if row:
            assert torch.equal(out[i], greedy_reference(model, row_of(model, inputs, rows, i), config, 3))


@pytest.mark.parametrize("method", BOTH)
def test_whisper_reads_the_states_that_are_kept(method):
    model, g = whisper(), torch.Generator().manual_seed(0)
    pad = lambda x: torch.nn.functional.pad(x, (0, 2 * STATES - x.shape[1]), value=-1.5)  # noqa: E731
    windows = torch.stack([pad(mel(n, g)) for n in (200, 121, 38)])
    stock = model.get_encoder()(windows).last_hidden_state
    with mmcompress.wrap(model, audio=method(keep=0.5, **{"end": 0.2} if method is SilencePrune else {})) as w:
        out = w(input_features=windows, decoder_input_ids=torch.ones(3, 1, dtype=torch.long))
        spans = [i.index for i in w.last]
    assert [len(s) for s in spans] == [STATES // 2] * 3
    for states, whole, index in zip(out.encoder_last_hidden_state, stock, spans):
        torch.testing.assert_close(states, whole[index])
    if method is SilencePrune:                              # 0.38 s of 2 s: all of it is heard
        assert spans[2].tolist() == [*range(19), *(19 + evenly(81, 31)).tolist()]
