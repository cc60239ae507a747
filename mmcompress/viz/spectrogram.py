"""The picture of a recording: its log-mel spectrogram, the span of every token that is left, and tokens a second over time."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..audio.reading import Sound, as_sound
from ..layout import AudioLayout
from .figure import ACCENT, INK, SOFT, axes_at, new_figure, quiet, text_at

LEFT, RIGHT, HEAD, LINE = 0.62, 0.2, 0.58, 0.17                         # inches
WIDTH, MEL, LANE, CHART, GAP = 10.0, 2.3, 0.3, 0.95, 0.07               # inches: of all panels, and their heights
BINS, COLUMNS, DEPTH = 96, 2400, 70.0                                   # of the spectrogram; decibels below its peak
KHZ = (0, 0.5, 1, 2, 4, 8, 16)
DROPPED = "#d8dce2"
FEW, MANY = "#f7c4b2", "#7a1f0b"        # a token that stands for one of the model's own, for 8 or more; ACCENT between


def plot_spans(sound: Any, item: Any, sample_rate: int | None = None, start: float = 0.0) -> Any:
    """A recording's spectrogram, below it a box over the span of every token that is left, and how many there are a second.

    Stretches whose tokens were dropped are greyed out in the spectrogram and grey in the lane. A box is the darker, the more
    tokens were merged into it; one whose tokens lie apart has several boxes. The silence behind a recording that fills a window
    of fixed length is counted in words, not drawn.

    sound        what `audio.load` gave, or its samples (T,) with their sample_rate
    item         `mmcompress.pipeline.Item` of a recording, such as an entry of `Wrapped.last`, or `item.at(3)`, layer 3's
    start        seconds into `sound` at which the item begins, such as a later window of Whisper's
    -> matplotlib Figure; raises ValueError if item is no recording or `start` lies behind the sound
    """
    layout = _layout(item)
    own = sound.sample_rate if isinstance(sound, Sound) else sample_rate
    shown = _stretch(as_sound(sound, sample_rate, own or 16_000), layout, start)
    target, mass = token_targets(item)
    target = target[:int(np.ceil(shown.seconds * layout.rate - 1e-6))]
    drawn = np.isin(np.arange(len(mass)), target)
    mass = np.where(drawn, mass, mass[drawn].min() if drawn.any() else 1.0)
    lines = textwrap.wrap(" ".join(_notes(item, shown, target, mass)), int(WIDTH / 0.057))
    top = HEAD + LINE * len(lines) + 0.1
    lane = top + MEL + GAP
    chart = lane + LANE + 0.34
    fig = new_figure(LEFT + WIDTH + RIGHT, chart + CHART + 0.5)
    _head(fig, item, lines)
    panels = [axes_at(fig, LEFT, at, WIDTH, height) for at, height in ((top, MEL), (lane, LANE), (chart, CHART))]
    _draw_mel(panels[0], shown, target, layout)
    _draw_lane(panels[1], shown, target, mass, layout)
    _draw_rate(panels[2], token_rate(item)[:len(target)], shown, layout)
    for ax in panels:
        ax.set_xlim(start, start + shown.seconds)
    return fig


def token_targets(item: Any) -> tuple[np.ndarray, np.ndarray]:
    """-> target (N,) int64, the number among the kept of the token that stands for each, -1 where it was dropped; mass (K,)"""
    target, index = item.source.cpu().numpy().copy(), item.index.cpu().numpy()
    own = target[index] < 0                                             # a reducer may leave itself out of `source`
    target[index[own]] = np.flatnonzero(own)
    mass = np.ones(len(index)) if item.mass is None else item.mass.float().cpu().numpy()
    return target, mass


def token_rate(item: Any) -> np.ndarray:
    """Tokens per second at each of the N tokens' time: the rate before, shared by those that became one; 0 where dropped.

    Its sum over N tokens, times their duration, is the number that is left. -> (N,) float64
    """
    target, _ = token_targets(item)
    shared = np.bincount(target[target >= 0], minlength=item.after)
    return np.where(target >= 0, _layout(item).rate / shared[target.clip(0)], 0.0)


def log_mel(samples: Tensor, sample_rate: int) -> Tensor:
    """Power in dB below the loudest bin, -70 to 0, on a mel scale to half the sample rate. samples (T,) -> (bins, columns)

    A window is 25 ms, and longer where the recording has more columns than a picture shows, so that no sound falls between two.
    """
    hop = max(sample_rate // 100, -(-len(samples) // COLUMNS), 1)
    window = max(sample_rate // 40, 2 * hop, 16)
    size = 2 ** max(10, (window - 1).bit_length())
    padded = F.pad(samples.float(), (0, max(0, size - len(samples))))
    waves = torch.stft(padded, size, hop, window, torch.hann_window(window), pad_mode="constant", return_complex=True)
    mel = mel_filters(BINS, size // 2 + 1, sample_rate) @ waves[:, :-(-len(samples) // hop)].abs().square()
    decibels = 10 * mel.clamp_min(1e-10).log10()
    return (decibels - decibels.max()).clamp_min(-DEPTH)


def mel_filters(bins: int, frequencies: int, sample_rate: int) -> Tensor:
    """Triangles evenly spaced in mel. (bins, frequencies) float32"""
    hertz = torch.linspace(0, sample_rate / 2, frequencies)
    edges = torch.linspace(0, _mel(sample_rate / 2), bins + 2)
    edges = 700 * (10 ** (edges / 2595) - 1)
    rise = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rise, fall).clamp_min(0)


def _mel(hertz: float) -> float:
    return 2595 * float(np.log10(1 + hertz / 700))


@dataclass(frozen=True, eq=False)
class Stretch:
    """What is drawn: samples (T,) from `start` seconds of the whole on."""

    samples: Tensor
    rate: int
    start: float
    whole: float                            # seconds

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


def _stretch(sound: Sound, layout: AudioLayout, start: float) -> Stretch:
    if not 0 <= start < sound.seconds:
        raise ValueError(f"start={start}: the sound lasts {sound.seconds:.2f} s; pass 0 or the second at which the item begins")
    first = round(start * sound.sample_rate)
    samples = sound.samples[first:first + round(layout.seconds * sound.sample_rate)]
    return Stretch(samples, sound.sample_rate, start, sound.seconds)


def _layout(item: Any) -> AudioLayout:
    if not isinstance(item.layout, AudioLayout):
        raise ValueError(f"{type(item.layout).__name__}: a spectrogram shows a recording; plot_kept shows a picture, "
                         f"plot_strip a clip")
    return item.layout


# words --------------------------------------------------------------------------------------------------------------


def _head(fig: Any, item: Any, lines: list[str]) -> None:
    who = "the model's decoder" if getattr(item, "layer", None) is None else f"decoder layer {item.layer} and later ones"
    rate = item.layout.rate
    text_at(fig, LEFT, 0.13, f"{item.before} → {item.after} tokens", fontsize=13, fontweight="bold")
    text_at(fig, LEFT, 0.37, f"{item.after / item.before:.1%} of what {who} would read of {item.layout.seconds:.1f} s: "
                             f"{rate:g} → {rate * item.after / item.before:.3g} tokens a second", color=SOFT)
    for i, line in enumerate(lines):
        text_at(fig, LEFT, HEAD + LINE * i, line, color=SOFT, fontsize=8)


def _notes(item: Any, shown: Stretch, target: np.ndarray, mass: np.ndarray) -> list[str]:
    """What a reader has to know, in sentences."""
    merged = f", darker the more were merged into it ({mass.min():.3g} to {mass.max():.3g})." if np.ptp(mass) > 1e-3 else (
        f", {mass.max():.3g} of the model's own each." if mass.max() > 1 else ".")
    out = [f"Boxes: what one token stands for{merged}"]
    if (target < 0).any():
        out.append("Grey: dropped.")
    if shown.start or shown.seconds < shown.whole - 0.05:
        out.append(f"Of {shown.whole:.1f} s this is the stretch that the model took in as one, from {shown.start:.1f} s on.")
    behind = item.layout.length - len(target)
    if behind:
        left = int((item.index.cpu() >= item.layout.length - behind).sum())
        out.append(f"Behind the recording, silence that fills the window: {behind} → {left} tokens.")
    return out


# drawing ------------------------------------------------------------------------------------------------------------


def _runs(target: np.ndarray) -> list[tuple[int, int, int]]:
    """Runs of tokens with one target: (first, end, target)."""
    cuts = np.flatnonzero(np.diff(target)) + 1
    edges = [0, *cuts.tolist(), len(target)]
    return [(a, b, int(target[a])) for a, b in pairwise(edges)]


def _draw_mel(ax: Any, shown: Stretch, target: np.ndarray, layout: AudioLayout) -> None:
    """Colours where tokens are left, grey where they were dropped, and a hairline between two tokens where there is room."""
    from matplotlib.colors import LinearSegmentedColormap

    cmap = LinearSegmentedColormap.from_list("sound", ["#fbfbf9", "#c9dbe4", "#5d9cb8", "#1f4f78", "#0d1b33"])
    mel = log_mel(shown.samples, shown.rate).numpy()
    rgb = cmap(1 + mel / DEPTH)[..., :3]                                                        # (bins, columns, 3)
    when = (np.arange(mel.shape[1]) + 0.5) / mel.shape[1] * shown.seconds
    dropped = target[(when * layout.rate).astype(int).clip(0, len(target) - 1)] < 0
    gray = 0.35 * (rgb @ np.array([0.299, 0.587, 0.114]))[..., None] + 0.65 * 0.87
    rgb = np.where(dropped[None, :, None], gray, rgb)
    top = _mel(shown.rate / 2)
    end = shown.start + shown.seconds
    ax.set_axis_on()
    ax.imshow(rgb, extent=(shown.start, end, 0, top), aspect="auto", origin="lower", interpolation="antialiased")
    wide = np.array([b - a for a, b, _ in _runs(target)]) / layout.rate / shown.seconds * WIDTH * 150               # pixels
    edges = np.array([a for a, *_ in _runs(target)[1:]])[np.minimum(wide[1:], wide[:-1]) >= 8]
    ax.vlines(shown.start + edges / layout.rate, 0, top, color=ACCENT, linewidth=0.5, alpha=0.45)
    ticks = [k for k in KHZ if 1000 * k <= shown.rate / 2]
    ax.set_yticks([_mel(1000 * k) for k in ticks], [f"{k:g}" for k in ticks])
    ax.set_ylim(0, top)
    _plain_axes(ax)
    ax.set_ylabel("kHz", color=SOFT, fontsize=8)


def _plain_axes(ax: Any) -> None:
    ax.tick_params(colors=SOFT, labelsize=7.5, length=3)
    ax.tick_params(axis="x", labelbottom=False, length=0)
    for side in ax.spines.values():
        side.set_color("#c9ced6")


def _draw_lane(ax: Any, shown: Stretch, target: np.ndarray, mass: np.ndarray, layout: AudioLayout) -> None:
    """One box a run of tokens that became one; what was dropped stays grey."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import LinearSegmentedColormap

    cmap = LinearSegmentedColormap.from_list("mass", [FEW, ACCENT, MANY])
    shade = np.log(mass.clip(1)) / np.log(max(8.0, mass.max())) if np.ptp(mass) > 1e-3 else np.full(len(mass), 0.5)
    ax.set_facecolor(DROPPED)
    ax.set_axis_on()
    runs = [(shown.start + a / layout.rate, shown.start + b / layout.rate, t) for a, b, t in _runs(target) if t >= 0]
    room = WIDTH * 72 * min((b - a for a, b, _ in runs), default=0) / shown.seconds                       # points
    corners = [[(a, 0), (b, 0), (b, 1), (a, 1)] for a, b, _ in runs]
    ax.add_collection(PolyCollection(corners, facecolors=[cmap(shade[t]) for *_, t in runs], edgecolors="white",
                                     linewidths=min(0.8, room / 6)))
    ax.set_ylim(0, 1)
    ax.set_yticks([])
    _plain_axes(ax)
    ax.set_ylabel("tokens", color=SOFT, fontsize=8, rotation=0, ha="right", va="center", labelpad=6)


def _draw_rate(ax: Any, rate: np.ndarray, shown: Stretch, layout: AudioLayout) -> None:
    """Tokens per second that are left, smoothed over half a second or a fortieth of the picture; before as a line."""
    wide = max(0.5, shown.seconds / 40)
    kernel = np.hanning(2 * round(min(wide, shown.seconds / 2) * layout.rate / 2) + 3)[1:-1]
    mean = _smooth(rate, kernel)
    when = shown.start + np.concatenate([[0], (np.arange(len(rate)) + 0.5) / layout.rate, [shown.seconds]])
    mean = np.concatenate([mean[:1], mean, mean[-1:]])
    ax.set_axis_on()
    ax.fill_between(when, mean, color=ACCENT, alpha=0.25, linewidth=0)
    ax.plot(when, mean, color=ACCENT, linewidth=1.3)
    ax.axhline(layout.rate, color=INK, linestyle=(0, (5, 3)), linewidth=0.9)
    quiet(ax)
    ax.tick_params(labelsize=7.5)
    ax.set_ylim(0, 1.12 * layout.rate)
    ax.set_yticks([0, layout.rate / 2, layout.rate], [f"{y:g}" for y in (0, layout.rate / 2, layout.rate)])
    ax.set_xlabel(f"seconds; tokens a second that are left (smoothed over {wide:.2g} s), dashed: before", color=SOFT,
                  fontsize=8, loc="left")


def _smooth(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Means of x weighted by a kernel of odd length, at the ends by the part of it that lies on x. -> as x"""
    side = len(kernel) // 2
    middle = slice(side, side + len(x))
    return np.convolve(x, kernel)[middle] / np.convolve(np.ones_like(x), kernel)[middle]
