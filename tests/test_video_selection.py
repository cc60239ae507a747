"""EVS, VidCom2 and DyCoke against loops that follow their formulas, cell by cell, in numpy."""

import csv
import importlib
import math
import sys
from fractions import Fraction
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings

from mmcompress.tokens import Tokens, VideoLayout
from mmcompress.video.dycoke import DyCoke
from mmcompress.video.evs import EVS, novelty, retained_tokens
from mmcompress.video.vidcom2 import VidCom2, frame_weights, likeness

ALL = [EVS, VidCom2, DyCoke]
layouts = st.builds(VideoLayout, st.integers(1, 20), st.tuples(st.integers(1, 5), st.integers(1, 5)), st.integers(0, 1),
                    st.integers(0, 1))
keeps = st.one_of(st.floats(0.01, 1.0), st.integers(1, 520))


def clip_of(layout, batch=2, dim=16, seed=0, dtype=torch.float32):
    """Frames that resemble each other: some places move, all flicker a little, a cut every seven frames."""
    g = torch.Generator().manual_seed(seed)
    noise = lambda *shape: torch.randn(batch, *shape, generator=g)  # noqa: E731
    t, p = layout.frames, layout.cells
    frames, now = [], noise(p, dim)
    for i in range(t):
        if i % 7 == 6:
            now = 0.5 * noise(p, dim) + noise(1, dim)
        moves = torch.rand(batch, p, 1, generator=g) < torch.linspace(0, 0.6, p)[:, None]
        now = now + moves * noise(p, dim) + 0.1 * noise(p, dim)
        frames.append(now)
    features = torch.cat([torch.stack(frames, 1).flatten(1, 2), noise(layout.tail, dim)], 1)
    return Tokens(features.to(dtype), layout)


def numbers(x, b):
    return x.frames[b].double().numpy()                                                             # (T, P, D)


def apart(a, b):
    return 1 - float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def best(scores, k):
    """The k largest, ascending; of equals the earlier."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def evs_by_loops(x, b, k):
    frames = numbers(x, b)
    t, p, _ = frames.shape
    return best([255.0 if i == 0 else apart(frames[i, j], frames[i - 1, j]) for i in range(t) for j in range(p)], k)


def vidcom2_scores_by_loops(x, b):
    """-> v (T, P), f (T, P), weights (T,)"""
    frames = numbers(x, b)
    t, p, d = frames.shape
    variance = [np.mean((frames[:, :, c] - frames[:, :, c].mean()) ** 2) for c in range(d)]
    channels = sorted(range(d), key=lambda c: variance[c])[:max(1, d // 2)]
    y = frames[:, :, channels]
    y = y / np.sqrt((y ** 2).sum(2, keepdims=True))
    v, f = np.zeros((t, p)), np.zeros((t, p))
    for i in range(t):
        for j in range(p):
            for scores, centre in ((v, y.reshape(t * p, -1).mean(0)), (f, y[i].mean(0))):
                distance = ((y[i, j] - centre) ** 2).sum()
                scores[i, j] = sum(math.exp(-distance / (2 * 2.0 ** e)) for e in range(-3, 2))
    s = -v.mean(1)
    heat = np.exp((s - s.max()) / 0.01)
    prob = heat / heat.sum()
    return v, f, 1 + prob - prob.mean()


def webster(weights, capacity, seats):
    """Seats one after the other to the largest quotient, ties to the earlier party (weights as float32 has them)."""
    weights = [Fraction(float(w)) for w in weights]
    won = [0] * len(weights)
    for _ in range(seats):
        open_ = [i for i in range(len(won)) if won[i] < capacity]
        won[max(open_, key=lambda i: (float(np.float32(weights[i] / (2 * won[i] + 1))), -i))] += 1
    return won


def dycoke_by_loops(x, b, k, window=4):
    frames = numbers(x, b)
    t, p, _ = frames.shape
    if k < p:
        return [((2 * i + 1) * p) // (2 * k) for i in range(k)]
    while math.ceil(t / window) * p > k:
        window *= 2
    pruned = [i for i in range(t) if i % window]
    rest = k - (t - len(pruned)) * p
    kept = [i * p + j for i in range(0, t, window) for j in range(p)]
    for number, i in enumerate(pruned):
        share = rest // len(pruned) + (number < rest % len(pruned))
        inside, refers_to = i % window, i
        for bit in (1, 2, 4, 8, 16):                    # the window halves until the frame stands second in a part of it
            if inside % (2 * bit):
                refers_to = i - bit
                break
        kept += [i * p + j for j in best([apart(frames[i, j], frames[refers_to, j]) for j in range(p)], share)]
    return sorted(kept)


def dycoke_code_by_loops(x, b, rate):
    """The authors' two loops (llava_arch.py), with lists of cells in place of features."""
    frames = numbers(x, b)
    t, p, _ = frames.shape
    m = int((1 - rate) * p)
    of = {}
    for i in range(0, t - 1, 2):
        of[i] = list(range(p))
        of[i + 1] = best([apart(frames[i, j], frames[i + 1, j]) for j in range(p)], m)
    for i in range(0, t - 4, 4):
        of[i + 2] = best([apart(frames[i, j], frames[i + 2, j]) for j in range(p)], m)
    return [i * p + j for i in sorted(of) for j in of[i]]


LAYOUTS = [VideoLayout(9, (3, 4)), VideoLayout(16, (2, 3), lead=1), VideoLayout(6, (4, 4), tail=1), VideoLayout(1, (5, 5)),
           VideoLayout(2, (3, 3), lead=1, tail=1)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("share", [0.12, 0.25, 0.5, 0.9])
def test_evs(layout, share):
    x = clip_of(layout, seed=1)
    k = max(layout.cells + layout.tail, int(share * layout.tokens + 1e-9))
    out = EVS(keep=share)(x)
    tail = [layout.tokens - 1] * layout.tail
    for b in range(2):
        assert out.index[b].tolist() == evs_by_loops(x, b, k - layout.tail) + tail


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("share", [0.12, 0.25, 0.5, 0.9])
def test_vidcom2(layout, share):
    x = clip_of(layout, seed=2)
    out = VidCom2(keep=share)(x)
    k, p = max(1, int(share * layout.tokens + 1e-9)), layout.cells
    tail = min(layout.tail, k - 1)
    clip, frame = likeness(x.frames)
    for b in range(2):
        v, f, weights = vidcom2_scores_by_loops(x, b)
        np.testing.assert_allclose(clip[b], v, rtol=2e-5)
        np.testing.assert_allclose(frame[b], f, rtol=2e-5)
        ours = frame_weights(clip)[b]
        np.testing.assert_allclose(ours, weights, atol=2e-4)
        assert float(ours.mean()) == pytest.approx(1)
        kept = [i * p + j for i, n in enumerate(webster(ours, p, k - tail)) for j in best(-(v + f)[i], n)]
        assert out.index[b].tolist() == kept + list(range(layout.tokens - tail, layout.tokens))[:tail]


@given(st.integers(2, 20), st.tuples(st.integers(4, 6), st.integers(4, 6)), st.floats(0.15, 0.95), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_vidcom2_at_the_codes_total_is_the_codes_rounding(frames, grid, rate, seed):
    """Webster's method with as many seats as round(P s_t) sum up to gives every frame round(P s_t)."""
    layout = VideoLayout(frames, grid)
    x = clip_of(layout, batch=1, seed=seed)
    p = layout.cells
    clip, frame = likeness(x.frames)
    weights = frame_weights(clip)[0].double()
    shares = [min(1.0, rate * float(w)) * p for w in weights]
    if any(abs(s % 1 - 0.5) < 1e-4 or s < 0.5 for s in shares):
        return                                          # halves round to even there; and there a frame has one cell at least
    counts = [round(s) for s in shares]
    if sum(counts) == layout.tokens:
        return
    out = VidCom2(keep=sum(counts))(x)
    scores = -(clip + frame)[0]
    assert out.index[0].tolist() == [i * p + j for i, n in enumerate(counts) for j in best(scores[i].tolist(), n)]


@pytest.mark.parametrize("layout", [*LAYOUTS, VideoLayout(20, (3, 3)), VideoLayout(13, (2, 2))], ids=str)
@pytest.mark.parametrize("share", [0.02, 0.08, 0.12, 0.15, 0.25, 0.3, 0.5, 0.9])
def test_dycoke(layout, share):
    x = clip_of(layout, seed=3)
    out = DyCoke(keep=share)(x)
    k = max(1, int(share * layout.tokens + 1e-9))
    tail = min(layout.tail, k - 1)
    for b in range(2):
        assert out.index[b].tolist() == dycoke_by_loops(x, b, k - tail) + [layout.tokens - 1] * tail


@pytest.mark.parametrize("frames", range(1, 21))
@pytest.mark.parametrize("cells, rate, tail", [(10, 0.7, 0), (9, 0.5, 1), (11, 0.9, 0), (3, 0.7, 1), (5, 0.0, 0), (5, 1.0, 1)])
@pytest.mark.parametrize("paper_code", [False, True])
def test_dycoke_at_its_rate(frames, cells, rate, tail, paper_code):
    layout = VideoLayout(frames, (1, cells), tail=tail)
    x = clip_of(layout, seed=frames)
    reducer = DyCoke(rate=rate, paper_code=paper_code)
    m, whole = int((1 - rate) * cells), math.ceil(frames / 4)
    if paper_code:
        if frames < 5:
            with pytest.raises(ValueError, match=rf"{frames} frames: the authors' code needs 5"):
                reducer(x)
            return
        expected = [dycoke_code_by_loops(x, b, rate) for b in range(2)]
    else:
        expected = [dycoke_by_loops(x, b, whole * cells + (frames - whole) * m) for b in range(2)]
    last = [layout.tokens - 1] * tail
    out = reducer(x)
    assert reducer.count(layout) == len(expected[0]) + tail
    assert out.index.tolist() == [kept + last for kept in expected]
    if frames % 4 == 2 and not paper_code and frames > 5:           # then the code is what the paper says
        assert torch.equal(out.index, DyCoke(rate=rate, paper_code=True)(x).index)


@given(layouts, keeps, st.sampled_from(ALL), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_every_budget_is_exact(layout, keep, method, dtype, seed):
    assume(layout.frames * layout.cells != 2)               # two cells lie equally far from their mean: a tie to rounding
    x = clip_of(layout, seed=seed, dtype=dtype)
    reducer = method(keep=keep)
    n = layout.tokens
    k = min(n, keep) if isinstance(keep, int) else max(1, int(n * keep + 1e-9))
    if method is EVS:
        k = max(k, layout.cells + layout.tail)
    out = reducer(x)
    assert reducer.count(layout) == k and out.index.shape == (2, k) and out.mass is None and out.valid is None
    assert (out.index.diff(dim=1) > 0).all() and out.index.min() >= 0 and out.index.max() < n      # ascending, no repeats
    assert torch.equal(out.source.gather(1, out.index), torch.arange(k).expand(2, k))
    assert int((out.source >= 0).sum()) == 2 * k
    assert out.tokens.dtype == dtype
    assert torch.equal(out.tokens, x.features.gather(1, out.index[..., None].expand(-1, -1, 16)))
    assert layout.tail == 0 or k == 1 or bool((out.index[:, -1] == n - 1).all())                    # the newline stays
    for b in range(2):
        alone = reducer(Tokens(x.features[b:b + 1], layout))
        assert torch.equal(alone.index[0], out.index[b]) and torch.equal(alone.tokens[0], out.tokens[b])


@pytest.mark.parametrize("reducer", [EVS(keep=45), VidCom2(keep=45), DyCoke(keep=45)], ids=str)
def test_selection_reads_bf16_as_float32(reducer):
    x = clip_of(VideoLayout(12, (3, 3)), seed=5, dtype=torch.bfloat16)
    assert torch.equal(reducer(x).index, reducer(Tokens(x.features.float(), x.layout)).index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_still_clip_is_settled_by_position(dtype):
    layout = VideoLayout(8, (5, 7))
    p = layout.cells
    frame = torch.randn(2, 1, p, 64, generator=torch.Generator().manual_seed(0))
    x = Tokens(frame.expand(-1, 8, -1, -1).flatten(1, 2).to(dtype), layout)
    first = torch.arange(p).expand(2, p)
    assert torch.equal(EVS(keep=p)(x).index, first)                         # n equal frames: frame 0 and nothing else
    assert torch.equal(EVS(keep=p + 10)(x).index, torch.arange(p + 10).expand(2, -1))
    assert (novelty(x.frames)[:, 1:] == 0).all()
    assert torch.equal(DyCoke(keep=p)(x).index, first)
    shares = [35, 4, 3, 3, 35, 3, 3, 3]                                     # each from its frame's first cell on
    expected = [t * p + j for t, n in enumerate(shares) for j in range(n)]
    assert DyCoke(keep=sum(shares))(x).index.tolist() == [expected] * 2
    index = VidCom2(keep=80)(x).index                                       # equal frames: ten cells each, the same ones
    assert torch.equal(index.view(2, 8, 10) - p * torch.arange(8)[:, None], index[:, None, :10].expand(-1, 8, -1))


@pytest.mark.parametrize("method", ALL)
def test_constant_features_keep_the_earliest(method):
    """Nothing differs from anything: no NaN, and ties go to the earlier cell."""
    layout = VideoLayout(3, (2, 4))
    for value in (0.0, 1.0):
        out = method(keep=14)(Tokens(torch.full((1, 24, 6), value), layout)).index[0].tolist()
        per_frame = {EVS: (8, 6, 0), VidCom2: (5, 5, 4), DyCoke: (8, 3, 3)}[method]
        assert out == [8 * t + j for t, n in enumerate(per_frame) for j in range(n)]


@pytest.mark.parametrize("cells, frames, rate, expected", [
    (1, 100, 0.9, 9), (1, 100, 0.75, 25), (36, 16, 0.75, 144), (196, 32, 0.5, 3136), (196, 1, 0.9, 196), (196, 4, 0.9, 196),
    (10, 3, 0.0, 30), (7, 10, 0.3, 49), (1, 10, 0.8, 1)])
def test_evs_counts_as_engines_do(cells, frames, rate, expected):
    """100 tokens at 0.9 leave 9, and 10 at 0.8 one: 1 - 0.9 is 0.09999999999999998 in floating point."""
    assert retained_tokens(cells, frames, rate) == expected
    assert EVS(keep=expected).count(VideoLayout(frames, (1, cells))) == expected


def test_novelty_is_the_same_frame_by_frame():
    frames = clip_of(VideoLayout(9, (4, 4)), seed=7).frames
    whole = novelty(frames)
    assert whole.dtype == torch.float32 and torch.isinf(whole[:, 0]).all() and torch.isfinite(whole[:, 1:]).all()
    assert whole[:, 1:].min() >= 0 and whole[:, 1:].max() <= 2
    for start, end in ((1, 2), (1, 9), (4, 7), (8, 9)):
        assert torch.equal(novelty(frames[:, start:end], frames[:, start - 1]), whole[:, start:end])
    worth, parent = EVS().causal(frames[:, 3:5], VideoLayout(2, (4, 4)), frames[:, 2], start=48)
    assert torch.equal(worth, whole[:, 3:5]) and parent is None


@pytest.mark.parametrize("reducer", [EVS(keep=40), VidCom2(keep=40), DyCoke(keep=40), DyCoke(paper_code=True)], ids=str)
def test_gradients_reach_what_is_kept(reducer):
    x = clip_of(VideoLayout(8, (3, 4), tail=1), seed=8)
    features = x.features.clone().requires_grad_()
    out = reducer(Tokens(features, x.layout))
    out.tokens.sum().backward()
    expected = torch.zeros(2, x.layout.tokens).scatter(1, out.index, 1.0)
    assert torch.equal(features.grad, expected[..., None].expand_as(features))


@pytest.mark.parametrize("reducer", [EVS(keep=40), VidCom2(keep=40), DyCoke(keep=40), DyCoke(keep=7), DyCoke(),
                                     DyCoke(paper_code=True)], ids=str)
def test_compiles_whole(reducer):
    x = clip_of(VideoLayout(11, (3, 3), lead=1, tail=1), seed=9)

    def reduce(features):
        out = reducer(Tokens(features, x.layout))
        return out.tokens, out.index, out.source

    for got, expected in zip(torch.compile(reduce, fullgraph=True, backend="aot_eager")(x.features), reduce(x.features)):
        assert torch.equal(got, expected)


def test_vidcom2_fills_no_frame_beyond_its_cells():
    """One frame unlike all others takes twice the share; where it is full the rest goes to the others."""
    layout = VideoLayout(8, (4, 4))
    g = torch.Generator().manual_seed(0)
    features = torch.randn(1, 1, 1, 32, generator=g) + 0.1 * torch.randn(1, 8, 16, 32, generator=g)
    features[:, 5] = torch.randn(1, 16, 32, generator=g)
    x = Tokens(features.flatten(1, 2), layout)
    for keep, lively in ((0.25, 8), (0.5, 15), (0.75, 16)):
        counts = torch.bincount(VidCom2(keep=keep)(x).index[0] // 16, minlength=8).tolist()
        assert sum(counts) == 128 * keep and abs(counts[5] - lively) <= 1
        assert max(counts[:5] + counts[6:]) - min(counts[:5] + counts[6:]) <= 1
    smooth = torch.bincount(VidCom2(keep=0.5, temperature=1e6)(x).index[0] // 16, minlength=8).tolist()
    assert smooth == [8] * 8
    assert not torch.equal(VidCom2(keep=0.5, channels=1.0)(x).index, VidCom2(keep=0.5)(x).index)


@pytest.mark.parametrize("make, message", [
    (lambda: EVS(keep=1.5), r"keep=1.5: a ratio"), (lambda: DyCoke(keep=0), r"keep=0: a token count"),
    (lambda: VidCom2(temperature=0), r"temperature=0: must be positive"),
    (lambda: VidCom2(channels=0.0), r"channels=0.0: a share"), (lambda: DyCoke(rate=1.2), r"rate=1.2: the share"),
    (lambda: DyCoke(keep=0.5, rate=0.5), r"keep=0.5 and rate=0.5: pass one"),
    (lambda: DyCoke(keep=0.5, paper_code=True), r"keep=0.5: paper_code=True prunes at a fixed rate.*pass rate"),
    (lambda: retained_tokens(4, 4, 1.0), r"rate=1.0: the share that is pruned, in \[0, 1\)")])
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# benchmarks/video_parity.py: a naive rewrite of the authors' rule under the name that it looks for
STAND_IN = """
import an_old_transformers


def dycole_ttm(image_feature, num_tokens_per_frame=196, merging_ratio=0.7):
    frames = image_feature.view(-1, num_tokens_per_frame, image_feature.shape[1])
    count, left, out = len(frames), int((1 - merging_ratio) * num_tokens_per_frame), []
    for t in range(count - count % 2):
        whole = t % 4 == 0 or (t % 4 == 2 and t > count - 3)
        back = 2 if t % 4 == 2 else 1
        alike = torch.cosine_similarity(frames[t], frames[t - back], dim=1)
        out.append(frames[t] if whole else frames[t][alike.argsort()[:left]])
    return torch.cat(out)
"""


@pytest.fixture
def parity(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    small = importlib.import_module("parity.video_dycoke")
    monkeypatch.setattr(small, "FRAMES", (5, 6, 8))
    monkeypatch.setattr(small, "GRIDS", ((3, 4),))
    yield importlib.import_module("video_parity")
    for name in [n for n in sys.modules if n.partition(".")[0] in ("common", "parity", "video_parity")]:
        del sys.modules[name]


@pytest.mark.parametrize("damage", [None, ("t % 4 == 2 else 1", "t % 4 >= 2 else 1"),
                                    ("alike.argsort()", "(-alike).argsort()")])
def test_parity_sees_every_difference(parity, tmp_path, capsys, damage):
    folder = tmp_path / "DyCoke/llava/model"
    folder.mkdir(parents=True)
    (folder / "llava_arch.py").write_text(STAND_IN.replace(*damage) if damage else STAND_IN)
    out, every = tmp_path / "out.csv", tmp_path / "all.csv"
    arguments = ["--authors", str(tmp_path), "--seeds", "2", "--out", str(out), "--cases", str(every)]
    assert parity.main(arguments) == (damage is not None)
    lines, cases = (list(csv.DictReader(path.read_text().splitlines())) for path in (out, every))
    assert [line["method"] for line in lines] == ["DyCoke(paper_code=True)", "DyCoke(), T = 4 n + 2"]
    assert [line["cases"] for line in lines] == ["18", "6"]
    assert len(cases) == 24 and all(line["device"] and line["torch"] for line in lines)
    if damage is None:
        assert all(line["identical"] == line["cases"] and line["difference"] == "0" for line in lines)
    else:
        assert all(int(line["another"]) > 0 for line in lines) and "another: method=DyCoke" in capsys.readouterr().out


def test_parity_wants_the_authors_functions(parity, tmp_path):
    with pytest.raises(SystemExit):
        parity.main(["--authors", str(tmp_path)])
    (tmp_path / "DyCoke/llava/model").mkdir(parents=True)
    (tmp_path / "DyCoke/llava/model/llava_arch.py").write_text("x = 1")
    with pytest.raises(ValueError, match=r"no dycole_ttm; pass a checkout of github\.com/KD-TAO/DyCoke"):
        parity.main(["--authors", str(tmp_path)])


def test_parity_calls_equal_scores_and_halves_ties(parity):
    verdict = importlib.import_module("parity.video_case").verdict
    scores = torch.tensor([1.0, 0.5, 0.5 + 1e-8, 0.2, 1.0, 0.3, 0.1, 0.1], dtype=torch.float64)         # two frames of four
    same = lambda ours, theirs, **more: tuple(verdict(ours, theirs, scores, 4, **more)[k] for k in ("identical", "tied"))  # noqa: E731
    assert same([0, 1], [1, 0]) == (True, False) and same([0, 1], [0, 2]) == (False, True)
    assert same([0, 1], [0, 3]) == (False, False) and same([0, 1, 4], [0, 4, 6]) == (False, False)
    assert same([0, 1, 4], [0, 4, 6], halves=[0, 1]) == (False, True) and same([0, 1], [0, 4], halves=[0]) == (False, False)
