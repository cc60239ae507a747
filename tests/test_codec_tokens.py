"""Codecs against their models called by hand: any prefix, batches of different lengths; what is refused; the tokens."""

from dataclasses import replace

import pytest
import tiny_codec
import torch
from tiny_codec import FAMILIES, RVQ, clip, model_of, noise

import mmcompress.audio
from mmcompress.audio.codec import AudioTokens, detokenize, tokenize
from mmcompress.audio.codec.families import codec_of
from mmcompress.audio.reading import as_sound
from mmcompress.errors import AudioError, UnsupportedModelError


def by_hand(family, samples):
    """The codes that the model itself gives for (n,) samples."""
    model, x = model_of(family), samples[None, None]
    with torch.no_grad():
        if family in ("xcodec2", "neucodec"):
            inputs = codec_of(model).extractor(samples.numpy(), sampling_rate=16_000, return_tensors="pt")
            return model.encode(inputs["input_values"], inputs["input_features"]).audio_codes
        if family == "encodec":
            return model.encode(x, bandwidth=6.0).audio_codes[0]
        return model.encode(x).audio_codes


# codes ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_codes_are_the_models_own(family):
    sound = clip(family, 12)
    tokens = tokenize(model_of(family), sound)
    expected = by_hand(family, sound.samples)
    assert tokens.codes.shape[2] == 12 and tokens.codes.dtype == torch.int64
    assert torch.equal(tokens.codes, expected[:, :, :12].long())               # X-Codec 2 has one more of the padding
    assert len(tokens.codes.unique()) > 4, "a codec that gives one code everywhere tests nothing"
    assert tokens.codec == family and tokens.rate == {"mimi": 12.5, "encodec": 75.0}.get(family, 50.0)
    again, = detokenize(model_of(family), tokens)
    assert again.samples.shape == ((18 if family == "neucodec" else 12) * codec_of(model_of(family)).hop,)
    assert again.sample_rate == (24_000 if family in ("mimi", "encodec", "neucodec") else 16_000)


@pytest.mark.parametrize("family", ("dac", "mimi", "xcodec", "encodec"))
def test_the_sound_is_the_models_own(family):
    model, tokens = model_of(family), tokenize(model_of(family), clip(family, 7))
    with torch.no_grad():
        values = {"dac": lambda c: model.decode(audio_codes=c), "encodec": lambda c: model.decode(c[None], [None])}.get(
            family, model.decode)(tokens.codes).audio_values.flatten()
    sound, = detokenize(model, tokens)
    assert torch.equal(sound.samples[:len(values)], values) and not sound.samples[len(values):].any()
    assert len(sound.samples) - len(values) == (8 if family == "dac" else 0)    # DAC's odd stride


@pytest.mark.parametrize("family", RVQ)
def test_a_prefix_of_books_is_what_fewer_books_give(family):
    sound, model = clip(family, 9), model_of(family)
    whole = tokenize(model, sound)
    for n_q in range(1, whole.n_q + 1):
        tokens = tokenize(model, sound, n_q=n_q)
        assert tokens.n_q == n_q and torch.equal(tokens.codes, whole.prefix(n_q).codes)
        assert detokenize(model, tokens)[0].samples.isfinite().all()
    ends = [detokenize(model, whole.prefix(n))[0].samples for n in (1, whole.n_q)]
    assert not torch.allclose(*ends)


def test_mimi_refuses_fewer_than_its_semantic_books():
    model, sound = tiny_codec.build("mimi", semantic=2), clip("mimi", 4)
    with pytest.raises(ValueError, match="semantic"):
        model.encode(sound.samples[None, None], num_quantizers=1)
    one = tokenize(model, sound, n_q=1)
    assert torch.equal(one.codes, tokenize(model, sound).prefix(1).codes) and len(detokenize(model, one)) == 1


def test_x_codecs_listed_bandwidths_are_prefixes():
    model, sound = model_of("xcodec"), clip("xcodec", 9)
    whole = tokenize(model, sound)
    for kbps, books in ((0.5, 1), (1, 2), (1.5, 3), (2, 4), (4, 8)):
        with torch.no_grad():
            codes = model.encode(sound.samples[None, None], bandwidth=kbps).audio_codes
        assert codes.shape[1] == books and torch.equal(codes, whole.prefix(books).codes)
        assert tokenize(model, sound, kbps=kbps).n_q == books
    with pytest.raises(ValueError, match="bandwidth"):
        model.encode(sound.samples[None, None], bandwidth=3)                    # what the model refuses
    assert tokenize(model, sound, kbps=3).n_q == 6


def test_rates_buy_books():
    model, sound = model_of("xcodec"), clip("xcodec", 3)
    assert [tokenize(model, sound, tokens_per_second=r).n_q for r in (50, 99, 100, 400, 10_000)] == [1, 1, 2, 8, 8]
    assert [tokenize(model, sound, kbps=k).n_q for k in (0.5, 0.99, 1.0, 3.99, 4, 100)] == [1, 1, 2, 7, 8, 8]
    for wrong, message in ((dict(kbps=0.4), "takes 0.5"), (dict(tokens_per_second=49), "takes 50"), (dict(n_q=9), "1 ... 8"),
                           (dict(n_q=0), "1 ... 8"), (dict(n_q=2, kbps=1), "one of them"), (dict(kbps=float("nan")), "takes")):
        with pytest.raises(ValueError, match=message):
            tokenize(model, sound, **wrong)
    tokens = tokenize(model, sound)
    assert (tokens.kbps, tokens.tokens_per_second, tokens.seconds.tolist()) == (4.0, 400.0, [0.06])


@pytest.mark.parametrize("family", FAMILIES)
def test_each_of_a_batch_is_as_if_alone(family):
    model = model_of(family)
    sounds = [clip(family, n, seed) for seed, n in enumerate((5, 8, 4.6, 5, 7.9, 1.2))]
    tokens = tokenize(model, sounds, batch_size=2)
    back = detokenize(model, tokens, batch_size=2)
    assert tokens.lengths.tolist() == [5, 8, 4, 5, 7, 1] if family == "neucodec" else [5, 8, 5, 5, 8, 2]
    for i, sound in enumerate(sounds):
        alone = tokenize(model, sound)
        assert torch.equal(tokens[i].codes, alone.codes) and int(tokens.lengths[i]) == int(alone.lengths)
        expected = detokenize(model, alone)[0].samples
        assert torch.allclose(back[i].samples, expected, atol=1e-5 * float(expected.abs().max()))
    assert not tokens.codes.masked_select(~tokens.mask[:, None]).any()


def test_padding_would_change_codes():
    """Why recordings of different lengths are not simply padded to the longest."""
    short, model = clip("dac", 5), model_of("dac")
    with torch.no_grad():
        padded = model.encode(torch.nn.functional.pad(0.2 + short.samples, (0, 20 * 320))[None, None]).audio_codes[:, :, :5]
    assert not torch.equal(padded, tokenize(model, as_sound(0.2 + short.samples, 16_000)).codes)


def test_sounds_of_any_rate_and_channels():
    model, x = model_of("dac"), noise(0.3, 24_000)
    at_24k = as_sound(x, 24_000, 24_000)
    expected = tokenize(model, as_sound(at_24k, to=16_000)).codes
    for audio in (at_24k, [at_24k], torch.stack([x, x])):
        assert torch.equal(tokenize(model, audio, sample_rate=24_000).codes, expected)
    assert torch.equal(tokenize(model, (x.numpy()).tolist(), sample_rate=24_000).codes, expected)
    assert mmcompress.audio.tokenize is tokenize and mmcompress.audio.detokenize is detokenize
    assert mmcompress.audio.AudioTokens is AudioTokens


# refusals ---------------------------------------------------------------------------------------------------------------

def test_what_cannot_be_tokenized_says_the_way_out():
    model, sound = model_of("dac"), clip("dac", 3)
    with pytest.raises(AudioError, match="pass sample_rate="):
        tokenize(model, sound.samples)
    with pytest.raises(ValueError, match="at least one"):
        tokenize(model, [])
    with pytest.raises(UnsupportedModelError, match="known: dac, encodec, mimi"):
        tokenize(torch.nn.Linear(1, 1), sound)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        tokenize(tiny_codec.build("dac").train(), sound)
    with pytest.raises(ValueError, match="shorter than a frame"):
        tokenize(model_of("neucodec"), clip("neucodec", 0.9))
    with pytest.raises(ValueError, match="batch_size=0"):
        tokenize(model, sound, batch_size=0)
    for options in (dict(normalize=True), dict(chunk_length_s=1.0, overlap=0.01), dict(audio_channels=2)):
        with pytest.raises(UnsupportedModelError, match="encodec_24khz"):
            tokenize(tiny_codec.build("encodec", **options), sound)
    for family in ("xcodec", "encodec", "mimi"):                                # as transformers makes them
        empty = tiny_codec.build(family)
        for name, buffer in empty.named_buffers():
            if name.endswith((".embed", ".embed_sum")):
                buffer.zero_()
        with pytest.raises(ValueError, match=r"codebooks .* all zero"):
            tokenize(empty, sound)


def test_what_cannot_be_decoded_says_the_way_out():
    model, tokens = model_of("dac"), tokenize(model_of("dac"), clip("dac", 3))
    for wrong, message in ((replace(tokens, codec="mimi"), "codec='mimi'"), (replace(tokens, rate=75.0), "rate=75.0"),
                           (replace(tokens, vocab=(65,) * 5), "vocab=")):
        with pytest.raises(ValueError, match=message):
            detokenize(model, wrong)
    with pytest.raises(ValueError, match="leave it out"):
        detokenize(model, replace(tokens, lengths=torch.tensor([0])))


# the value itself -------------------------------------------------------------------------------------------------------

def some(lengths=(5, 3), n_q=3, steps=5):
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 9, (len(lengths), n_q, steps), generator=g)
    return AudioTokens(codes, torch.tensor(lengths), 50.0, (9, 16, 300)[:n_q], "xcodec", 16_000)


def test_tokens_refuse_what_they_are_not():
    t = some()
    for wrong, message in ((dict(codes=t.codes[0]), r"\(B, n_q, T\)"), (dict(codes=t.codes.float()), "int64"),
                           (dict(lengths=torch.tensor([5])), "2 recordings"), (dict(lengths=torch.tensor([6, 0])), "0 ... 5"),
                           (dict(lengths=torch.tensor([5, -1])), "0 ... 5"), (dict(rate=0.0), "frames per second"),
                           (dict(vocab=(9, 16)), "3 books"), (dict(vocab=(9, 16, 0)), "3 books"), (dict(sample_rate=0), "Hz"),
                           (dict(codes=t.codes + 9), "code .* in book 0 of recording 0, frame 0: its codes are 0 ... 8"),
                           (dict(codes=t.codes - 9), "its codes are 0 ... 8")):
        with pytest.raises(ValueError, match=message):
            replace(t, **wrong)
    wild = t.codes.clone()
    wild[1, :, 3:] = 10_000                                                     # behind the length nothing counts
    assert torch.equal(replace(t, codes=wild).codes, t.codes) and not t.codes[1, :, 3:].any()


def test_cutting_in_books_time_and_recordings():
    t = some()
    assert t.prefix(2).vocab == (9, 16) and torch.equal(t.prefix(2).codes, t.codes[:, :2])
    assert t.bits == pytest.approx((3.169925, 4, 8.228819)) and t.kbps == pytest.approx(0.05 * 15.398744)
    piece = t.frames(2, 4)
    assert torch.equal(piece.codes, t.codes[:, :, 2:4]) and piece.lengths.tolist() == [2, 1]
    assert t.frames(3).lengths.tolist() == [2, 0] and t.frames(0, 99).lengths.tolist() == [5, 3]
    assert torch.equal(t.cut(0.04, 0.08).codes, piece.codes)
    assert t[1].codes.shape == (1, 3, 3) and t[-1].lengths.tolist() == [3] and len(t[0:2]) == 2
    for wrong in (lambda: t.frames(5), lambda: t.frames(3, 3), lambda: t.prefix(0), lambda: t.prefix(4), lambda: t.cut(1.0)):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(IndexError):
        t[2]


@pytest.mark.parametrize("size, bytes_", [(256, 1), (257, 2), (32_768, 2), (65_536, 4)])
def test_saved_and_loaded(tmp_path, size, bytes_):
    codes = torch.randint(0, size, (2, 1, 1000))
    codes[0, 0, 0] = size - 1
    t = AudioTokens(codes, torch.tensor([1000, 700]), 12.5, (size,), "mimi", 24_000)
    t.save(tmp_path / "a.safetensors")
    again = AudioTokens.load(tmp_path / "a.safetensors")
    assert torch.equal(again.codes, t.codes) and torch.equal(again.lengths, t.lengths)
    assert (again.rate, again.vocab, again.codec, again.sample_rate) == (12.5, (size,), "mimi", 24_000)
    assert 2000 * bytes_ < (tmp_path / "a.safetensors").stat().st_size < 2000 * bytes_ + 1000


def test_files_that_hold_no_tokens(tmp_path):
    from safetensors.torch import save_file
    save_file({"codes": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name, message in (("other.safetensors", "no audio tokens"), ("broken.safetensors", "damaged"),
                          ("none.safetensors", "not a file"), ("a.npz", "ends in .safetensors")):
        with pytest.raises(ValueError, match=message):
            AudioTokens.load(tmp_path / name)
