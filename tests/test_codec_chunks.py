"""Hours in chunks: equal to the whole where a codec hears a stretch only, bounded in memory, faded at the seams."""

from dataclasses import replace

import pytest
import torch
from tiny_codec import clip, model_of, noise

import mmcompress.audio
import mmcompress.audio.codec.chunked as chunked
from mmcompress.audio.codec import detokenize, detokenize_chunked, sound_blocks, tokenize, tokenize_chunked
from mmcompress.audio.codec.families import codec_of

BOUNDED = ("dac", "mimi")               # families whose codes hear a stretch only


@pytest.mark.parametrize("frames", (39.4, 40, 40.01, 60, 9.5, 1))
@pytest.mark.parametrize("family", BOUNDED)
def test_chunks_give_the_codes_of_the_whole(family, frames):
    model, sound = model_of(family), clip(family, frames)
    whole = tokenize(model, sound)
    chunk = 10 / whole.rate
    tokens = tokenize_chunked(model, sound, chunk=chunk)
    assert torch.equal(tokens.codes, whole.codes) and torch.equal(tokens.lengths, whole.lengths)
    assert torch.equal(tokenize_chunked(model, sound, chunk=chunk, n_q=2).codes, whole.prefix(2).codes)


def test_too_short_a_context_shows():
    """So that the test above would fail if the surroundings were not heard."""
    model, sound = model_of("dac"), clip("dac", 60)
    whole, without = tokenize(model, sound), tokenize_chunked(model, sound, chunk=0.2, context=0)
    differs = (whole.codes != without.codes).any(1)[0].nonzero()[:, 0]
    left, right = codec_of(model).encoder_reach()
    assert len(differs) and all(min(t % 10, 9 - t % 10) <= max(left, right) for t in differs.tolist())


@pytest.mark.parametrize("family", ("xcodec", "encodec", "xcodec2", "neucodec"))
def test_chunks_of_codecs_that_hear_everything(family):
    """As many frames, the same in the first chunk once it is all there is, and closer to the whole with more context."""
    model, sound = model_of(family), clip(family, 60.5)
    whole = tokenize(model, sound)
    rate = whole.rate
    assert torch.equal(tokenize_chunked(model, sound).codes, whole.codes)
    agree = [float((tokenize_chunked(model, sound, chunk=20 / rate, context=c / rate).codes == whole.codes).float().mean())
             for c in (0, 60)]
    assert agree[1] == 1.0 and agree[0] < 1.0


@pytest.mark.parametrize("suffix", ("wav", "flac"))
def test_a_file_is_read_piece_by_piece(tmp_path, monkeypatch, suffix):
    soundfile = pytest.importorskip("soundfile")
    model, path = model_of("dac"), tmp_path / f"long.{suffix}"
    x = noise(2.01).clamp(-1, 1)
    soundfile.write(path, x.numpy(), 16_000, subtype="PCM_16")
    heard, read = [], []
    encode, load = type(codec_of(model)).encode, chunked.load
    monkeypatch.setattr(type(codec_of(model)), "encode", lambda self, s, n: (heard.append(len(s[0])), encode(self, s, n))[1])
    monkeypatch.setattr(chunked, "load", lambda *a, **k: (read.append(s := load(*a, **k)), s)[1])
    tokens = tokenize_chunked(model, str(path), chunk=0.2)
    left, right = codec_of(model).encoder_reach()
    most = (10 + left + right) * 320
    assert max(heard) <= most and max(len(s.samples) for s in read) <= most + 1     # bounded, however long the file is
    assert len(heard) >= 8
    soundfile.write(path, x[:32_000].numpy(), 16_000, subtype="PCM_16")                 # ends where a chunk does
    assert tokenize_chunked(model, path, chunk=0.2, context=0).lengths.tolist() == [100]
    soundfile.write(path, x.numpy(), 16_000, subtype="PCM_16")
    assert torch.equal(tokens.codes, tokenize(model, mmcompress.audio.load(path)).codes)


@pytest.mark.parametrize("fade", (0.0, 0.01, 0.1, 0.2))
@pytest.mark.parametrize("family", ("dac", "mimi", "xcodec"))
def test_sound_in_chunks_is_the_sound_of_the_whole(family, fade):
    model = model_of(family)
    for frames in (47, 40, 31, 3):
        tokens = tokenize(model, clip(family, frames)).prefix(3)
        whole = detokenize(model, tokens)[0].samples
        sound = detokenize_chunked(model, tokens, chunk=10 / tokens.rate, fade=fade)
        assert sound.samples.shape == whole.shape
        assert float((sound.samples - whole).abs().max()) < 1e-4 * float(whole.abs().max())


def test_blocks_are_bounded_and_faded_linearly(monkeypatch):
    """Each chunk decoded as a constant of its own: the seam is a straight line between neighbours."""
    model = model_of("encodec")
    tokens = replace(tokenize(model, clip("encodec", 25)))
    calls = []
    monkeypatch.setattr(chunked, "decoded", lambda codec, codes: (calls.append(codes.shape[2]), torch.full(
        (1, codes.shape[2] * 320), float(len(calls))))[1])
    blocks = list(sound_blocks(model, tokens, chunk=10 / 75, context=2 / 75, fade=100 / 24_000))
    sound = torch.cat(blocks)
    assert len(blocks) == 3 and max(calls) == 10 + 2 * (2 + 1) and len(sound) == 25 * 320
    for seam, before in ((3200, 1.0), (6400, 2.0)):
        assert torch.equal(sound[seam - 300:seam - 50], torch.full((250,), before))
        assert torch.allclose(sound[seam - 50:seam + 50], before + (torch.arange(100) + 0.5) / 100)
        assert torch.equal(sound[seam + 50:seam + 300], torch.full((250,), before + 1))


@pytest.mark.parametrize("family", ("dac", "mimi", "xcodec"))
def test_no_sound_changes_beyond_the_reach(family):
    """The bound, by experiment: one frame's codes are changed, and only sound within the reach is another."""
    model, t = model_of(family), 30
    tokens = tokenize(model, clip(family, 60))
    codes = tokens.codes.clone()
    codes[:, :, t] = (codes[:, :, t] + 7) % tokens.vocab[0]
    a, b = (detokenize(model, replace(tokens, codes=c))[0].samples for c in (tokens.codes, codes))
    hop, (left, right) = codec_of(model).output_hop, codec_of(model).decoder_reach()
    moved = ((a - b).abs() > 1e-5 * float(a.abs().max())).nonzero()[:, 0] // hop
    assert t - right <= int(moved.min()) <= t <= int(moved.max()) <= t + left   # what sees left is seen right


@pytest.mark.parametrize("family", BOUNDED)
def test_no_code_hears_beyond_the_reach(family):
    """Likewise: the sound of one frame is another, and only what the encoder makes of frames within the reach changes."""
    model, t = model_of(family), 30
    a = clip(family, 60).samples
    hop, (left, right) = codec_of(model).hop, codec_of(model).encoder_reach()
    b = a.clone()
    b[t * hop:(t + 1) * hop] = clip(family, 1, seed=9).samples
    with torch.no_grad():
        heard = [model.encoder(x[None, None]) if family == "dac" else model.encoder(x[None, None]).latents for x in (a, b)]
    moved = (heard[0] != heard[1]).any(1)[0].nonzero()[:, 0]
    assert t - right <= int(moved.min()) <= t <= int(moved.max()) <= t + left
    assert int(moved.max()) >= t + left // 2, "the bound is far from what is"


def test_chunks_refuse_what_makes_no_sense():
    model, sound = model_of("dac"), clip("dac", 20)
    for wrong, message in ((dict(chunk=0), "at least one frame"), (dict(chunk=0.001), "at least one frame"),
                           (dict(context=-1), "context=-1")):
        with pytest.raises(ValueError, match=message):
            tokenize_chunked(model, sound, **wrong)
    tokens = tokenize(model, [sound, sound])
    with pytest.raises(ValueError, match=r"tokens\[i\]"):
        detokenize_chunked(model, tokens)
    with pytest.raises(ValueError, match="fade=2"):
        detokenize_chunked(model, tokens[0], chunk=1, fade=2)
    with pytest.raises(ValueError, match="shorter than a frame"):
        tokenize_chunked(model_of("neucodec"), clip("neucodec", 0.5))
