"""What the codec's benchmarks measure: labels stand where the phones are, the probe reads what is there and no more."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import codec_worth
import xcodec_probe as bench

from mmcompress.audio.codec import AudioTokens
from mmcompress.audio.speech import PHONEMES


def test_frames_take_the_phone_at_their_middle():
    item = bench.Item(torch.zeros(3200), [("SIL", 0.0, 0.041), ("AA", 0.041, 0.109), ("B", 0.109, 0.2)])
    rows = bench._phones([torch.eye(10)], [item])
    assert [PHONEMES[i] for i in rows.y.tolist()] == ["AA"] * 3 + ["B"] * 5
    frames = rows.x.reshape(8, 10, 5)                                   # (rows, features, around)
    assert frames[0, :, 2].argmax() == 2 and frames[0, :, 0].argmax() == 0 and frames[0, :, 4].argmax() == 4
    assert not frames[7, :, 3:].any()                                   # nothing behind the end


def test_digits_are_read_by_thirds():
    item = bench.Item(torch.zeros(3200), [("seven", 0.04, 0.16)])
    rows = bench._digits([torch.eye(10)], [item])
    assert rows.y.tolist() == [7]
    assert rows.x.reshape(3, 10).argmax(1).tolist() == [2, 4, 6] and rows.x.sum() == 3


@pytest.mark.parametrize("told, low, high", [(True, 0.99, 1.0), (False, 0.15, 0.35)])
def test_the_probe_reads_what_is_there(told, low, high):
    g = torch.Generator().manual_seed(0)
    parts = []
    for n in (2000, 600):
        y = torch.randint(4, (n,), generator=g)
        x = y if told else torch.randint(4, (n,), generator=g)
        parts.append(bench.Rows(torch.nn.functional.one_hot(x, 8).half(), y, torch.arange(n) % 20))
    right, sound = bench.probe(*parts)
    assert low <= float(right.float().mean()) <= high and torch.equal(sound, parts[1].sound)


def test_intervals_are_over_sounds():
    """Frames of a sound are alike: the interval is that of the 50 sounds, not of the 5,000 frames."""
    g = torch.Generator().manual_seed(0)
    sound = torch.arange(50).repeat_interleave(100)
    values = (torch.rand(50, generator=g) < 0.5).float()[sound]
    low, high = bench._interval(values, sound)
    wide = 2 * 1.96 * float(values[::100].std() / 50 ** 0.5)
    assert 0.8 * wide < high - low < 1.2 * wide and low < float(values.mean()) < high


def test_worth_of_books_and_of_choosing():
    codes = torch.tensor([[[0, 1, 0, 1], [0, 0, 0, 0]], [[1, 1, 0, 0], [1, 1, 1, 1]]])
    tokens = AudioTokens(codes, torch.tensor([4, 4]), 50.0, (2, 4), "xcodec", 16_000)
    errors = torch.tensor([[1.0, 0.2], [1.0, 0.9]], dtype=torch.float64)
    first, second = codec_worth.books("c", tokens, errors, errors)
    assert (first["used"], second["used"], first["entropy"]) == (1.0, 0.5, 1.0)
    assert first["spectral_gain"] is None and second["spectral_gain"] == pytest.approx(0.45)
    wide = AudioTokens(codes.repeat(1, 2, 1), torch.tensor([4, 4]), 50.0, (2, 4, 2, 4), "xcodec", 16_000)
    four = torch.tensor([[1.0, 0.9, 0.5, 0.1], [1.0, 0.99, 0.98, 0.97]], dtype=torch.float64)
    assert codec_worth.chosen(wide, four).endswith("0.9450; chosen (1 to 3, mean 2.00): 0.7500")
