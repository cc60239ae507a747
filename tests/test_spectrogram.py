"""Spectrograms of recordings: spans and rates against ones written by hand, pictures against the places they must show."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

import mmcompress
from mmcompress.audio.reading import AudioError, as_sound
from mmcompress.layers.run import LayerItem
from mmcompress.layout import AudioLayout, ImageLayout
from mmcompress.pipeline import Item
from mmcompress.tokens import Tokens
from mmcompress.viz import plot_spans, save, token_rate
from mmcompress.viz.spectrogram import DROPPED, log_mel, mel_filters, token_targets

RATE = 8000
LAYOUT = AudioLayout(10, 5.0)                                           # 2 s


def item(source=(0, 0, 0, -1, 1, 1, 2, -1, -1, 1), index=(1, 4, 6), mass=(3.0, 3.0, 1.0), layout=LAYOUT,
         make=lambda *fields: Item("audio", 0, *fields)):
    """Three tokens are left: of the first three, of two and the last, and one alone."""
    return make(layout, torch.tensor(index), torch.tensor(source), None if mass is None else torch.tensor(mass))


def tone(seconds=2.0, hertz=1000, rate=RATE):
    return as_sound(torch.sin(2 * np.pi * hertz * torch.arange(int(seconds * rate)) / rate), rate, to=rate)


def reduced(name, keep, n=40):
    mel = torch.randn(1, n, 8, generator=torch.Generator().manual_seed(0))
    layout = AudioLayout(n, 25.0)
    out = mmcompress.registry.build("audio", {"name": name, "keep": keep})(Tokens(mel, layout, mel=mel))
    return Item("audio", 0, layout, out.index[0], out.source[0], None if out.mass is None else out.mass[0])


def said(fig):
    return " ".join(t.get_text() for t in fig.texts)


def boxes(fig):
    """(begin, end, colour) of the boxes in the lane."""
    [held] = fig.axes[1].collections
    across = [path.vertices[:, 0] for path in held.get_paths()]
    return [(x.min(), x.max(), tuple(color[:3])) for x, color in zip(across, held.get_facecolor())]


def test_rate_by_hand():
    third = 5 / 3
    assert token_rate(item()) == pytest.approx([third, third, third, 0, third, third, 5, 0, 0, third])


@pytest.mark.parametrize("name", ["mean_pool", "stride", "energy_prune", "random"])
@pytest.mark.parametrize("keep", [1, 7, 0.5, 1.0])
def test_rates_sum_to_the_tokens_that_are_left(name, keep):
    one = reduced(name, keep)
    assert token_rate(one).sum() / one.layout.rate == pytest.approx(one.after)
    assert (token_rate(one) <= one.layout.rate).all()


def test_what_leaves_itself_out_of_source_still_stands_for_itself():
    one = item(source=(0, 0, -1, -1, -1, -1, -1, -1, -1, -1), index=(0, 4), mass=None)
    assert token_targets(one)[0].tolist() == [0, 0, -1, -1, 1, -1, -1, -1, -1, -1]


def test_boxes_lie_over_the_spans():
    """One box a stretch; a token whose parts lie apart has several of one colour, and the heavier are the darker."""
    found = boxes(plot_spans(tone(), item()))
    assert [(round(a, 6), round(b, 6)) for a, b, _ in found] == [(0, 0.6), (0.8, 1.2), (1.2, 1.4), (1.8, 2.0)]
    first, second, alone, last = (c for *_, c in found)
    assert first == second == last != alone and sum(first) < sum(alone)
    at = plot_spans(tone(5.0), item(), start=3.0)
    assert [round(a, 6) for a, *_ in boxes(at)] == [3.0, 3.8, 4.2, 4.8] and at.axes[0].get_xlim() == (3, 5)
    assert "Of 5.0 s this is the stretch that the model took in as one, from 3.0 s on." in said(at)


def test_spectrogram_is_grey_where_tokens_were_dropped():
    ax = plot_spans(tone(), item()).axes[0]
    shown = np.asarray(ax.images[0].get_array())                        # (bins, columns, 3)
    color = np.ptp(shown, axis=2).max(0)
    when = (np.arange(shown.shape[1]) + 0.5) / shown.shape[1] * 2
    dropped = ((when > 0.6) & (when < 0.8)) | ((when > 1.4) & (when < 1.8))
    assert (color[dropped] < 1e-6).all() and (color[~dropped] > 0.05).all()
    assert plot_spans(tone(), item()).axes[1].get_facecolor()[:3] == pytest.approx(to_rgb(DROPPED))


@pytest.mark.parametrize("hertz", [250, 1000, 3000])
@pytest.mark.parametrize("seconds", [0.01, 0.5, 40])
def test_a_tone_is_loudest_at_its_pitch(hertz, seconds):
    mel = log_mel(tone(seconds, hertz).samples, RATE)
    assert mel.max() == 0 and mel.min() >= -70 and mel.shape[1] <= 2400
    edges = 700 * (10 ** (torch.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), 98) / 2595) - 1)
    top = int(mel[:, mel.shape[1] // 2].argmax())
    slack = 0 if seconds > 0.1 else 60                                  # 10 ms tell a pitch to some 100 Hz
    assert edges[top] - slack <= hertz <= edges[top + 2] + slack


def test_a_click_is_not_lost_between_columns_of_a_long_recording():
    samples = 1e-4 * torch.randn(120 * RATE, generator=torch.Generator().manual_seed(0))
    samples[RATE * 50 + 77] = 1.0
    mel = log_mel(samples, RATE).mean(0)
    assert abs(int(mel.argmax()) / len(mel) * 120 - 50) < 0.2 and mel.max() > mel.median() + 20


@pytest.mark.parametrize("rate", [8000, 16_000, 48_000])
def test_every_filter_hears_something(rate):
    assert (mel_filters(96, 1025, rate).sum(1) > 0).all()


def test_rate_chart_shows_the_mean_and_the_rate_before():
    one = reduced("mean_pool", 10)
    ax = plot_spans(tone(1.6), one).axes[2]
    line, before = ax.get_lines()
    assert line.get_ydata() == pytest.approx(np.full(42, 25 / 4)) and before.get_ydata()[0] == 25


def test_words():
    fig = plot_spans(tone(), item())
    assert {"10 → 3 tokens", "30.0% of what the model's decoder would read of 2.0 s: 5 → 1.5 tokens a second"} <= {
        t.get_text() for t in fig.texts}
    assert "Grey: dropped." in said(fig) and "(1 to 3)" in said(fig) and "Behind" not in said(fig)
    equal = said(plot_spans(tone(1.6), reduced("mean_pool", 10)))
    assert "Grey" not in equal and "4 of the model's own each" in equal
    seen = item(make=lambda *fields: LayerItem(3, *fields))
    assert "decoder layer 3 and later" in said(plot_spans(tone(), seen))


def test_silence_that_fills_a_window_is_counted_not_drawn():
    fig = plot_spans(tone(1.0), item(layout=AudioLayout(10, 5.0, sound=5)))
    assert fig.axes[0].get_xlim() == (0, 1) and "silence that fills the window: 5 → 1 tokens" in said(fig)
    assert max(b for _, b, _ in boxes(fig)) <= 1.0


def test_forms_of_sound():
    sound = tone()
    forms = [(sound, {}), (sound.samples, {"sample_rate": RATE}), (sound.samples.numpy(), {"sample_rate": RATE}),
             (torch.stack([sound.samples] * 2), {"sample_rate": RATE})]
    shown = [np.asarray(plot_spans(x, item(), **more).axes[0].images[0].get_array()) for x, more in forms]
    assert all(np.allclose(s, shown[0], atol=1e-5) for s in shown)
    with pytest.raises(AudioError, match="sample_rate="):
        plot_spans(sound.samples, item())


def test_what_does_not_fit_is_refused():
    for start in (-1.0, 2.0):
        with pytest.raises(ValueError, match="the sound lasts"):
            plot_spans(tone(), item(), start=start)
    picture = Item("image", 0, ImageLayout(tile=(2, 2)), torch.tensor([0]), torch.tensor([0, -1, -1, -1]), None)
    with pytest.raises(ValueError, match="plot_kept"):
        plot_spans(tone(), picture)


@pytest.mark.parametrize("n,keep", [(1, 1), (125, 31), (750, 187), (1500, 1), (9000, 900)])
def test_panels_do_not_overlap_and_it_is_written(tmp_path, n, keep):
    one = reduced("mean_pool", keep, n)
    fig = plot_spans(as_sound(torch.zeros(n * 320), RATE, to=RATE), one)
    places = [ax.get_position() for ax in fig.axes]
    assert all(min(p.x0, p.y0) >= 0 and max(p.x1, p.y1) <= 1 for p in places)
    assert not any(a.overlaps(b) for i, a in enumerate(places) for b in places[:i])
    if n < 1000:
        save(fig, tmp_path / "new" / "spans.png")
        assert (tmp_path / "new" / "spans.png").stat().st_size > 5000
