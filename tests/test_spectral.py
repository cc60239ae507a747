"""Spectral pooling against scipy's and torch's transforms and closed forms; what the adaptive split promises."""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scipy import fft

import mmcompress.ops.spectral as ops
from mmcompress import registry
from mmcompress.audio import AdaptiveSpectralPool, SpectralPool
from mmcompress.audio.adaptive_spectral_pool import deal, segments_for
from mmcompress.layout import AudioLayout
from mmcompress.ops.spectral import bandwidth, dct, idct, pool_matrix, restoring_gain, spectral_pool, spectrum
from mmcompress.tokens import Tokens

BASES = ops.BASES
METHODS = [SpectralPool, lambda keep: SpectralPool(keep, basis="dft"), AdaptiveSpectralPool]
LENGTHS = (1, 2, 3, 63, 64, 1000)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def recording(features):
    return Tokens(features, AudioLayout(features.shape[1], 50.0))


def drifting(batch, n, dim=8, seed=0):
    """Rows that wander, in some stretches faster than in others."""
    pace = noise(batch, n, 1, seed=seed + 1).cumsum(1).sigmoid()
    return (pace * noise(batch, n, dim, seed=seed)).cumsum(1).float() + 3


def cuts(n):
    return sorted({k for k in (1, 2, n // 3, n // 2, n // 2 + 1, n - 1, n) if 1 <= k <= n})


@pytest.fixture(params=["matrix", "fft"])
def path(request, monkeypatch):
    monkeypatch.setattr(ops, "DENSE", 10 ** 9 if request.param == "matrix" else 0)


@pytest.mark.parametrize("n", LENGTHS)
def test_dct_against_scipy(n):
    x = noise(2, n, 3)
    reference = torch.from_numpy(fft.dct(x.numpy(), axis=1, norm="ortho"))
    for k in cuts(n):
        torch.testing.assert_close(dct(x, k), reference[:, :k], atol=1e-10, rtol=0)
        torch.testing.assert_close(idct(x[:, :k]), torch.from_numpy(fft.idct(x[:, :k].numpy(), axis=1, norm="ortho")))
    torch.testing.assert_close(dct(x), reference, atol=1e-10, rtol=0)


@pytest.mark.parametrize("n", LENGTHS)
def test_pooling_against_scipy_and_torch(n, path):
    x = noise(2, n, 3)
    for k in cuts(n):
        spectrum_kept = fft.dct(x.numpy(), axis=1, norm="ortho")[:, :k]
        expected = torch.from_numpy(fft.idct(spectrum_kept, axis=1, norm="ortho")) * math.sqrt(k / n)
        torch.testing.assert_close(spectral_pool(x, k, "dct"), expected, atol=1e-10, rtol=0)
        shifted = torch.fft.fftshift(torch.fft.fft(x, dim=1, norm="ortho"), dim=1)                  # as the paper crops it
        crop = torch.fft.ifftshift(shifted[:, n // 2 - k // 2:n // 2 - k // 2 + k], dim=1)
        crop[:, k // 2] = crop[:, k // 2].real.to(crop.dtype) if k % 2 == 0 else crop[:, k // 2]
        whole = torch.fft.ifft(crop, dim=1, norm="ortho") * math.sqrt(k / n)
        assert whole.imag.abs().max() < 1e-10
        torch.testing.assert_close(spectral_pool(x, k, "dft"), whole.real, atol=1e-10, rtol=0)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("n, k", [(63, 20), (63, 21), (64, 32), (64, 33), (1000, 250)])
def test_below_the_cut_nothing_is_lost(basis, n, k, path):
    """A sum of waves below the cut, sampled at the places that `spectral_pool` names; a constant is the lowest of them."""
    def wave(t):
        cycles = [0, 1, 2.5, (k - 1) / 2] if basis == "dct" else [0, 1, 3, (k - 1) // 2]
        lag = 0.5 if basis == "dct" else 0
        turn = 0 if basis == "dct" else 0.7
        return sum(torch.cos(2 * math.pi * f * (t + lag) / n + turn) / (1 + f) for f in cycles)[None, :, None]
    step = torch.arange(k, dtype=torch.float64) * n / k
    at = step + n / k / 2 - 0.5 if basis == "dct" else step
    torch.testing.assert_close(spectral_pool(wave(torch.arange(n).double()), k, basis), wave(at), atol=1e-9, rtol=0)
    torch.testing.assert_close(pool_matrix(n, k, basis, dtype=torch.float64).sum(1), torch.ones(k).double())


def test_a_ramp_wraps_in_the_dft_and_not_in_the_dct(path):
    ramp = (torch.arange(100.0) / 99)[None, :, None]
    middle = (torch.arange(40) * 2.5 + 0.75) / 99
    worst = {basis: float((spectral_pool(ramp, 40, basis)[0, :, 0] - middle).abs().max()) for basis in BASES}
    assert worst["dct"] == pytest.approx(0.0014, abs=1e-4) and worst["dft"] == pytest.approx(0.2955, abs=1e-3)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("n", LENGTHS)
def test_parseval(basis, n):
    x = noise(2, n, 3)
    energy = spectrum(x, basis)
    torch.testing.assert_close(energy.sum(1), x.square().sum((1, 2)))
    for k in cuts(n):
        pooled = spectral_pool(x, k, basis).square().sum((1, 2)) * n / k
        if basis == "dct":
            torch.testing.assert_close(pooled, energy[:, :k].sum(1))
        elif k % 2:
            torch.testing.assert_close(pooled, energy[:, :k // 2 + 1].sum(1))


def test_bandwidth():
    t = torch.arange(200).double()
    waves = torch.cos(math.pi * 7 * (t + 0.5) / 200) + 0.1 * torch.cos(math.pi * 50 * (t + 0.5) / 200)
    x = torch.stack([5 + waves, torch.full_like(t, 5)])[..., None]
    assert bandwidth(spectrum(x))[0] == 8 and bandwidth(spectrum(x), 0.999)[0] == 51
    assert bandwidth(torch.tensor([[3.0, 0, 0], [3.0, 0, 1], [0, 9.0, 1]])).tolist() == [1, 3, 3]
    assert bandwidth(torch.ones(2, 1)).tolist() == [1, 1]


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("n, k", [(2, 1), (63, 20), (64, 33)])
def test_the_gradient_is_the_transpose(basis, n, k, path):
    x = noise(1, n, 2).requires_grad_()
    weight = noise(1, k, 2, seed=1)
    (spectral_pool(x, k, basis) * weight).sum().backward()
    torch.testing.assert_close(x.grad, pool_matrix(n, k, basis, dtype=torch.float64).T @ weight, atol=1e-10, rtol=0)


@pytest.mark.parametrize("basis", BASES)
def test_half_precision_is_computed_in_float32(basis, path):
    x = noise(2, 100, 4).bfloat16()
    out = spectral_pool(x, 30, basis)
    assert out.dtype == torch.bfloat16 and torch.equal(out, spectral_pool(x.float(), 30, basis).bfloat16())


def test_wrong_names():
    with pytest.raises(ValueError, match="basis='fft': one of dct, dft"):
        SpectralPool(basis="fft")
    with pytest.raises(ValueError, match="segment=3"):
        AdaptiveSpectralPool(segment=3)
    with pytest.raises(ValueError, match="segment=True"):
        AdaptiveSpectralPool(segment=True)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"{k} of 5"):
            pool_matrix(5, k)


def test_restoring_gain():
    gain = restoring_gain(torch.tensor([4.0, 4, 4, 0, 1]), torch.tensor([1.0, 4, 0, 0, 1.01]), 3.0)
    torch.testing.assert_close(gain, torch.tensor([3.0, 1, 3, 1, 1]).sqrt())


@pytest.mark.parametrize("basis", BASES)
def test_spectral_pool(basis):
    x = noise(2, 90, 6).cumsum(1).float()
    out = SpectralPool(keep=30, basis=basis, restore=False)(recording(x))
    torch.testing.assert_close(out.tokens, spectral_pool(x, 30, basis), atol=1e-4, rtol=1e-4)
    assert out.index.tolist() == [list(range(1, 90, 3))] * 2 and out.source.tolist() == [[i // 3 for i in range(90)]] * 2
    assert out.mass.unique().tolist() == [3.0]
    restored = SpectralPool(keep=30, basis=basis)(recording(x)).tokens
    mean = x.mean(1, keepdim=True)
    torch.testing.assert_close((restored - mean).square().sum(2).mean(1), (x - mean).square().sum(2).mean(1), rtol=1e-4, atol=0)
    ratio = (restored - mean) / (out.tokens - mean)                                                 # one factor a recording
    assert ratio.flatten(1).median(1).values.min() > 1 and (ratio.flatten(1).std(1) < 1e-2).all()


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 150), share=st.floats(0, 1), segment=st.integers(4, 40), seed=st.integers(0, 5))
def test_adaptive_spends_exactly_the_budget(n, share, segment, seed):
    k = 1 + int(share * (n - 2))
    out = AdaptiveSpectralPool(keep=k, segment=segment)(recording(drifting(2, n, seed=seed)))
    assert out.tokens.shape == (2, k, 8) and torch.isfinite(out.tokens).all()
    assert (out.index.diff(dim=1) > 0).all() and out.index.min() >= 0 and out.index.max() < n
    assert (out.source.diff(dim=1) >= 0).all() and (out.source[:, 0] == 0).all() and (out.source[:, -1] == k - 1).all()
    assert all(len(set(row)) == k for row in out.source.tolist())
    torch.testing.assert_close(out.mass.sum(1), torch.full((2,), float(n)))


@pytest.mark.parametrize("n, k", [(203, 150), (203, 90), (203, 26), (203, 9), (203, 1), (96, 48)])
def test_adaptive_against_a_loop(n, k):
    """Segment by segment with scipy, in float64; the budget dealt coefficient by coefficient."""
    x = drifting(1, n).double()
    out = AdaptiveSpectralPool(keep=k, restore=False)(recording(x))
    parts = segments_for(n, k, 16)
    edges = [n * i // parts for i in range(parts + 1)]
    waves = [fft.dct(x[0, a:b].numpy(), axis=0, norm="ortho") for a, b in itertools.pairwise(edges)]
    most = min(-(-n // parts), k - parts + 1, 16)
    left = [[(w[c:min(most, len(w))] ** 2).sum() / math.sqrt(c + 0.5) for c in range(min(most, len(w)))] for w in waves]
    counts = [1] * parts
    for _ in range(k - parts):
        counts[max((i for i in range(parts) if counts[i] < len(left[i])), key=lambda i: left[i][counts[i]])] += 1
    tokens = [fft.idct(w[:c], axis=0, norm="ortho") * math.sqrt(c / len(w)) for w, c in zip(waves, counts)]
    torch.testing.assert_close(out.tokens[0], torch.cat([torch.from_numpy(t) for t in tokens]), atol=1e-8, rtol=0)
    mass = [len(w) / c for w, c in zip(waves, counts) for _ in range(c)]
    torch.testing.assert_close(out.mass[0], torch.tensor(mass))
    source, before = [], 0
    for w, c in zip(waves, counts):
        source += [before + t * c // len(w) for t in range(len(w))]
        before += c
    assert out.source[0].tolist() == source


def test_what_is_static_gives_its_budget_to_what_is_not():
    x = noise(2, 320, 8).float() + 2
    x[:, :160] = x[:, :1]
    out = AdaptiveSpectralPool(keep=0.5)(recording(x))
    assert ((out.index < 160).sum(1) == 10).all()                       # one a segment
    assert (out.mass[out.index < 160] == 16).all()
    still = AdaptiveSpectralPool(keep=0.5, restore=False)(recording(x))
    torch.testing.assert_close(still.tokens[:, :10], x[:, :1].expand(-1, 10, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [1, 7, 50, 99])
@pytest.mark.parametrize("method", METHODS)
def test_a_constant_stays_itself(method, k):
    x = (1e3 * noise(2, 1, 6)).float().expand(2, 100, 6)
    out = method(keep=k)(recording(x))
    torch.testing.assert_close(out.tokens, x[:, :k])
    if k == 50 and method is AdaptiveSpectralPool:                      # dealt evenly, where there is nothing to tell apart
        assert out.mass.max() <= 2.5 and out.mass.min() >= 1.6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.5, 0.11])
def test_rows_are_alone(method, keep):
    x = drifting(3, 210)
    out = method(keep=keep)(recording(x))
    turned = method(keep=keep)(recording(x[[2, 0, 1]]))
    for b in range(3):
        alone = method(keep=keep)(recording(x[b:b + 1]))
        for name in ("index", "source", "mass"):
            assert torch.equal(getattr(alone, name)[0], getattr(out, name)[b])
            assert torch.equal(getattr(turned, name)[(b + 1) % 3], getattr(out, name)[b])
        torch.testing.assert_close(alone.tokens[0], out.tokens[b], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(turned.tokens[(b + 1) % 3], out.tokens[b], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_loudness_scales_the_tokens_and_nothing_else(method):
    x = drifting(2, 200)
    soft, loud = (method(keep=0.3)(recording(s * x)) for s in (2.0 ** -10, 2.0 ** 12))
    assert torch.equal(soft.index, loud.index) and torch.equal(soft.source, loud.source)
    assert torch.equal(soft.tokens * 2 ** 22, loud.tokens)


@pytest.mark.parametrize("method", METHODS)
def test_dtypes_and_gradients(method):
    x = drifting(2, 120)
    half = method(keep=0.4)(recording(x.bfloat16()))
    same = method(keep=0.4)(recording(x.bfloat16().float()))
    assert half.tokens.dtype == torch.bfloat16 and torch.equal(half.tokens, same.tokens.bfloat16())
    assert torch.equal(half.index, same.index) and half.mass.dtype == torch.float32
    features = x.double().requires_grad_()
    weight = noise(2, 48, 8, seed=4)
    out = method(keep=0.4)(recording(features))
    assert out.tokens.dtype == torch.float64
    (out.tokens * weight).sum().backward()
    plain = SpectralPool(0.4) if method is SpectralPool else method(keep=0.4)
    step = noise(2, 120, 8, seed=5)
    linear = type(plain)(**{**plain.__dict__, "restore": False})                # the gain carries no gradient
    a, b = (linear(recording(features.detach() + s * step)).tokens for s in (0, 1e-4))
    mean = features.detach().mean(1, keepdim=True)
    gain = ((out.tokens.detach() - mean) / (a - mean)).flatten(1).median(1).values[:, None, None]
    moved = step.mean(1, keepdim=True) + gain * ((b - a) / 1e-4 - step.mean(1, keepdim=True))
    torch.testing.assert_close((features.grad * step).sum(), (moved * weight).sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n, keep", [(100, 0.4), (97, 5), (1100, 0.5)])
def test_compiles_as_one_graph(method, n, keep):
    reducer = method(keep=keep)

    def run(features):
        out = reducer(recording(features))
        return out.tokens, out.index, out.source, out.mass

    torch._dynamo.reset()
    x = drifting(2, n)
    eager, compiled = run(x), torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled[0], eager[0], atol=1e-3, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(eager[1:], compiled[1:]))


def test_silence_behind_the_recording_does_not_ring_into_it():
    x = drifting(1, 300)
    padded = Tokens(torch.cat([x, torch.full((1, 100, 8), 50.0)], 1), AudioLayout(400, 50.0, sound=300))
    for method in METHODS:
        out = method(keep=200)(padded)
        torch.testing.assert_close(out.tokens[:, :150], method(keep=150)(recording(x)).tokens)
        assert (out.tokens[:, 150:] == 50).all()


def test_deal():
    """Two segments of 4 and 3 tokens: the first has energy, the second has not."""
    energy = torch.tensor([[[9.0, 5, 5, 5], [9, 0, 0, 0]]])
    length, scale = torch.tensor([4, 3]), torch.tensor([20.0])
    got = [deal(energy, length, k, scale)[0].tolist() for k in range(2, 8)]
    assert got == [[1, 1], [2, 1], [3, 1], [4, 1], [4, 2], [4, 3]]
    assert deal(torch.zeros(1, 2, 4), length, 4, torch.zeros(1)).tolist() == [[2, 2]]


@pytest.mark.parametrize("reducer", [SpectralPool(0.3, basis="dft", restore=False), AdaptiveSpectralPool(0.3, segment=8)])
def test_saved_and_built_again(reducer):
    assert registry.build("audio", registry.describe("audio", reducer)) == reducer
