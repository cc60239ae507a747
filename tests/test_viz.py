"""Kept maps against maps written by hand; figures against the pixels and points they must show."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmcompress.eval import Row
from mmcompress.pipeline import Item
from mmcompress.tokens import ImageLayout
from mmcompress.viz import contact_sheet, kept_maps, plot_kept, plot_pareto, save
from mmcompress.viz import figure as figures

# thumbnail 2 x 2: tokens 0-3; canvas 2 x 3 of the 2 x 4 that two crops tile: rows 4 5 6 | newline 7, 8 9 10 | newline 11
LAYOUT = ImageLayout(tile=(2, 2), grid=(1, 2), rows=(0, 2), columns=(0, 3), newlines=True)


def item(layout, index, merged=()):
    """An Item that keeps `index`; `merged` holds (input, kept input it went into)."""
    source = torch.full((layout.tokens,), -1)
    source[list(index)] = torch.arange(len(index))
    for place, into in merged:
        source[place] = index.index(into)
    mass = torch.ones(len(index)) if merged else None
    return Item("image", 0, layout, torch.tensor(index), source, mass)


def test_kept_maps_by_hand():
    thumbnail, canvas = kept_maps(item(LAYOUT, [1, 4, 6, 7, 9]))
    assert thumbnail.tolist() == [[0, 1], [0, 0]]
    assert canvas.tolist() == [[1, 0, 1], [0, 1, 0]]                # the newline at 7 is on no map


def test_merged_tokens_are_half():
    thumbnail, canvas = kept_maps(item(LAYOUT, [0, 5], merged=[(2, 0), (4, 5), (10, 5)]))
    assert thumbnail.tolist() == [[1, 0], [0.5, 0]]
    assert canvas.tolist() == [[0.5, 1, 0], [0, 0, 0.5]]


@pytest.mark.parametrize("layout", [ImageLayout(tile=(2, 2)), ImageLayout(tile=(2, 2), newlines=True),
                                    ImageLayout(tile=(2, 2), grid=(1, 2), rows=(0, 2), columns=(2, 2), newlines=True)])
def test_without_a_canvas(layout):
    """One tile, one tile with a newline, and a sliver of which padding left only newlines."""
    thumbnail, canvas = kept_maps(item(layout, [0, 3]))
    assert thumbnail.tolist() == [[1, 0], [0, 1]] and canvas is None
    assert len(plot_kept(np.zeros((20, 30, 3), np.uint8), item(layout, [0, 3])).axes) == 2


def test_maps_count_what_was_kept():
    layout = ImageLayout(tile=(12, 12), grid=(2, 2), rows=(3, 21), columns=(0, 24), newlines=True)
    index = torch.randperm(layout.tokens, generator=torch.Generator().manual_seed(0))[:200].sort().values.tolist()
    thumbnail, canvas = kept_maps(item(layout, index))
    newlines = sum(place >= 144 and (place - 144) % 25 == 24 for place in index)
    assert thumbnail.sum() == sum(place < 144 for place in index)
    assert thumbnail.sum() + canvas.sum() + newlines == 200 and canvas.shape == (18, 24)


def four_colors(height=40, width=60):
    """A picture whose 2 x 3 cells have six colours."""
    colors = np.array([[(250, 0, 0), (0, 250, 0), (0, 0, 250)], [(250, 250, 0), (0, 250, 250), (250, 0, 250)]], np.uint8)
    return np.kron(colors, np.ones((height // 2, width // 3, 1), np.uint8))


def middles(shown, rows=2, columns=3):
    height, width = shown.shape[0] // rows, shown.shape[1] // columns
    return shown[height // 2::height, width // 2::width].astype(int)


def test_overlay_shows_kept_cells_and_greys_the_rest():
    picture = four_colors()
    axes = plot_kept(picture, item(LAYOUT, [4, 8, 10], merged=[(6, 4)])).axes
    plain, crops = (np.asarray(ax.images[0].get_array()) for ax in axes[:2])
    assert (middles(plain) == middles(picture)).all()
    got, want = middles(crops), middles(picture)
    for cell in ((0, 0), (1, 0), (1, 2)):                           # 4, 8, 10 were kept
        assert (got[cell] == want[cell]).all()
    for cell in ((0, 1), (1, 1)):                                   # 5, 9 were dropped
        assert np.ptp(got[cell]) == 0 and np.ptp(want[cell]) == 250
    assert 100 < np.ptp(got[0, 2]) < 150                            # 6 was merged: half its colour is left
    assert axes[1].images[0].get_extent() == [0, 3, 2, 0]           # the cells cover the whole picture
    assert crops.shape[0] % 2 == crops.shape[1] % 3 == 0


def borders(ax):
    """The strong lines of a panel as a set of (x0, y0, x1, y1)."""
    return {tuple(np.asarray(s).flatten().astype(int).tolist()) for s in ax.collections[1].get_segments()}


def test_kept_regions_are_bordered_and_representatives_boxed():
    kept, merged = (plot_kept(four_colors(), i).axes[1] for i in (item(LAYOUT, [4, 5]), item(LAYOUT, [4, 5], [(6, 5)])))
    around = {(0, 0, 1, 0), (1, 0, 2, 0), (0, 1, 1, 1), (1, 1, 2, 1), (0, 0, 0, 1), (2, 0, 2, 1)}
    between = (1, 0, 1, 1)
    assert borders(kept) == around                                  # one region of two cells
    assert borders(merged) == around | {between}                    # two cells, each for its group


@pytest.mark.parametrize("size", [(40, 60), (30, 210), (210, 30), (300, 20)])
def test_panels_keep_the_aspect_and_do_not_overlap(size):
    fig = plot_kept(np.zeros((*size, 3), np.uint8), item(LAYOUT, [4]))
    width, height = fig.get_size_inches()
    boxes = [ax.get_position() for ax in fig.axes]
    for box in boxes[:2]:
        assert box.width * width / (box.height * height) == pytest.approx(size[1] / size[0], rel=1e-6)
    assert boxes[2].width * width == pytest.approx(boxes[2].height * height)
    assert all(min(b.x0, b.y0) >= 0 and max(b.x1, b.y1) <= 1 for b in boxes)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not boxes[a].overlaps(boxes[b])


def test_picture_forms(tmp_path):
    array = four_colors()
    Image.fromarray(array).save(tmp_path / "picture.png")
    shown = [np.asarray(plot_kept(p, item(LAYOUT, [4])).axes[0].images[0].get_array())
             for p in (array, Image.fromarray(array), tmp_path / "picture.png", str(tmp_path / "picture.png"))]
    assert all((s == shown[0]).all() for s in shown)
    with pytest.raises(ValueError, match="float64"):
        plot_kept(array / 255, item(LAYOUT, [4]))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plot_kept(tmp_path / "nowhere.png", item(LAYOUT, [4]))


def test_figures_touch_no_global_state_and_show_in_notebooks(tmp_path):
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    fig = plot_kept(four_colors(), item(LAYOUT, [4]))
    assert fig._repr_png_().startswith(b"\x89PNG") and pyplot.get_fignums() == before
    save(fig, tmp_path / "new" / "folder.png")
    assert Image.open(tmp_path / "new" / "folder.png").size == tuple((fig.get_size_inches() * fig.dpi).astype(int))


def test_without_matplotlib(monkeypatch):
    figures._figure_class.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "mmcompress\[viz\]"'):
        figures.new_figure(1, 1)


def test_contact_sheet_says_what_was_answered():
    sheet = contact_sheet([four_colors()], [item(LAYOUT, [4])], [[("which?", "this", True), ("why?", "that", False)]], "title")
    texts = [t.get_text() for t in sheet.texts]
    assert {"title", "which?", "✓ this", "✗ that", "12 → 1 tokens"} <= set(texts)


def row(method, keep, kind, accuracy, after):
    return Row(method, keep, kind, 10, round(10 * accuracy), accuracy, accuracy - 0.1, accuracy + 0.05, 200.0, after)


@pytest.mark.parametrize("log", [True, False])
def test_pareto_points(log):
    rows = [row("all tokens", 1.0, kind, 0.9, 200.0) for kind in ("cards", "receipt")]
    rows += [row("one", keep, "cards", a, 200 * keep) for keep, a in ((0.5, 0.8), (0.1, 0.4))]
    rows += [row("one", 0.5, "receipt", 0.3, 100.0)]
    cards, receipts = plot_pareto(rows, log=log).axes
    [bars] = cards.containers
    line, _, [spans] = bars.lines
    assert line.get_xdata() == pytest.approx([0.1, 0.5]) and line.get_ydata() == pytest.approx([0.4, 0.8])
    assert np.array([s[:, 1] for s in spans.get_segments()]) == pytest.approx(np.array([[0.3, 0.45], [0.7, 0.85]]))
    assert receipts.containers[0].lines[0].get_ydata() == pytest.approx([0.3])
    dashed = [li for li in cards.lines if li.get_label() == "all tokens"]
    assert len(dashed) == 1 and set(dashed[0].get_ydata()) == {0.9}
    assert cards.get_xscale() == ("log" if log else "linear")


def test_pareto_refuses_kinds_without_rows():
    with pytest.raises(ValueError, match="'receipt'"):
        plot_pareto([row("one", 0.5, "cards", 0.5, 100.0)])


def test_pareto_needs_only_the_fields_of_a_row():
    rows = [SimpleNamespace(**vars(row("one", 0.5, "all", 0.5, 100.0)))]
    assert len(plot_pareto(rows, kinds=("all",)).axes) == 1
