"""Strips of clips: maps and counts against ones written by hand, pictures against the pixels and words they must show."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_viz import four_colors, middles

import mmcompress
from mmcompress.layers.run import LayerItem
from mmcompress.pipeline import Item
from mmcompress.tokens import ImageLayout, Tokens, VideoLayout
from mmcompress.viz import frame_counts, plot_strip, save, strip_maps

# three frames of a leading token and 2 x 3 cells, then a newline: 0 | 1 2 3, 4 5 6 || 7 | 8 ... 13 || 14 | 15 ... 20 || 21
LAYOUT = VideoLayout(frames=3, grid=(2, 3), lead=1, tail=1)
KEPT, MERGED = [0, 1, 9, 13, 15, 21], [(7, 0), (8, 1), (2, 1), (16, 9)]


def item(layout=LAYOUT, index=KEPT, merged=MERGED, make=lambda *fields: Item("video", 0, *fields)):
    """An Item that keeps `index`; `merged` holds (input, kept input it went into)."""
    source = torch.full((layout.tokens,), -1)
    source[list(index)] = torch.arange(len(index))
    for place, into in merged:
        source[place] = index.index(into)
    return make(layout, torch.tensor(index), source, torch.ones(len(index)) if merged else None)


def reduced(name, frames, keep=0.25, grid=(2, 3)):
    """The item that a registered reducer makes of frames (T, P, D)."""
    layout = VideoLayout(len(frames), grid)
    reducer = mmcompress.registry.build("video", {"name": name, "keep": keep})
    out = reducer(Tokens(torch.as_tensor(frames, dtype=torch.float32).flatten(0, 1)[None], layout))
    return Item("video", 0, layout, out.index[0], out.source[0], None if out.mass is None else out.mass[0])


def film(frames=3):
    """Frames of six colours, which differ in brightness."""
    return np.stack([four_colors() // (i + 1) for i in range(frames)])


def texts(fig):
    return [t.get_text() for t in fig.texts]


def test_maps_by_hand():
    state, target = strip_maps(item())
    assert state.tolist() == [[[1, .5, 0], [0, 0, 0]], [[.5, 1, 0], [0, 0, 1]], [[1, .5, 0], [0, 0, 0]]]
    assert target.tolist() == [[[1, 1, -1], [-1, -1, -1]], [[1, 9, -1], [-1, -1, 13]], [[15, 9, -1], [-1, -1, -1]]]


def test_counts_by_hand():
    """Leading tokens count, the tail does not: 7 tokens a frame."""
    assert frame_counts(item()).tolist() == [[2, 1, 4], [2, 2, 3], [1, 1, 5]]


@pytest.mark.parametrize("name", ["spatio_temporal_merge", "frame_pool", "evs", "uniform_frames"])
def test_maps_and_counts_account_for_every_token_of_a_reducer(name):
    frames = torch.randn(8, 6, 4, generator=torch.Generator().manual_seed(0))
    one = reduced(name, frames)
    state, target = strip_maps(one)
    counts = frame_counts(one)
    assert counts.sum() == 48 and (counts.sum(1) == 6).all() and counts[:, 0].sum() == one.after == 12
    for column, value in enumerate((1, 0.5, 0)):
        assert ((state == value).sum((1, 2)) == counts[:, column]).all()
    assert sorted(target[state == 1]) == one.index.tolist()
    if one.mass is not None:                                        # a token's mass is how many cells lead to it
        assert [int((target == n).sum()) for n in one.index] == one.mass.tolist()


def test_what_stands_still_leads_to_its_first_frame():
    still = np.random.default_rng(0).standard_normal((1, 6, 4)).repeat(5, 0)
    target = strip_maps(reduced("spatio_temporal_merge", still, keep=6))[1]
    assert (target == np.arange(6).reshape(2, 3)).all()


def test_pixels():
    """Kept cells show the frame, dropped ones grey, merged ones a mixture with the colour of the token they went to."""
    fig = plot_strip(film(), item())
    frames = [middles(np.asarray(ax.images[0].get_array())) for ax in fig.axes[:3]]
    whole = [middles(frame) for frame in film()]
    assert (frames[0][0, 0] == whole[0][0, 0]).all() and (frames[1][0, 1] == whole[1][0, 1]).all()
    assert np.ptp(frames[1][1, 0]) == 0 and np.ptp(whole[1][1, 0]) > 100
    boxes = {tuple(c) for ax in fig.axes[:3] for c in ax.collections[-1].get_edgecolor().round(3).tolist()}
    assert len(boxes) == 2                                          # 1 and 9 stand for others on the map, 0 leads
    lone = [ax.collections[-1].get_paths() for ax in fig.axes[:3]]
    assert [len(paths) for paths in lone] == [1, 1, 0]
    half = 0.5 * whole[2][0, 1] + 0.5 * (0.28 * whole[2][0, 1] @ [0.299, 0.587, 0.114] + 0.72 * 226)
    color = 255 * np.array(fig.axes[1].collections[-1].get_edgecolor()[0][:3])
    assert frames[2][0, 1] == pytest.approx(half + 0.42 * (color - half), abs=2)


def test_chart_stacks_the_counts():
    chart = plot_strip(film(), item()).axes[-1]
    heights = [[bar.get_height() for bar in bars] for bars in chart.containers]
    assert np.transpose(heights).tolist() == frame_counts(item()).tolist()
    assert [t.get_text() for t in chart.get_legend().get_texts()] == ["kept: 5", "merged: 4", "dropped: 12"]
    below = [[bar.get_y() for bar in bars] for bars in chart.containers]
    assert below[1] == heights[0] and below[2] == [a + b for a, b in zip(*heights[:2])]


def test_words():
    fig = plot_strip(film(), item(), timestamps=[0, 0.5, 1.25])
    assert {"22 → 6 tokens", "27.3% of what the language model would read of 3 frames", "1.25 s", "1 kept"} <= set(texts(fig))
    said = " ".join(texts(fig))
    assert "Grey: dropped." in said and "Tinted: merged" in said and "Behind the last frame: 1 → 1 tokens." in said
    plain = " ".join(texts(plot_strip(film(), item(merged=()))))
    assert "Tinted" not in plain and "frame 2" in plain and "are shown" not in plain
    seen = item(make=lambda *fields: LayerItem(3, *fields))
    assert any("decoder layer 3 and later" in t for t in texts(plot_strip(film(), seen)))


def numbers(fig):
    return [int(t.removeprefix("frame ")) for t in texts(fig) if t.startswith("frame ")]


def test_many_frames_are_sampled_and_it_says_so():
    layout = VideoLayout(100, (1, 2))
    fig = plot_strip(np.zeros((100, 20, 20, 3), np.uint8), item(layout, [0, 60], ()), columns=6)
    shown = numbers(fig)
    assert shown[0] == 0 and shown[-1] == 99 and len(shown) == len(fig.axes) - 1 < 100
    steps = np.diff(shown)
    assert steps.max() - steps.min() <= 1
    assert any(f"{len(shown)} of 100 frames are shown, evenly spaced." in t for t in texts(fig))
    assert len(fig.axes[-1].containers[0]) == 100                   # the chart counts all


@pytest.mark.parametrize("count,size,columns", [(1, (20, 30), None), (5, (40, 20), None), (20, (18, 32), None),
                                                (9, (20, 20), 4), (40, (60, 10), None)])
def test_frames_keep_their_aspect_and_do_not_overlap(count, size, columns):
    layout = VideoLayout(count, (2, 2))
    fig = plot_strip(np.zeros((count, *size, 3), np.uint8), item(layout, [0], ()), columns=columns)
    width, height = fig.get_size_inches()
    boxes = [ax.get_position() for ax in fig.axes]
    for box in boxes[:-1]:
        assert box.width * width / (box.height * height) == pytest.approx(size[1] / size[0], rel=1e-6)
    assert all(min(b.x0, b.y0) >= 0 and max(b.x1, b.y1) <= 1 for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert width < 12 and height < 12
    if columns:
        assert len({round(b.x0, 6) for b in boxes[:-1]}) == columns


def test_joined_frames():
    """A model that reads two frames as one: the first of each is shown, at its own time; an odd last one stands alone."""
    clip = SimpleNamespace(frames=film(6), timestamps=np.arange(6) / 2)
    fig = plot_strip(clip, item(merged=()))
    assert {"0.00 s", "1.00 s", "2.00 s"} <= set(texts(fig)) and "0.50 s" not in texts(fig)
    assert any("The model joins 2 frames into one; the first of each is shown." in t for t in texts(fig))
    kept = middles(np.asarray(fig.axes[2].images[0].get_array()))[0, 0]
    assert (kept == middles(film(6)[4])[0, 0]).all()
    odd = plot_strip(film(5), item(merged=()))
    assert any("joins 2 frames" in t for t in texts(odd))


def test_forms_of_frames(tmp_path):
    frames = film()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    forms = [frames, list(frames), [Image.fromarray(f) for f in frames], paths, torch.from_numpy(frames)]
    shown = [np.stack([np.asarray(ax.images[0].get_array()) for ax in plot_strip(f, item()).axes[:3]]) for f in forms]
    assert all((s == shown[0]).all() for s in shown)


@pytest.mark.parametrize("frames,more,words", [
    (film(4), {}, "4 frames for a clip of 3"), (film(2), {}, "2 frames for"), (film(7), {}, "7 frames for"),
    ([], {}, "0 frames"), (film()[0], {}, "(frames, H, W, 3)"), (film() / 255, {}, "float64"), ("clip.mp4", {}, "video.read"),
    (film(), {"timestamps": [0, 1]}, "2 timestamps for 3 frames"), (film(), {"columns": 0}, "columns=0"),
    ([*film()[:2], four_colors(20, 30)], {}, "frame 2 is 20 x 30"),
])
def test_what_does_not_fit_is_refused(frames, more, words):
    with pytest.raises(ValueError) as error:
        plot_strip(frames, item(), **more)
    assert words in str(error.value)


def test_a_picture_is_no_strip():
    picture = Item("image", 0, ImageLayout(tile=(2, 2)), torch.tensor([0]), torch.tensor([0, -1, -1, -1]), None)
    for show in (strip_maps, frame_counts, lambda one: plot_strip(film(), one)):
        with pytest.raises(ValueError, match="plot_kept"):
            show(picture)


def test_it_is_written(tmp_path):
    save(plot_strip(film(), item()), tmp_path / "new" / "strip.png")
    pixels = np.asarray(Image.open(tmp_path / "new" / "strip.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
