"""Our own merging, its stream, and the baselines, against loops written from their description; layouts and signals."""

import math

import hypothesis.strategies as st
import pytest
import torch
from conftest import VIDEO_METHODS, video_reducer
from hypothesis import assume, given, settings
from tiny_video import FAMILIES, Film, build, make_inputs

from mmcompress import Tokens, VideoLayout
from mmcompress.adapters import adapter_for
from mmcompress.ops.forest import roots_of
from mmcompress.tokens import LayerState, _pool
from mmcompress.video import EVS, FramePool, Random, SpatioTemporalMerge, StreamingReducer, UniformFrames

layouts = st.builds(VideoLayout, frames=st.integers(1, 9), grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
                    lead=st.integers(0, 1), tail=st.integers(0, 1))
keeps = st.one_of(st.floats(0.01, 1.0), st.integers(1, 120))


def tokens_of(layout, batch=2, dim=8, seed=0, still=0.7):
    """Random clips in which a share of the cells holds still, with one captured vision layer."""
    g = torch.Generator().manual_seed(seed)
    t, p = layout.frames, layout.cells
    first = torch.randn(batch, 1, p, dim, generator=g)
    moves = torch.rand(batch, t, p, 1, generator=g) > still
    frames = (first + torch.cumsum(moves * torch.randn(batch, t, p, dim, generator=g), 1)
              + 0.01 * torch.randn(batch, t, p, dim, generator=g))
    features = torch.cat([frames.flatten(1, 2), torch.randn(batch, layout.tail, dim, generator=g)], 1)
    size = layout.grid[0] * layout.grid[1] + 1
    vision = LayerState(torch.randn(batch, t, 2, 4, generator=g), torch.randn(batch, t, size, 2, 4, generator=g))
    return Tokens(features, layout, {-1: vision})


@pytest.mark.parametrize("name", VIDEO_METHODS)
@given(layouts, keeps, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_every_budget_is_exact(name, layout, keep, seed):
    """The count is known before the data; indices ascend; every input went where `source` says; mass counts it."""
    assume(2 not in (layout.grid[0] * layout.grid[1], layout.cells, layout.frames * layout.cells))  # equally far from a mean
    reducer, x = video_reducer(name, keep), tokens_of(layout, seed=seed)
    out, k, n = reducer(x), reducer.count(layout), layout.tokens
    wanted = min(n, keep) if isinstance(keep, int) else max(1, int(n * keep + 1e-9))
    assert k == (wanted if name != "evs" else max(wanted, min(n, layout.cells + layout.tail)))     # never below one frame
    assert out.tokens.shape == (2, k, 8) and out.index.shape == (2, k) and out.source.shape == (2, n) and out.valid is None
    assert (out.index.diff(dim=1) > 0).all() and out.index.min() >= 0 and out.index.max() < n
    assert torch.isfinite(out.tokens).all() and out.source.min() >= -1 and out.source.max() < k
    assert torch.equal(out.source.gather(1, out.index), torch.arange(k).expand(2, k))
    counts = torch.zeros(2, k + 1).scatter_add(1, out.source + 1, torch.ones(2, n))[:, 1:]
    assert torch.equal(counts, torch.ones(2, k) if out.mass is None else out.mass)
    if out.mass is None:
        assert torch.equal(out.tokens, x.features.gather(1, out.index[..., None].expand(-1, -1, 8)))
    state = x.vision[-1]
    alone = reducer(Tokens(x.features[1:], layout, {-1: LayerState(state.query[1:], state.keys[1:])}))
    assert torch.equal(alone.index[0], out.index[1]) and torch.equal(alone.source[0], out.source[1])
    if layout.tail and k > 1:
        assert out.index[0, -1] == n - 1                                            # the tail is kept, and paid for


@pytest.mark.parametrize("name", VIDEO_METHODS)
def test_compiles_without_a_break_and_takes_bf16(name):
    layout = VideoLayout(6, (4, 4), tail=1)
    reducer, x = video_reducer(name, 0.3), tokens_of(layout)
    torch._dynamo.reset()
    compiled = torch.compile(lambda f, q, k: reducer(Tokens(f, layout, {-1: LayerState(q, k)})).index, fullgraph=True,
                             backend="eager")
    assert torch.equal(compiled(x.features, x.vision[-1].query, x.vision[-1].keys), reducer(x).index)
    half = reducer(Tokens(x.features.bfloat16(), layout, {-1: LayerState(x.vision[-1].query.bfloat16(),
                                                                         x.vision[-1].keys.bfloat16())}))
    assert half.tokens.dtype == torch.bfloat16 and torch.isfinite(half.tokens.float()).all()
    assert half.index.shape == reducer(x).index.shape


@pytest.mark.parametrize("name", ["spatio_temporal_merge", "evs", "holitom"])
def test_a_still_clip_costs_one_frame_and_loses_nothing(name):
    """n identical frames at the budget of one frame (and the tail): the frame's own tokens, to rounding."""
    layout = VideoLayout(12, (4, 4), tail=1)
    frame = torch.randn(2, 1, 16, 32)
    x = tokens_of(layout, dim=32)
    x = Tokens(torch.cat([frame.expand(-1, 12, -1, -1).flatten(1, 2), torch.randn(2, 1, 32)], 1), layout, x.vision)
    out = video_reducer(name, 17)(x)
    torch.testing.assert_close(out.tokens[:, :16], frame[:, 0], atol=1e-5, rtol=1e-5)
    if out.mass is not None:
        assert torch.equal(out.mass[:, :16], torch.full((2, 16), 12.0))


def test_with_a_tolerance_a_still_clip_costs_one_frame_at_any_keep():
    layout = VideoLayout(12, (4, 4), tail=1)
    frame = torch.randn(2, 1, 16, 32)
    still = (frame + 1e-4 * torch.randn(2, 12, 16, 32)).flatten(1, 2)
    x = Tokens(torch.cat([still, torch.randn(2, 1, 32)], 1), layout)
    for keep in (1.0, 0.5, 40):
        reducer = SpatioTemporalMerge(keep=keep, tolerance=1e-4)
        out = reducer(x)
        assert reducer.count_is_bound and out.tokens.shape[1] == reducer.count(layout)
        assert torch.equal(out.valid.sum(1), torch.tensor([17, 17]))
        for b in range(2):
            torch.testing.assert_close(out.tokens[b][out.valid[b]][:16], frame[b, 0], atol=1e-3, rtol=1e-3)
            assert out.mass[b][out.valid[b]].sum() == layout.tokens
            assert torch.equal(out.index[b][out.source[b]][:16], torch.arange(16))
    assert not SpatioTemporalMerge().count_is_bound


def test_a_wrapped_model_pays_only_for_what_changes():
    """tolerance through a whole model: the placeholders follow the data."""
    import mmcompress
    model = build("llava_next_video")
    inputs = make_inputs(model, [[Film()], [Film(), Film()]])
    frames = inputs["pixel_values_videos"]
    frames[0] = frames[0, :1]                                                       # the first clip holds still
    with mmcompress.wrap(model, video=SpatioTemporalMerge(keep=1.0, tolerance=1e-6)) as w:
        out = w.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert [i.after for i in w.last][0] == 9 and all(9 < i.after <= 36 for i in w.last[1:])
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3


# SpatioTemporalMerge against a loop --------------------------------------------------------------------------------------


def merge_by_hand(frames, layout, k, motion, spatial):
    """The description of the module, cell by cell. frames (T, P, D) float64 -> roots, source, tokens"""
    t, p, _ = frames.shape
    plain = frames
    if layout.grid != (1, 1):
        frames = torch.stack([(f - f[layout.lead:].mean(0)) for f in frames])
    frames = frames / frames.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    columns = layout.grid[1]
    where = lambda cell: divmod(cell - layout.lead, columns)  # noqa: E731
    distance = lambda a, b: float(((a - b) ** 2).sum())  # noqa: E731
    novelty, parent = [], []
    for i in range(t):
        for c in range(p):
            best, up = (distance(frames[i, c], frames[i - 1, c]), (i - 1) * p + c) if i else (1e30, 0)
            if c >= layout.lead:
                r, q = where(c)
                if i and motion:
                    around = [o for o in range(layout.lead, p)
                              if max(abs(where(o)[0] - r), abs(where(o)[1] - q)) <= motion]
                    nearest = min(around, key=lambda o: distance(frames[i, c], frames[i - 1, o]))
                    if distance(frames[i, c], frames[i - 1, nearest]) < 0.9 * best:
                        best, up = distance(frames[i, c], frames[i - 1, nearest]), (i - 1) * p + nearest
                beside = [o for o, ok in ((c - 1, q > 0), (c - columns, r > 0)) if ok]
                if spatial is not None and beside:
                    nearest = min(beside, key=lambda o: distance(frames[i, c], frames[i, o]))
                    if spatial * distance(frames[i, c], frames[i, nearest]) < best:
                        best, up = spatial * distance(frames[i, c], frames[i, nearest]), i * p + nearest
            novelty.append(math.inf if i == c == 0 else best)
            parent.append(0 if best >= 1e30 else up)
    roots = sorted(sorted(range(t * p), key=lambda n: (-novelty[n], n))[:k])
    source = []
    for n in range(t * p):
        while n not in roots:
            n = parent[n]
        source.append(roots.index(n))
    flat = plain.reshape(t * p, -1)
    tokens = torch.stack([flat[[n for n in range(t * p) if source[n] == s]].mean(0) for s in range(k)])
    return roots, source, tokens


@given(st.integers(1, 6), st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(0, 1), st.integers(0, 2),
       st.sampled_from([None, 0.5, 1.0, 2.0]), st.floats(0.02, 0.98), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_merging_is_what_the_description_says(t, grid, lead, motion, spatial, share, seed):
    layout = VideoLayout(t, grid, lead=lead)
    n = layout.tokens
    assume(n > 1 and grid[0] * grid[1] != 2)            # two cells lie opposite each other from their mean: ties to rounding
    k = min(n - 1, max(1, int(share * n)))
    x = tokens_of(layout, batch=1, seed=seed)
    out = SpatioTemporalMerge(keep=k, motion=motion, spatial=spatial)(x)
    roots, source, tokens = merge_by_hand(x.frames[0].double(), layout, k, motion, spatial)
    assert out.index[0].tolist() == roots and out.source[0].tolist() == source
    torch.testing.assert_close(out.tokens[0].double(), tokens, atol=1e-5, rtol=1e-5)


def test_motion_is_followed():
    """A patch that walks over still ground: its token goes with it, and the ground it uncovers is what costs."""
    layout = VideoLayout(5, (1, 8))
    ground = torch.eye(9)[:8] * 100.0                                               # every place of its own
    frames = ground.repeat(5, 1, 1)
    for i in range(5):
        frames[i, i] = torch.eye(9)[8] * 100.0
    x = Tokens(frames.flatten(0, 1)[None], layout)
    follows = SpatioTemporalMerge(keep=12, motion=1, spatial=None)(x)
    slot = follows.source[0, 0]
    assert all(follows.source[0, i * 8 + i] == slot for i in range(5)) and follows.mass[0, slot] == 5
    stands = SpatioTemporalMerge(keep=12, motion=0, spatial=None)(x)
    assert len({int(stands.source[0, i * 8 + i]) for i in range(5)}) == 5
    assert (follows.index[0] >= 8).sum() == 4                                       # one uncovered cell a frame, and no more


def test_what_the_whole_frame_shares_is_no_change():
    """A shift and a gain common to all cells of a frame cost nothing: only directions from its mean count."""
    layout = VideoLayout(8, (4, 4))
    frames = torch.randn(1, 1, 16, 32) * (1 + torch.rand(1, 8, 1, 1)) + 5 * torch.randn(1, 8, 1, 32)
    out = SpatioTemporalMerge(keep=16, spatial=None)(Tokens(frames.flatten(1, 2), layout))
    assert torch.equal(out.index[0], torch.arange(16)) and (out.mass == 8).all()


def test_the_budget_goes_where_something_changes():
    layout = VideoLayout(10, (6, 6))
    frames = torch.randn(1, 1, 36, 16).repeat(1, 10, 1, 1) + 0.01 * torch.randn(1, 10, 36, 16)
    frames[:, 6:, :9] = torch.randn(1, 1, 9, 16)                                    # a cut in a quarter of the picture
    out = SpatioTemporalMerge(keep=45, spatial=None)(Tokens(frames.flatten(1, 2), layout))
    frame = out.index[0] // 36
    assert (frame == 0).sum() == 36 and (frame == 6).sum() == 9


def test_trees():
    parent = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6]])
    is_root = torch.tensor([[True, False, False, True, False, False, False, True]])
    assert roots_of(parent, is_root).tolist() == [[0, 0, 0, 3, 3, 3, 3, 7]]
    long = torch.arange(1000)[None] - 1
    is_root = torch.zeros(1, 1000, dtype=torch.bool).index_fill(1, torch.tensor([0]), True)
    assert (roots_of(long.clamp_min(0), is_root) == 0).all()                        # a chain of a thousand, in ten steps


@pytest.mark.parametrize("options, message", [
    (dict(motion=-1), r"motion=-1"), (dict(motion=1.5), r"motion=1.5"), (dict(spatial=0.0), r"spatial=0.0"),
    (dict(tolerance=-0.1), r"tolerance=-0.1"), (dict(keep=0), r"keep=0"),
])
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SpatioTemporalMerge(**options)


# streams --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reducer", [SpatioTemporalMerge(keep=30), SpatioTemporalMerge(keep=7), Random(keep=30, seed=3),
                                     SpatioTemporalMerge(keep=30, spatial=None, motion=0), EVS(keep=40)], ids=repr)
@pytest.mark.parametrize("chunks", [[1] * 11, [4, 4, 3], [11]], ids=str)
def test_a_stream_equals_the_whole_clip(reducer, chunks):
    """Frame by frame or several at once, at every length: the tokens of the offline reducer on the frames so far."""
    layout = VideoLayout(11, (4, 5), lead=1)
    x = tokens_of(layout)
    stream = StreamingReducer(reducer, grid=(4, 5), lead=1)
    with pytest.raises(ValueError, match=r"no frame was pushed"):
        stream.tokens  # noqa: B018
    seen = 0
    for size in chunks:
        stream.push(x.frames[:, seen:seen + size])
        seen += size
        so_far = VideoLayout(seen, (4, 5), lead=1)
        out = reducer(Tokens(x.frames[:, :seen].flatten(1, 2), so_far))
        assert stream.seen == seen and torch.equal(stream.index, out.index)
        torch.testing.assert_close(stream.tokens, out.tokens, atol=1e-5, rtol=1e-5)
        assert torch.equal(stream.mass, torch.ones_like(stream.mass) if out.mass is None else out.mass)


def test_a_stream_holds_its_budget_only():
    stream = StreamingReducer(SpatioTemporalMerge(keep=50), grid=(4, 4))
    held = []
    for i in range(40):
        stream.push(torch.randn(1, 16, 8))
        held.append(sum(v.numel() for v in stream._held.values()))
        assert stream.tokens.shape[1] == min(50, 16 * (i + 1))
    assert len(set(held)) == 1


@pytest.mark.parametrize("name", sorted(set(VIDEO_METHODS) - {"spatio_temporal_merge", "evs", "random"}))
def test_what_no_stream_can_equal_says_so(name):
    stream = StreamingReducer(video_reducer(name, 10), grid=(2, 2))
    with pytest.raises(ValueError, match=r"looks at the whole clip"):
        stream.push(torch.randn(1, 4, 8))


@pytest.mark.parametrize("reducer, message", [(SpatioTemporalMerge(keep=0.5), r"keep=0.5: a stream has no length"),
                                              (SpatioTemporalMerge(keep=5, tolerance=0.1), r"tolerance")])
def test_streams_need_a_count(reducer, message):
    with pytest.raises(ValueError, match=message):
        StreamingReducer(reducer, grid=(2, 2))
    with pytest.raises(ValueError, match=r"frames of shape"):
        StreamingReducer(SpatioTemporalMerge(keep=4), grid=(2, 2)).push(torch.randn(1, 5, 8))


# baselines --------------------------------------------------------------------------------------------------------------


def test_uniform_frames():
    layout = VideoLayout(10, (2, 3), tail=1)
    x = tokens_of(layout)
    assert UniformFrames(keep=13)(x).index[0].tolist() == [*range(12, 18), *range(42, 48), 60]      # frames 2 and 7, the tail
    thin = UniformFrames(keep=10)(x).index[0]                                       # nine cells: the second frame is thinned
    assert thin.tolist() == [*range(12, 18), 43, 45, 47, 60]
    assert UniformFrames(keep=4)(x).index[0].tolist() == [31, 33, 35, 60]           # below one frame: the middle one, thinned


@pytest.mark.parametrize("axes", ["time", "space", "both"])
@given(layouts, st.floats(0.02, 0.98))
@settings(max_examples=60, deadline=None)
def test_pooled_blocks_are_means_of_what_lies_together(axes, layout, share):
    x, k = tokens_of(layout, batch=1), max(1, int(share * layout.tokens))
    out = FramePool(keep=k, axes=axes)(x)
    for slot in range(out.tokens.shape[1]):
        members = (out.source[0] == slot).nonzero()[:, 0]
        torch.testing.assert_close(out.tokens[0, slot], x.features[0, members].mean(0), atol=1e-5, rtol=1e-5)
        if members.max() < layout.frames * layout.cells:
            frame, cell = members // layout.cells, members % layout.cells - layout.lead
            assert frame.unique().numel() == frame.max() - frame.min() + 1
            if (cell >= 0).all():
                r, c = cell // layout.grid[1], cell % layout.grid[1]
                block = (frame.max() - frame.min() + 1) * (r.max() - r.min() + 1) * (c.max() - c.min() + 1)
                assert len(members) == block                                        # a box in time, height and width
    with pytest.raises(ValueError, match=r"axes='depth'"):
        FramePool(axes="depth")


def test_random_clips_grow_by_what_they_rank():
    """A longer clip's choice among its first frames is a subset of the shorter clip's."""
    short, long = VideoLayout(5, (4, 4)), VideoLayout(9, (4, 4))
    a = Random(keep=20)(tokens_of(short)).index[0].tolist()
    b = [i for i in Random(keep=20)(tokens_of(long)).index[0].tolist() if i < 80]
    assert set(b) <= set(a) and Random(keep=20, seed=1)(tokens_of(short)).index[0].tolist() != a


# layouts and signals ------------------------------------------------------------------------------------------------------


@given(layouts)
def test_places(layout):
    places, n = layout.places(), 0
    for t in range(layout.frames):
        for c in range(layout.cells):
            r, q = divmod(c - layout.lead, layout.grid[1])
            assert places.frame[n] == t and bool(places.is_patch[n]) == (c >= layout.lead)
            if c >= layout.lead:
                assert (places.row[n], places.column[n]) == (r, q)
            n += 1
    assert n + layout.tail == layout.tokens == len(places.frame) and (places.frame[n:] == -1).all()
    assert layout.patches == int(places.is_patch.sum()) and layout.newline_tokens == layout.tokens - layout.patches
    with pytest.raises(ValueError, match=r"at least one frame"):
        VideoLayout(0, (1, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_stock_models_in_the_layouts_order(family):
    """A clip whose frames differ in one place only: just those cells of the features differ, where the layout says."""
    model = build(family)
    inputs = make_inputs(model, [[Film(4, (24, 32))]])
    name = "pixel_values" if family == "internvl" else "pixel_values_videos"
    pixels = inputs[name]
    adapter = adapter_for(model)
    [item] = adapter.find(inputs, inputs["input_ids"])
    ids = inputs["input_ids"][0]
    assert item.layout.tokens == len(item.columns) == int((ids == ids[item.columns[0]]).sum())
    x = adapter.encode_all(inputs, [item], {})[item.modality].features[0]
    assert len(x) == item.layout.tokens
    changed = pixels.clone()
    if family == "qwen2_5_vl":
        half = len(pixels) // 2
        changed[half:] += 1.0                                                       # the second of two joined frames
        first = 1
    else:
        view = changed if family == "internvl" else changed[0]
        view[2] += 1.0                                                              # the third of four frames
        first = 2
    y = adapter.encode_all({**inputs, name: changed}, [item], {})[item.modality].features[0]
    moved = ((x - y).abs().amax(-1) > 1e-5)
    frame = item.layout.places().frame
    assert torch.equal(moved, frame == first)


def test_saliency_is_the_towers_own_attention():
    """[CLS] row or mean attention received, pooled to the cells, against the maps that eager attention reports."""
    for family, cls in (("llava_next_video", True), ("llava_onevision", False)):
        model = build(family, attn_implementation="eager")
        inputs = make_inputs(model, [[Film()]])
        pixels = inputs["pixel_values_videos"][0]
        maps = model.model.vision_tower(pixels, output_attentions=True).attentions[-1].mean(1)       # (T, S, S)
        rows = maps[:, 0, 1:] if cls else maps.mean(1)                                               # (T, 36)
        adapter = adapter_for(model)
        [layout] = adapter.video_layouts(inputs)
        encoded = adapter.encode_video(inputs, (-1,), (-1,))
        x = Tokens(encoded.features[0][None], layout, encoded.state([layout], [0]))
        expected = torch.nn.functional.adaptive_avg_pool2d(rows.unflatten(1, (6, 6)), layout.grid).flatten()
        got = x.saliency(-1)[0]
        torch.testing.assert_close(got[:layout.frames * layout.cells], expected, atol=1e-6, rtol=1e-4)
        assert (got[layout.frames * layout.cells:] == 0).all()


def test_pooling_of_signals():
    x = torch.arange(16.0).view(1, 1, 16)
    assert _pool(x, (4, 4), (2, 2)).tolist() == [[[2.5, 4.5, 10.5, 12.5]]]
    many = torch.randn(2, 3, 16, 5)
    torch.testing.assert_close(_pool(many, (4, 4), (2, 2))[1, 2, 3], many[1, 2, [10, 11, 14, 15]].mean(0))
