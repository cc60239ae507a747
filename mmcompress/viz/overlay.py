"""Which tokens of a picture were kept, drawn over the picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .figure import ACCENT, SOFT, axes_at, new_figure, text_at

TOP, LEFT, GAP, CAPTION, NARROW = 0.62, 0.15, 0.22, 0.3, 1.5        # inches; a panel's caption needs at least NARROW


def kept_maps(item: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """-> thumbnail (h, w) and canvas (R, C), unpadded; None without crops. Newlines are on neither.

    1 where a token was kept (or stands for a merged group), 0.5 where it was merged into another, 0 where it was dropped.
    """
    layout = item.layout
    is_patch = layout.places().is_patch.numpy()                             # (N,)
    state = np.where(item.source.cpu().numpy() >= 0, 0.5, 0.0)              # (N,)
    state[item.index.cpu().numpy()] = 1.0
    patches = state[is_patch]
    thumbnail = patches[:layout.thumbnail_tokens].reshape(layout.tile)
    return thumbnail, patches[layout.thumbnail_tokens:].reshape(layout.size) if layout.canvas_tokens else None


def plot_kept(image: Any, item: Any) -> Any:
    """The picture, and beside it what the language model still sees of its crops and its thumbnail.

    Kept tokens are bright, dropped ones greyed out, merged ones in between with the cell that stands for them outlined.

    image   PIL image, uint8 array (H, W, 3) or a path
    item    `mmcompress.pipeline.Item`, such as an entry of `Wrapped.last`, or what a layer saw of it, `item.at(layer)`
    -> matplotlib Figure
    """
    picture = read_image(image)
    views = _views(picture, item)
    aspect = picture.shape[1] / picture.shape[0]
    wide = aspect > 1.6
    height = min(3.6, 9.0 / aspect) if wide else min(4.4, max(3.2, 3.6 / aspect))
    width = height * aspect
    side = min(3.6, 2 * height + CAPTION) if wide else min(height, 3.2)
    places = [(LEFT, TOP, width, height)]                                   # left, top, width, height of each panel
    if wide and len(views) == 3:
        places += [(LEFT, TOP + height + CAPTION, width, height), (LEFT + width + GAP, TOP, side, side)]
    else:
        shapes = [(width, height), (side, side)] if len(views) == 3 else [(side, side)]
        left = LEFT + max(width, NARROW) + GAP
        for w, h in shapes:
            places.append((left, TOP, w, h))
            left += max(w, NARROW) + GAP
    fig = new_figure(max(4.2, max(p[0] + p[2] for p in places) + LEFT), max(p[1] + p[3] for p in places) + CAPTION + 0.04)
    text_at(fig, LEFT, 0.13, f"{item.before} → {item.after} tokens", fontsize=13, fontweight="bold")
    who = "the language model" if getattr(item, "layer", None) is None else f"decoder layer {item.layer} and later ones"
    text_at(fig, LEFT, 0.37, f"{item.after / item.before:.1%} of what {who} would read", color=SOFT)
    for view, place in zip(views, places):
        draw_view(axes_at(fig, *place), view)
        text_at(fig, place[0], place[1] + place[3] + 0.06, view.caption, color=SOFT, fontsize=8)
    return fig


@dataclass(frozen=True, eq=False)
class View:
    """One panel: a picture (H, W, 3) uint8, which of its cells were kept, and a line about it."""

    picture: np.ndarray
    kept: np.ndarray | None
    caption: str
    merged: bool = False


def _views(picture: np.ndarray, item: Any) -> list[View]:
    thumbnail, canvas = kept_maps(item)
    merged, small = item.mass is not None, _resize(picture, 480, 480)
    views = [View(picture, None, f"picture, {picture.shape[1]} × {picture.shape[0]} pixels")]
    if canvas is not None:
        views.append(View(picture, canvas, canvas_caption(item, canvas), merged))
    return [*views, View(small, thumbnail, f"thumbnail: {thumbnail.size} → {int((thumbnail == 1).sum())}", merged)]


def canvas_view(image: Any, item: Any) -> View:
    """The most detailed view of one picture: its crops, or its thumbnail where there are none."""
    return _views(read_image(image), item)[1]


def canvas_caption(item: Any, canvas: np.ndarray) -> str:
    before, is_patch = item.layout.newline_tokens, item.layout.places().is_patch
    newlines = f", newlines: {before} → {int((~is_patch[item.index.cpu()]).sum())}" if before else ""
    return f"crops: {canvas.size} → {int((canvas == 1).sum())}{newlines}"


def draw_view(ax: Any, view: View) -> None:
    """Draw one panel into bare axes."""
    rows, columns = (1, 1) if view.kept is None else view.kept.shape
    shown = _resize(view.picture, *_fine(view.picture, rows, columns))
    if view.kept is not None:
        shown = _dim(shown, view.kept)
    ax.imshow(shown, extent=(0, columns, rows, 0), aspect="auto", interpolation="antialiased")
    if view.kept is not None:
        _outline(ax, view.kept == 1, view.merged)
    ax.set_xlim(0, columns)
    ax.set_ylim(rows, 0)
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((0, 0), columns, rows, fill=False, edgecolor="#c9ced6", linewidth=0.8, clip_on=False))


def _fine(picture: np.ndarray, rows: int, columns: int) -> tuple[int, int]:
    """A size of about 1000 pixels in which every cell is a whole number of pixels high and wide."""
    scale = max(1.0, 1000 / max(picture.shape[:2]))
    fit = lambda side, cells: max(4, round(scale * side / cells)) * cells  # noqa: E731
    return fit(picture.shape[0], rows), fit(picture.shape[1], columns)


def _dim(picture: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Grey out what was dropped. picture (H, W, 3), kept (R, C) with H and W multiples of R and C -> (H, W, 3)"""
    rgb = picture.astype(np.float32)
    pale = 0.28 * rgb @ np.array([0.299, 0.587, 0.114], np.float32) + 0.72 * 226
    factor = picture.shape[0] // kept.shape[0], picture.shape[1] // kept.shape[1]
    bright = np.kron(kept, np.ones(factor, np.float32))[..., None]
    return (bright * rgb + (1 - bright) * pale[..., None]).astype(np.uint8)


def _outline(ax: Any, kept: np.ndarray, strong: bool) -> None:
    """A fine grid around every kept cell; where cells stand for merged groups, each is boxed."""
    from matplotlib.collections import LineCollection

    inner: list[Any] = []
    border: list[Any] = []
    padded = np.pad(kept, 1).astype(int)
    across, down = padded[:-1, 1:-1] + padded[1:, 1:-1], padded[1:-1, :-1] + padded[1:-1, 1:]
    for sides, horizontal in ((across, True), (down, False)):
        for r, c in zip(*sides.nonzero()):
            line = [(c, r), (c + 1, r)] if horizontal else [(c, r), (c, r + 1)]
            (border if sides[r, c] == 1 or strong else inner).append(line)
    ax.add_collection(LineCollection(inner, colors="white", linewidths=0.4, alpha=0.55))
    ax.add_collection(LineCollection(border, colors=ACCENT, linewidths=0.9, capstyle="round"))


def read_image(image: Any) -> np.ndarray:
    """PIL image, path or array -> (H, W, 3) uint8; raises ValueError on other arrays, FileNotFoundError on a lost path."""
    from PIL import Image

    if isinstance(image, (str, Path)):
        if not Path(image).is_file():
            raise FileNotFoundError(f"no picture at {image}")
        image = Image.open(image)
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} {image.shape}: pass a PIL image, a path or a uint8 array (H, W, 3)")
    return image


def _resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
