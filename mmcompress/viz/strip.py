"""The strip picture of a clip: its frames in time order, where each of their tokens went, and how many stay in each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..layout import VideoLayout
from .figure import ACCENT, INK, SOFT, axes_at, new_figure, quiet, text_at
from .overlay import _dim, _outline, _resize, read_image

SIDE, GAP, HEAD, LINE, CAPTION, CHART = 0.2, 0.12, 0.58, 0.17, 0.24, 1.1    # inches
WIDTH, SHEET, NARROW, LARGEST = 11.0, 6.4, 5.4, 2.3     # inches: of all frames, their height, the least of a figure, a frame
ACROSS = 8                                              # frames in a row unless the caller says otherwise
PARTS = (("kept", ACCENT), ("merged", "#f3b8a4"), ("dropped", "#d8dce2"))


def strip_maps(item: Any) -> tuple[np.ndarray, np.ndarray]:
    """-> state (T, R, C) float and target (T, R, C) int64 of a clip. Leading tokens and the tail are on neither.

    state    1 where a token was kept (or stands for a merged group), 0.5 where it was merged into another, 0 where dropped
    target   number of the token that stands for it now: itself where it was kept, -1 where it was dropped
    """
    layout = _layout(item)
    shape, is_patch = (layout.frames, *layout.grid), layout.places().is_patch.numpy()
    state, target = _tokens(item)
    return state[is_patch].reshape(shape), target[is_patch].reshape(shape)


def frame_counts(item: Any) -> np.ndarray:
    """-> (T, 3) int64: tokens kept, merged into another and dropped of each frame, leading ones included, without the tail."""
    layout = _layout(item)
    state = _tokens(item)[0][:layout.frames * layout.cells].reshape(layout.frames, layout.cells)
    return np.stack([(state == value).sum(1) for value in (1.0, 0.5, 0.0)], 1)


def plot_strip(frames: Any, item: Any, columns: int | None = None, timestamps: Sequence[float] | None = None) -> Any:
    """A clip's frames with what the language model still sees of them, and below them the tokens of every frame over time.

    Kept tokens are bright and outlined, dropped ones greyed out. Merged ones are tinted in the colour in which the token that
    stands for them is outlined; hues follow time, so what stays the same keeps the colour of the moment in which it came. Where
    the clip has more frames than fit, evenly spaced ones are shown, the first and the last among them; the chart counts all.

    The grid is stretched over the whole frame. Families whose processor crops frames to a square (CLIP towers do) saw only the
    middle of a wide frame: there the outer cells are drawn too far out.

    frames       what the processor was given: what `video.read` gave, (T', H, W, 3) uint8, or T' PIL images, arrays or paths of
                 one size. T' is T, or a multiple of T where the model joins several frames into one, as Qwen2.5-VL does (also
                 2 T - 1: it repeats the last of an odd number). The first of each is shown
    item         `mmcompress.pipeline.Item` of T frames, such as an entry of `Wrapped.last`, or `item.at(3)`, what layer 3 saw
    columns      frames in a row; None: up to 8
    timestamps   (T',) seconds; None: those of `frames`, if it has them, else frames are numbered from 0
    -> matplotlib Figure; raises ValueError if item is no clip, or if T' or the timestamps do not fit it
    """
    layout = _layout(item)
    film = _film(frames, layout, timestamps)
    sheet = _sheet(film.picture(0).shape[:2], layout.frames, columns)
    state, target = strip_maps(item)
    counts, colors = frame_counts(item), _colors(target, layout)
    inner = max(sheet.width, NARROW - 2 * SIDE)
    lines = textwrap.wrap(" ".join(_notes(item, film, sheet, counts)), int(inner / 0.057))
    top = HEAD + LINE * len(lines) + 0.1
    fig = new_figure(inner + 2 * SIDE, top + sheet.height + 0.34 + CHART + 0.54)
    _head(fig, item, lines)
    for place, number in enumerate(sheet.shown):
        down, across = divmod(place, sheet.columns)
        left, at = SIDE + across * (sheet.size[1] + GAP), top + down * (sheet.size[0] + CAPTION)
        _draw_frame(axes_at(fig, left, at, sheet.size[1], sheet.size[0]), film.picture(number), state[number], target[number],
                    colors, sheet.size, layout, number)
        text_at(fig, left, at + sheet.size[0] + 0.04, film.caption(number), color=SOFT, fontsize=7)
        text_at(fig, left + sheet.size[1], at + sheet.size[0] + 0.04, f"{counts[number, 0]} kept", color=SOFT, fontsize=7,
                ha="right")
    _draw_counts(axes_at(fig, SIDE + 0.32, top + sheet.height + 0.34, inner - 0.32, CHART), counts, film)
    return fig


def _layout(item: Any) -> VideoLayout:
    if not isinstance(item.layout, VideoLayout):
        raise ValueError(f"{type(item.layout).__name__}: a strip shows a clip; plot_kept shows a picture")
    return item.layout


def _tokens(item: Any) -> tuple[np.ndarray, np.ndarray]:
    """state and target, as `strip_maps` says, of all N tokens."""
    index, source = item.index.cpu().numpy(), item.source.cpu().numpy()
    target = np.where(source >= 0, index[source.clip(0)], -1)
    target[index] = index
    state = np.where(target >= 0, 0.5, 0.0)
    state[index] = 1.0
    return state, target


# frames -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Film:
    """The pictures of a clip; numbers count frames as the language model reads them."""

    pictures: Any                           # T' of them
    joined: int                             # of them, to a frame
    seconds: list[float] | None             # (T')

    def picture(self, number: int) -> np.ndarray:
        """(H, W, 3) uint8; raises ValueError if it is not of the first one's size."""
        picture, first = (read_image(self.pictures[n * self.joined]) for n in (number, 0))
        if picture.shape != first.shape:
            raise ValueError(f"frame {number * self.joined} is {picture.shape[0]} x {picture.shape[1]} pixels and frame 0 is "
                             f"{first.shape[0]} x {first.shape[1]}; pass the frames of one clip")
        return picture

    def caption(self, number: int) -> str:
        return f"frame {number}" if self.seconds is None else f"{self.seconds[number * self.joined]:.2f} s"


def _film(frames: Any, layout: VideoLayout, timestamps: Sequence[float] | None) -> Film:
    if hasattr(frames, "timestamps"):
        frames, timestamps = frames.frames, frames.timestamps if timestamps is None else timestamps
    if isinstance(frames, (str, Path)):
        raise ValueError(f"{frames}: pass the frames that the model was shown, as mmcompress.video.read gave them")
    if not isinstance(frames, (list, tuple)):
        frames = np.asarray(frames)
        if frames.ndim != 4:
            raise ValueError(f"frames is {frames.dtype} {frames.shape}: pass a uint8 array (frames, H, W, 3)")
    given = len(frames)
    joined = -(-given // layout.frames)
    if given == 0 or (given % layout.frames and given != 2 * layout.frames - 1):
        raise ValueError(f"{given} frames for a clip of {layout.frames}: pass those that the processor was given, as many or, "
                         f"if the model joins several into one, a multiple of it")
    if timestamps is not None and len(timestamps) != given:
        raise ValueError(f"{len(timestamps)} timestamps for {given} frames: pass one for each, in seconds")
    return Film(frames, joined, None if timestamps is None else [float(t) for t in timestamps])


# the sheet ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheet:
    """How frames lie: their size (height, width) in inches, how many to a row, and which are shown."""

    size: tuple[float, float]
    columns: int
    shown: list[int]

    @property
    def width(self) -> float:
        return self.columns * (self.size[1] + GAP) - GAP

    @property
    def height(self) -> float:
        return -(-len(self.shown) // self.columns) * (self.size[0] + CAPTION)


def _sheet(shape: tuple[int, int], frames: int, columns: int | None) -> Sheet:
    """The sheet of `frames` pictures of shape (H, W) pixels."""
    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns}: at least one frame in a row")
    columns = min(frames, columns or -(-frames // -(-frames // ACROSS)))            # up to 8, rows of equal length
    width = min(LARGEST, (WIDTH + GAP) / columns - GAP, LARGEST * shape[1] / shape[0])
    height = width * shape[0] / shape[1]
    fit = columns * max(1, int(SHEET / (height + CAPTION)))
    shown = np.rint(np.linspace(0, frames - 1, min(fit, frames))).astype(int).tolist()
    return Sheet((height, width), columns, shown)


def _notes(item: Any, film: Film, sheet: Sheet, counts: np.ndarray) -> list[str]:
    """What a reader has to know, in sentences."""
    frames, tail = len(counts), item.layout.tail
    out = ["Outlined: kept."]
    if counts[:, 1].any():
        out.append("Tinted: merged into the token outlined in that colour; hues follow time.")
    if counts[:, 2].any():
        out.append("Grey: dropped.")
    if len(sheet.shown) < frames:
        out.append(f"{len(sheet.shown)} of {frames} frames are shown, evenly spaced.")
    if film.joined > 1:
        out.append(f"The model joins {film.joined} frames into one; the first of each is shown.")
    if tail:
        left = int((item.index >= item.layout.tokens - tail).sum())
        out.append(f"Behind the last frame: {tail} → {left} tokens.")
    return out


def _head(fig: Any, item: Any, lines: list[str]) -> None:
    who = "the language model" if getattr(item, "layer", None) is None else f"decoder layer {item.layer} and later ones"
    text_at(fig, SIDE, 0.13, f"{item.before} → {item.after} tokens", fontsize=13, fontweight="bold")
    text_at(fig, SIDE, 0.37, f"{item.after / item.before:.1%} of what {who} would read of "
                             f"{item.layout.frames} frame{'s' * (item.layout.frames > 1)}", color=SOFT)
    for i, line in enumerate(lines):
        text_at(fig, SIDE, HEAD + LINE * i, line, color=SOFT, fontsize=8)


# drawing ------------------------------------------------------------------------------------------------------------


def _colors(target: np.ndarray, layout: VideoLayout) -> dict[int, np.ndarray]:
    """A colour (3,), 0 to 1, for each token that others were merged into: its hue goes from orange over green, blue and violet
    with the tokens' order in the clip, so each moment has hues of its own; neighbours differ in lightness."""
    from matplotlib.colors import hsv_to_rgb

    numbers, size = np.unique(target[target >= 0], return_counts=True)
    merged, places = numbers[size > 1].tolist(), layout.places()
    bright = [0.95 if (int(places.row[n]) + int(places.column[n])) % 2 else 0.72 for n in merged]
    return {n: hsv_to_rgb((0.09 + 0.8 * i / len(merged), 0.8, v)) for i, (n, v) in enumerate(zip(merged, bright))}


def _draw_frame(ax: Any, picture: np.ndarray, state: np.ndarray, target: np.ndarray, colors: dict[int, np.ndarray],
                size: tuple[float, float], layout: VideoLayout, number: int) -> None:
    """One frame into bare axes of this size in inches; state and target (R, C)."""
    from matplotlib.patches import Rectangle

    rows, columns = state.shape
    cell = min(size[0] / rows, size[1] / columns)                                   # inches
    height, width = (max(4, round(225 * inches / cells)) for inches, cells in ((size[0], rows), (size[1], columns)))
    shown = _dim(_resize(picture, height * rows, width * columns), state).astype(np.float32)
    tint = np.zeros((rows, columns, 4), np.float32)                                 # colour and how much of it
    for r, c in zip(*np.nonzero(state == 0.5)):
        tint[r, c] = (*(255 * colors[target[r, c]]), 0.42)
    tint = tint.repeat(height, 0).repeat(width, 1)
    shown += (tint[..., :3] - shown) * tint[..., 3:]
    ax.imshow(shown.astype(np.uint8), extent=(0, columns, rows, 0), aspect="auto", interpolation="antialiased")
    ax.add_patch(Rectangle((0, 0), columns, rows, fill=False, edgecolor="#c9ced6", linewidth=0.8, clip_on=False))
    stands = np.isin(target, list(colors)) & (state == 1)                           # for others too
    line = min(0.9, 72 * cell / 7)                                                  # points
    _outline(ax, (state == 1) & ~stands, False)
    for lines in ax.collections:
        lines.set_linewidth(line * (1 if lines is ax.collections[-1] else 0.45))
    _box(ax, stands, target, colors, 1.4 * line, 0.72 * line / (72 * cell))
    ax.set_xlim(0, columns)
    ax.set_ylim(rows, 0)


def _box(ax: Any, stands: np.ndarray, target: np.ndarray, colors: dict[int, np.ndarray], line: float, inset: float) -> None:
    """A box of its colour just inside each cell that stands for others; `line` in points, `inset` in cells."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    cells = list(zip(*np.nonzero(stands)))
    boxes = [Rectangle((c + inset, r + inset), 1 - 2 * inset, 1 - 2 * inset) for r, c in cells]
    ax.add_collection(PatchCollection(boxes, facecolors="none", edgecolors=[colors[target[r, c]] for r, c in cells],
                                      linewidths=line))


def _draw_counts(ax: Any, counts: np.ndarray, film: Film) -> None:
    """Stacked bars: tokens kept, merged and dropped of each frame. counts (T, 3)"""
    ax.set_axis_on()
    frames, below = np.arange(len(counts)), np.zeros(len(counts), np.int64)
    for (name, color), height in zip(PARTS, counts.T):
        if height.any():
            ax.bar(frames, height, bottom=below, width=0.82, color=color, label=f"{name}: {int(height.sum())}")
        below = below + height
    cells, step = int(below.max()), -(-len(counts) // 16)
    ax.set_xticks(frames[::step], [film.caption(int(n)).removeprefix("frame ") for n in frames[::step]])
    ax.set_xlim(-0.6, len(counts) - 0.4)
    ax.set_ylim(0, cells)
    ax.set_yticks(sorted({0, cells // 2, cells}))
    quiet(ax)
    ax.tick_params(labelsize=7.5)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.04), borderpad=0, borderaxespad=0, ncols=3, labelcolor=INK, frameon=False,
              fontsize=8.5, handlelength=1, handleheight=0.9, columnspacing=1.4)
    when = "" if film.seconds is None else ", by the time at which it appears"
    ax.set_xlabel(f"tokens of each frame{when}", color=SOFT, fontsize=8, loc="left")
