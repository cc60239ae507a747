"""FastVID and HoliTom against loops written from their formulas, cell by cell, in float64; and what both promise."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from mmcompress.errors import SignalError
from mmcompress.ops.density import density_peaks, distances
from mmcompress.ops.segments import Segments, best_windows, cell_scores, cut_least_alike, divide, saved_by_windows
from mmcompress.tokens import LayerState, Reduction, Tokens, VideoLayout
from mmcompress.video.fastvid import FastVID, next_salient
from mmcompress.video.holitom import HoliTom

METHODS = [FastVID, HoliTom]
layouts = st.builds(VideoLayout, st.integers(1, 20), st.tuples(st.integers(1, 5), st.integers(1, 6)), st.integers(0, 1),
                    st.integers(0, 2))
keeps = st.one_of(st.floats(0.01, 1.0), st.integers(1, 640))


def clip(layout, batch=2, dim=16, seed=0, dtype=torch.float32, scale=1.0, cls=False):
    """Frames that drift, cut every few frames, the later cells moving more; and the attention that their tokens receive."""
    g = torch.Generator().manual_seed(seed)
    noise = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    t, p = layout.frames, layout.cells
    rows, frame = [], noise(batch, p, dim)
    for at in range(t):
        if at % 5 == 4:
            frame = 0.5 * noise(batch, p, dim) + noise(batch, 1, dim)
        moves = (torch.rand(batch, p, 1, generator=g) < torch.linspace(0, 0.7, p)[:, None]).float()
        frame = frame + moves * noise(batch, p, dim) + 0.05 * noise(batch, p, dim)
        rows.append(frame)
    features = torch.cat([torch.stack(rows, 1).flatten(1, 2), noise(batch, layout.tail, dim)], 1)
    patches = layout.grid[0] * layout.grid[1]
    state = LayerState(noise(batch, t, 2, 4), noise(batch, t, patches + cls, 2, 4),
                       received=None if cls else noise(batch, t, patches).softmax(-1))
    return Tokens((scale * features).to(dtype), layout, {-1: state})


def alone(x, b):
    state = x.vision[-1]
    one = lambda v: None if v is None else v[b:b + 1]  # noqa: E731
    state = LayerState(one(state.query), one(state.keys), received=one(state.received))
    return Tokens(one(x.features), x.layout, {-1: state})


def numbers(x, b):
    """A row's frames (T, P, D) and attention (T, P) as they are defined, in float64."""
    layout, state = x.layout, x.vision[-1]
    if state.received is not None:
        attention = state.received[b].double()
    else:
        attention = torch.stack([sum((state.keys[b, t, :, h].double() @ state.query[b, t, h].double() / 2).softmax(0)
                                     for h in range(2))[1:] / 2 for t in range(layout.frames)])
    return x.frames[b].double(), F.pad(attention, (layout.lead, 0))


def best(scores, k):
    """Places of the k largest; of equals the earlier."""
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:k]


def webster(weight, capacity, total):
    won = [0] * len(weight)
    for _ in range(min(total, sum(capacity))):
        i = max((i for i in range(len(won)) if won[i] < capacity[i]), key=lambda i: (round(weight[i] / (won[i] + 0.5), 5), -i))
        won[i] += 1
    return won


def peaks(tokens, neighbours):
    """rho x delta of each token, in logarithms so that they can be told apart."""
    n, d = len(tokens), tokens[0].numel()
    apart = [[float((a - b).norm()) / d ** 0.5 for b in tokens] for a in tokens]
    rho = [-sum(v * v for v in sorted(row)[:neighbours]) / min(neighbours, n) for row in apart]
    most = max(map(max, apart))
    delta = [min([most] + [apart[i][j] for j in range(n) if (-rho[j], j) < (-rho[i], i)]) for i in range(n)]
    return [torch.tensor(delta[i]).log().item() + rho[i] for i in range(n)], apart


def fastvid_by_loops(x, b, k, segments=8, threshold=0.9, context=0.4, every=4, beta=0.6):
    """-> {cell: token}, {cell: the cell it went to}"""
    frames, attention = numbers(x, b)
    t, p, _ = frames.shape
    means = [f.mean(0) for f in frames]
    alike = [float(F.cosine_similarity(means[i], means[i + 1], dim=0)) for i in range(t - 1)]
    cuts = {i for i in range(t - 1) if alike[i] < threshold} | set(best([-a for a in alike], segments - 1))
    bounds = [0] + sorted(i + 1 for i in cuts) + [t]
    parts = list(itertools.pairwise(bounds))
    merged = int(k * context)
    own = [(k - merged) // t + (i < (k - merged) % t) for i in range(t)]
    salient = {(i, c) for i in range(t) for c in best(attention[i], own[i])}
    share = {i: (end - start) / -(-(end - start) // every) for start, end in parts for i in range(end - 1, start - 1, -every)}
    counts = webster([share.get(i, 0) for i in range(t)], [(p - own[i]) * (i in share) for i in range(t)], merged)
    anchors = []
    for i in range(t):
        rest = [c for c in range(p) if (i, c) not in salient]
        if counts[i]:
            score, _ = peaks([frames[i, c] for c in rest], 4)
            anchors += [(i, rest[j]) for j in best(score, counts[i])]
    left = merged - len(anchors)
    order = {i: [c for c in best(attention[i], p) if (i, c) not in salient and (i, c) not in anchors] for i in range(t)}
    turns = sorted((n, i, c) for i in order for n, c in enumerate(order[i]))
    salient |= {(i, c) for _, i, c in turns[:left]}
    out = {i * p + c: frames[i, c] for i, c in salient}
    went, liked = {cell: cell for cell in out}, {}
    for start, end in parts:
        for i in sorted({i for i, _ in anchors if start <= i < end}):
            mine = sorted(a for a in anchors if a[0] == i)
            groups = {a: [] for a in mine}
            for j, c in itertools.product(range(start, end), range(p)):
                if (j, c) not in salient and (j, c) not in mine:
                    like = [float(F.cosine_similarity(frames[j, c], frames[a], dim=0)) for a in mine]
                    a = mine[best(like, 1)[0]]
                    groups[a].append(frames[j, c])
                    if (j, c) not in anchors and max(like) > liked.get((j, c), -2):
                        liked[j, c], went[j * p + c] = max(like), i * p + a[1]
            for a, members in groups.items():
                w = max(1 / (len(members) + 1), beta)
                out[i * p + a[1]] = w * frames[a] + (1 - w) * torch.stack(members).mean(0) if members else frames[a]
                went[i * p + a[1]] = i * p + a[1]
    return out, went


def holitom_by_loops(x, b, k, threshold=0.8, beta=0.6, window=None, neighbours=7):
    frames, attention = numbers(x, b)
    t, p, _ = frames.shape
    alike = [[float(F.cosine_similarity(frames[i, c], frames[i + 1, c], dim=0)) for c in range(p)] for i in range(t - 1)]

    def static(start, end):                     # both are in the window
        return [c for c in range(p) if end > start and all(alike[i][c] > threshold for i in range(start, end))]

    saved = [0]                                 # of the frames before i
    begins = []
    for end in range(t):
        value, start = saved[end], end
        for length in range(2, min(end + 1, window or t) + 1):
            s = end + 1 - length
            if saved[s] + len(static(s, end)) * (length - 1) > value:
                value, start = saved[s] + len(static(s, end)) * (length - 1), s
        saved.append(value)
        begins.append(start)
    windows, end = [], t - 1
    while end >= 0:
        windows.insert(0, (begins[end], end))
        end = begins[end] - 1
    shown = t * p - saved[t]
    window_of = {i: w for w in windows for i in range(w[0], w[1] + 1)}
    fixed = {w: static(*w) for w in windows}
    sizes = [n for i in range(t) for n in (len(fixed[window_of[i]]) * (window_of[i][0] == i), p - len(fixed[window_of[i]]))]
    counts = webster(sizes, sizes, k)
    later = sorted((alike[i - 1][c], i, c) for w in windows for i in range(w[0] + 1, w[1] + 1) for c in fixed[w])
    cuts = {(i, c) for _, i, c in later[:max(0, k - shown)]}
    out, went = {}, {}
    for (s, e), cells in fixed.items():
        stretches, values = {}, {}              # (first frame, cell) -> frames
        for c in cells:
            at = s
            for i in range(s, e + 1):
                at = i if (i, c) in cuts else at
                stretches.setdefault((at, c), []).append(i)
            for at in {a for a, d in stretches if d == c}:
                values[at, c] = frames[stretches[at, c], c].mean(0)
                if at > s:
                    out[at * p + c] = values[at, c]
                    went |= {i * p + c: at * p + c for i in stretches[at, c]}
        n = counts[2 * s]
        if n:
            score, apart = peaks([values[s, c] for c in cells], min(neighbours, n))
            centres = sorted(best(score, n))
            groups = {j: [] for j in centres}
            for j, c in enumerate(cells):
                to = j if j in groups else centres[best([-apart[j][m] for m in centres], 1)[0]]
                if to != j:
                    groups[to].append(values[s, c])
                went |= {i * p + c: s * p + cells[to] for i in stretches[s, c]}
            for j, members in groups.items():
                mean = torch.stack(members).mean(0) if members else None
                centre = values[s, cells[j]]
                out[s * p + cells[j]] = centre if mean is None else beta * centre + (1 - beta) * mean
        others = [c for c in range(p) if c not in cells]
        for i in range(s, e + 1):
            for j in best(attention[i, others], counts[2 * i + 1]):
                out[i * p + others[j]] = frames[i, others[j]]
                went[i * p + others[j]] = i * p + others[j]
    return out, went


def check_against(loops, reducer, x, **options):
    out, layout = reducer(x), x.layout
    k = reducer.count(layout) - min(layout.tail, reducer.count(layout) - 1)
    cells = layout.frames * layout.cells
    for b in range(len(x.features)):
        expected, went = loops(x, b, k, **options)
        assert out.index[b, :k].tolist() == sorted(expected)
        torch.testing.assert_close(out.tokens[b, :k].double(), torch.stack([expected[i] for i in sorted(expected)]), atol=1e-5,
                                   rtol=1e-5)
        slot = {cell: n for n, cell in enumerate(sorted(expected))}
        assert out.source[b, :cells].tolist() == [slot.get(went.get(i), -1) for i in range(cells)]
        assert out.index[b, k:].tolist() == list(range(cells, cells + reducer.count(layout) - k))


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.25, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("layout", [VideoLayout(12, (3, 4)), VideoLayout(20, (2, 3), 1, 1), VideoLayout(5, (4, 4), 0, 1),
                                    VideoLayout(1, (4, 5))], ids=["12", "20 lead tail", "short", "one"])
def test_fastvid_is_its_formulas(layout, keep):
    x = clip(layout, seed=int(100 * keep))
    check_against(fastvid_by_loops, FastVID(keep=keep), x)
    check_against(fastvid_by_loops, FastVID(keep=keep, segments=2, threshold=-1, every=3, context=0.7, beta=0.3), x, segments=2,
                  threshold=-1, every=3, context=0.7, beta=0.3)


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.25, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("layout", [VideoLayout(12, (3, 4)), VideoLayout(20, (2, 3), 1, 1), VideoLayout(5, (4, 4), 0, 1),
                                    VideoLayout(1, (4, 5))], ids=["12", "20 lead tail", "short", "one"])
def test_holitom_is_its_formulas(layout, keep):
    x = clip(layout, seed=int(100 * keep))
    check_against(holitom_by_loops, HoliTom(keep=keep), x)
    check_against(holitom_by_loops, HoliTom(keep=keep, threshold=0.5, beta=0.2, window=3, neighbours=2), x, threshold=0.5,
                  beta=0.2, window=3, neighbours=2)


@pytest.mark.parametrize("loops, method", [(fastvid_by_loops, FastVID), (holitom_by_loops, HoliTom)])
def test_by_cls_attention_and_on_features_of_large_norm(loops, method):
    """30 times the norm: squared distances of thousands, where exp(-d^2) is 0 for every token, rank all the same."""
    x = clip(VideoLayout(10, (4, 5), 1, 1), cls=True, scale=30.0)
    assert float(distances(x.frames).square().median()) > 500
    out, layout = method(keep=0.3)(x), x.layout
    for b in range(2):
        expected, _ = loops(x, b, method(keep=0.3).count(layout) - 1)
        assert out.index[b, :-1].tolist() == sorted(expected)
        torch.testing.assert_close(out.tokens[b, :-1].double(), torch.stack([expected[i] for i in sorted(expected)]), rtol=1e-4,
                                   atol=1e-3)


@given(layouts, keeps, st.sampled_from(METHODS), st.integers(0, 1000), st.sampled_from(["auto", "distinct"]), st.booleans())
@settings(max_examples=250, deadline=None)
def test_every_budget_is_exact(layout, keep, method, seed, scores, static):
    x = clip(layout, seed=seed, dim=8)
    if static:
        still = x.frames[:, :1].expand_as(x.frames).flatten(1, 2)
        x = Tokens(torch.cat([still, x.features[:, still.shape[1]:]], 1), layout, x.vision)
    reducer = method(keep=keep, scores=scores)
    out = reducer(x)
    k, n = reducer.count(layout), layout.tokens
    assert k == (min(n, keep) if isinstance(keep, int) else max(1, int(n * keep + 1e-9)))
    assert out.tokens.shape == (2, k, 8) and out.index.shape == (2, k) and out.source.shape == (2, n)
    assert out.valid is None and torch.isfinite(out.tokens).all()
    assert (out.index.diff(dim=1) > 0).all() and out.index.min() >= 0 and out.index.max() < n
    assert torch.equal(out.source.gather(1, out.index), torch.arange(k).expand(2, k))
    assert out.source.min() >= -1 and out.source.max() < k
    if out.mass is not None:
        assert out.mass.dtype == torch.float32
        assert torch.equal(torch.zeros(2, k + 1).scatter_add(1, out.source + 1, torch.ones(2, n))[:, 1:], out.mass)
    if not static:                                                              # rounding decides among equals
        for b in range(2):
            single = reducer(alone(x, b))
            assert torch.equal(single.index[0], out.index[b]) and torch.equal(single.source[0], out.source[b])
            torch.testing.assert_close(single.tokens[0], out.tokens[b])


@given(st.integers(2, 7), st.integers(1, 5), st.integers(0, 10_000), st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_the_windows_save_most(t, p, seed, longest):
    """Against every segmentation of a short clip."""
    alike = torch.rand(3, t - 1, p, generator=torch.Generator().manual_seed(seed)) < 0.7
    segments, total = best_windows(saved_by_windows(alike), longest)
    for b in range(3):
        def saves(starts, b=b):
            ends = [s - 1 for s in starts[1:]] + [t - 1]
            return sum(int(alike[b, s:e].all(0).sum()) * (e - s) for s, e in zip(starts, ends)), ends

        every = []
        for cuts in itertools.product([False, True], repeat=t - 1):
            starts = [0] + [i + 1 for i, cut in enumerate(cuts) if cut]
            value, ends = saves(starts)
            if all(e - s < longest for s, e in zip(starts, ends)):
                every.append(value)
        starts = sorted(set(segments.first[b].tolist()))
        value, ends = saves(starts)
        assert int(total[b]) == value == max(every)
        assert all(e - s < longest for s, e in zip(starts, ends))
        for i in range(t):
            s = max(s for s in starts if s <= i)
            assert (int(segments.first[b, i]), int(segments.last[b, i])) == (s, ends[starts.index(s)])


def test_of_equal_windows_the_last_is_the_shortest():
    """Where nothing is saved every frame stands alone; one cell alike all along saves most in one window."""
    nothing, one = torch.zeros(1, 5, 3, dtype=torch.bool), torch.zeros(1, 5, 3, dtype=torch.bool)
    one[..., 1] = True
    assert best_windows(saved_by_windows(nothing))[0].first.tolist() == [[0, 1, 2, 3, 4, 5]]
    segments, total = best_windows(saved_by_windows(one))
    assert segments.first.tolist() == [[0] * 6] and total.tolist() == [5]
    segments, total = best_windows(saved_by_windows(one), longest=4)            # 4 + 2 or 3 + 3: both save 4
    assert segments.first.tolist() == [[0, 0, 0, 0, 4, 4]] and total.tolist() == [4]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), min_size=1, max_size=8), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_divide_is_websters_method(groups, total):
    weight, capacity = ([float(g[0]) for g in groups], [g[1] for g in groups])
    got = divide(torch.tensor([weight]), torch.tensor([capacity]), total, 6)[0].tolist()
    assert got == webster(weight, capacity, total)


def test_cuts():
    alike = torch.tensor([[0.95, 0.5, 0.93, 0.95, 0.92]])
    assert cut_least_alike(alike, 1, 0.9).first.tolist() == [[0, 0, 2, 2, 2, 2]]
    assert cut_least_alike(alike, 3, 0.9).first.tolist() == [[0, 0, 2, 2, 2, 5]]
    assert cut_least_alike(alike, 3, 0.9).last.tolist() == [[1, 1, 4, 4, 4, 5]]
    assert cut_least_alike(alike, 5, 0.9).first.tolist() == [[0, 1, 2, 3, 3, 5]]                    # of equals the earlier
    assert cut_least_alike(alike, 50, 0.9).first.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert cut_least_alike(torch.ones(1, 0), 8, 0.9).first.tolist() == [[0]]


def test_density_peaks_of_two_heaps():
    """Two heaps on a line: the middle of each comes first; equal tokens tie exactly, and come in order."""
    x = torch.tensor([0.0, 1, 2, 10, 11, 12, 500])[:, None]
    score = density_peaks(distances(x), torch.arange(7) < 6, 3, 3)
    assert set(score.argsort(descending=True)[:2].tolist()) == {1, 4} and score[6] == -torch.inf
    twice = density_peaks(distances(x.repeat(2, 1)), torch.arange(14) % 7 < 6, 6, 6)
    assert set(twice.argsort(descending=True)[:2].tolist()) == {1, 4} and (twice[[8, 11]] < twice[:6].min()).all()
    equal = density_peaks(distances(7e3 * torch.rand(40).expand(5, 40)), torch.arange(5) > 1, 4, 4)
    assert equal[2:].unique().numel() == 1 and torch.isfinite(equal[2:]).all() and (equal[:2] == -torch.inf).all()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    few = density_peaks(distances(x), torch.arange(6) < 3, 4, 4)                # fewer tokens than neighbours: all there are
    torch.testing.assert_close(few[:3].tolist(), peaks(list(x[:3].double()), 4)[0], atol=1e-5, rtol=1e-5)
    line = torch.tensor([0.0] * 7 + [1.8e19])
    huge = density_peaks((line - line[:, None]).abs(), torch.arange(8) > 0, 7, 7)
    assert (huge[1:] > -torch.inf).all() and huge[0] == -torch.inf              # squares overflow: still before the others


def test_a_window_without_centres_is_dropped():
    """One still cell of eight is too few for a centre at a small budget: its source is -1, not the window's first cell."""
    layout = VideoLayout(6, (2, 4))
    frames = torch.randn(1, 6, 8, 16, generator=torch.Generator().manual_seed(0))
    frames[:, :, 5] = frames[:, :1, 5]
    x = Tokens(frames.flatten(1, 2), layout, {-1: LayerState(torch.zeros(1, 6, 1, 1), torch.zeros(1, 6, 8, 1, 1), received=(
        torch.arange(8, 0, -1.0).expand(1, 6, 8) / 36))})
    out = HoliTom(keep=6)(x)
    assert out.index.tolist() == [[0, 8, 16, 24, 32, 40]] and (out.source.view(6, 8)[:, 1:] == -1).all()
    assert out.mass.tolist() == [[1.0] * 6]
    kept = HoliTom(keep=30)(x)
    assert kept.mass[0, kept.index[0] == 5].tolist() == [6.0]


def test_a_still_clip():
    """n equal frames at one frame's budget: HoliTom shows the frame; at more, some cells again. FastVID gathers all."""
    layout = VideoLayout(9, (4, 5))
    frame = torch.randn(2, 1, 20, 16, generator=torch.Generator().manual_seed(1))
    x = Tokens(frame.expand(2, 9, 20, 16).flatten(1, 2), layout, clip(layout).vision)
    out = HoliTom(keep=20)(x)
    assert out.index.tolist() == [list(range(20))] * 2 and out.mass.unique().tolist() == [9.0]
    torch.testing.assert_close(out.tokens, frame[:, 0])
    more = HoliTom(keep=70)(x)
    torch.testing.assert_close(more.tokens, x.features.gather(1, more.index[..., None].expand(-1, -1, 16)))
    assert (more.source >= 0).all() and more.mass.sum().item() == 360
    less = HoliTom(keep=7)(x)
    assert (less.mass % 9 == 0).all() and less.mass.sum().item() == 360
    least = FastVID(keep=0.2, segments=3)(x)
    assert (least.source >= 0).sum() > 340 and torch.equal(least.index[0].sort().values, least.index[0])


def test_where_anchor_frames_are_full_more_salient_tokens_stay():
    """One segment of 4 frames has one anchor frame: 20 cells cannot hold 0.4 of 72 tokens."""
    layout = VideoLayout(4, (4, 5))
    x = clip(layout)
    out = FastVID(keep=72, segments=1, threshold=-1)(x)
    merged = (out.tokens != x.features.gather(1, out.index[..., None].expand(-1, -1, 16))).any(2)
    assert ((out.index < 60) | merged | (out.mass == 1)).all() and (merged.sum(1) <= 20).all()
    assert ((out.index >= 60).sum(1) == 20).all()


def test_the_next_salient_take_turns():
    scores = torch.tensor([[[5.0, 4, 3], [9, 8, 7]]])
    taken = torch.tensor([[[True, False, False], [False, False, True]]])
    assert next_salient(scores, taken, torch.tensor([1]))[0].tolist() == [[False, True, False], [False, False, False]]
    assert next_salient(scores, taken, torch.tensor([3]))[0].tolist() == [[False, True, True], [True, False, False]]
    assert not next_salient(scores, taken, torch.tensor([0])).any()


@pytest.mark.parametrize("method", METHODS)
def test_dtypes_and_gradients(method):
    layout = VideoLayout(8, (3, 4), 0, 1)
    x = clip(layout)
    half = Tokens(x.features.bfloat16(), layout, x.vision)
    out, same = method(keep=0.4)(half), method(keep=0.4)(Tokens(half.features.float(), layout, x.vision))
    assert out.tokens.dtype == torch.bfloat16 and torch.equal(out.index, same.index) and torch.equal(out.source, same.source)
    assert torch.equal(out.tokens, same.tokens.bfloat16())                                          # computed in float32
    features = x.features.double().requires_grad_()
    out = method(keep=0.4)(Tokens(features, layout, x.vision))
    assert out.tokens.dtype == torch.float64
    weight = torch.randn(out.tokens.shape, generator=torch.Generator().manual_seed(2)).double()
    (out.tokens * weight).sum().backward()
    step = torch.randn(features.shape, generator=torch.Generator().manual_seed(3)).double()
    moved = method(keep=0.4)(Tokens(features.detach() + 1e-3 * step, layout, x.vision))
    assert torch.equal(moved.index, out.index) and torch.equal(moved.source, out.source)             # tokens are linear here
    slope = ((moved.tokens - out.tokens) * weight).sum() / 1e-3
    assert abs(float((slope - (features.grad * step).sum()).detach())) < 2e-2
    used = (features.grad != 0).any(2)
    assert (used | (out.source < 0)).all()                                                          # who is in `source` counts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout, keep", [(VideoLayout(6, (3, 4), 1, 1), 0.3), (VideoLayout(1, (3, 3)), 4)])
def test_compiles_as_one_graph(method, layout, keep):
    reducer = method(keep=keep)
    def run(features, received):
        out = reducer(Tokens(features, layout, {-1: LayerState(state.query, state.keys, received=received)}))
        return out.tokens, out.index, out.source, out.mass

    x = clip(layout)
    state = x.vision[-1]
    eager = run(x.features, state.received)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x.features, state.received)
    torch.testing.assert_close(compiled[0], eager[0])
    assert all(torch.equal(a, b) for a, b in zip(eager[1:], compiled[1:]))


def test_scores():
    layout = VideoLayout(3, (2, 2), 1, 1)
    x = clip(layout)
    attention = cell_scores(x, "auto")
    assert torch.equal(attention[:, :, 1:], x.vision[-1].received) and (attention[:, :, 0] == 0).all()
    for vision in ({}, {-1: None}):                                             # no tower, or one that cannot give it
        distinct = cell_scores(Tokens(x.features, layout, vision), "auto")
        frame = x.frames[1, 2]
        expected = 1 - float(F.cosine_similarity(frame[4], frame.mean(0), dim=0))
        assert float(distinct[1, 2, 4]) == pytest.approx(expected, abs=1e-6)
        with pytest.raises(SignalError):
            cell_scores(Tokens(x.features, layout, vision), "attention")
    for method in METHODS:
        out: Reduction = method(keep=5, scores="distinct")(x)
        assert torch.equal(out.index, method(keep=5)(Tokens(x.features, layout)).index)


@pytest.mark.parametrize("method, bad", [
    (FastVID, {"keep": 0.0}), (FastVID, {"segments": 0}), (FastVID, {"every": 0}), (FastVID, {"threshold": 1.5}),
    (FastVID, {"context": 1.0}), (FastVID, {"beta": -0.1}), (FastVID, {"scores": "cosine"}), (FastVID, {"every": 1.5}),
    (HoliTom, {"keep": 1.5}), (HoliTom, {"threshold": -2}), (HoliTom, {"beta": 1.1}), (HoliTom, {"window": 0}),
    (HoliTom, {"neighbours": 0}), (HoliTom, {"scores": "x"})])
def test_errors(method, bad):
    (name, value), = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        method(**bad)


def test_segments_of_starts():
    segments = Segments.starting(torch.tensor([[True, False, True, True, False]]))
    assert segments.first.tolist() == [[0, 0, 2, 3, 3]] and segments.last.tolist() == [[1, 1, 2, 4, 4]]
    assert segments.length.tolist() == [[2, 2, 1, 2, 2]]
