"""Reading sound: the right samples at the right rate, the same from both backends, and a named error for all else."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from mmcompress.audio import reading
from mmcompress.audio.reading import AudioError, Sound, as_sound, check_rate, load, resampling
from mmcompress.audio.reading.pyav_backend import PyAV
from mmcompress.audio.reading.resampling import Window, resample

BOTH = ("soundfile", "pyav")
RATE, N = 44100, 3 * 44100 + 77                     # Hz, samples of the sounds here


# sounds ------------------------------------------------------------------------------------------------------------------

def tones(n: int = N, rate: int = RATE, channels: int = 2) -> np.ndarray:
    """(n, channels): a rising tone, and one of another pitch and loudness, over a little noise: no stretch is like another."""
    t = np.arange(n) / rate
    both = np.stack([0.3 * np.sin(2 * np.pi * (300 + 200 * t) * t), 0.2 * np.sin(2 * np.pi * 330 * t)], 1)
    return (both[:, :channels] + 0.01 * np.random.default_rng(0).standard_normal((n, channels))).astype(np.float32)


def encode(path: Path, codec: str = "aac", rate: int = RATE, channels: int = 2, video: str = "", sound: bool = True,
           x: np.ndarray | None = None) -> Path:
    layout = {1: "mono", 2: "stereo"}[channels]
    with av.open(str(path), "w") as out:
        picture, track = None, None
        if video:
            picture = out.add_stream(video, rate=10)
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuv420p"
        if sound:
            # noise substitution off: what a decoder substitutes is not the same twice
            track = out.add_stream(codec, rate=rate, layout=layout, options={"aac_pns": "0"} if codec == "aac" else {})
        if picture is not None:
            for i in range(30):
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 8 * i, np.uint8), format="rgb24")
                frame.pts = i
                out.mux(picture.encode(frame))
            out.mux(picture.encode(None))
        if track is not None:
            x = tones(3 * rate + 77, rate, channels) if x is None else x
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(x.T), format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate, 0
            context = track.codec_context
            fit = av.AudioResampler(format=context.format.name, layout=layout, rate=rate, frame_size=context.frame_size or None)
            for piece in fit.resample(frame) + fit.resample(None):
                out.mux(track.encode(piece))
            out.mux(track.encode(None))
    return path


WRITTEN: dict[str, dict[str, Any]] = {              # by soundfile; the name says the format, and the subtype
    "u8.wav": {"subtype": "PCM_U8"}, "s16.wav": {"subtype": "PCM_16"}, "s24.wav": {"subtype": "PCM_24"},
    "s32.wav": {"subtype": "PCM_32"}, "float.wav": {"subtype": "FLOAT"}, "double.wav": {"subtype": "DOUBLE"},
    "ulaw.wav": {"subtype": "ULAW"}, "large.rf64": {"format": "RF64"}, "s16.flac": {"subtype": "PCM_16"},
    "s24.flac": {"subtype": "PCM_24"}, "s16.aiff": {}, "a.ogg": {}, "a.mp3": {}, "a.opus": {"format": "OGG", "subtype": "OPUS"},
}
ENCODED: dict[str, dict[str, Any]] = {              # by PyAV
    "a.m4a": {}, "a.aac": {}, "a.mp4": {"video": "libx264"}, "a.mov": {"video": "libx264"}, "a.mkv": {"video": "libx264"},
    "a.webm": {"codec": "libopus", "rate": 48000, "video": "libvpx"}, "a.ts": {"video": "libx264"},
    "mono.m4a": {"channels": 1},
}
LOSSLESS = [n for n in WRITTEN if n.endswith((".wav", ".flac", ".rf64", ".aiff"))]
STEP = {"u8.wav": 2 ** -7, "s16.wav": 2 ** -15, "large.rf64": 2 ** -15, "s16.aiff": 2 ** -15, "s16.flac": 2 ** -15,
        "s24.wav": 2 ** -23, "s24.flac": 2 ** -23, "s32.wav": 2 ** -25, "float.wav": 0, "double.wav": 0, "ulaw.wav": 2 ** -5}


class Shelf:
    """Files by name, written when they are first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __getitem__(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            if name in WRITTEN:
                rate = self.rate(name)
                soundfile.write(path, tones(3 * rate + 77, rate), rate, **WRITTEN[name])
            else:
                encode(path, **ENCODED[name])
        return path

    def rate(self, name: str) -> int:
        return 48000 if name in ("a.opus", "a.webm") else RATE


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("sounds"))


# the right samples -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_files_give_what_was_written(files: Shelf, name: str, backend: str) -> None:
    sound = load(files[name], RATE, mono=False, backend=backend)
    assert (sound.samples.shape, sound.samples.dtype) == ((2, N), torch.float32)
    assert (sound.sample_rate, sound.source_rate, sound.source_channels) == (RATE, RATE, 2)
    assert sound.seconds == N / RATE
    assert np.abs(sound.samples.numpy().T - tones()).max() <= STEP[name]


@pytest.mark.parametrize("name", WRITTEN)
def test_both_backends_give_the_same_samples(files: Shelf, name: str) -> None:
    a, b = (load(files[name], files.rate(name), mono=False, backend=backend).samples for backend in BOTH)
    assert a.shape == b.shape
    if name == "a.opus":                                                # they fade the last frame, of 20 ms, differently
        a, b = a[:, :-960], b[:, :-960]
    assert float((a - b).abs().max()) <= (0 if name in LOSSLESS else 1e-4)


@pytest.mark.parametrize("name", ["a.ogg", "a.mp3", "a.opus", *ENCODED])
def test_lossy_files_give_what_was_encoded(files: Shelf, name: str) -> None:
    """Sample by sample: a delay of a few samples would show. Bare AAC has the encoder's first frame in front."""
    rate, channels = files.rate(name), 1 if name == "mono.m4a" else 2
    sound = load(files[name], rate, mono=False)
    assert (sound.source_rate, sound.source_channels) == (rate, channels)
    x, want = sound.samples.numpy().T, tones(3 * rate + 77, rate, channels)
    delay = 1024 if name in ("a.aac", "a.ts") else 0
    assert len(want) <= len(x) - delay <= len(want) + 1024
    error = x[delay:][:len(want)] - want
    assert np.sqrt((error ** 2).mean()) < 0.02 < 0.14 < np.sqrt((want ** 2).mean())


@pytest.mark.parametrize("name", ["s16.wav", "a.mp3", "a.m4a"])
def test_mono_is_the_mean_of_the_channels(files: Shelf, name: str) -> None:
    both = load(files[name], RATE, mono=False).samples
    one = load(files[name], RATE)
    assert one.samples.ndim == 1 and one.source_channels == 2
    assert torch.allclose(one.samples, both.mean(0), atol=1e-7)


@pytest.mark.parametrize("n", [1, 63, 1000, 16384, 16385])
@pytest.mark.parametrize("backend", BOTH)
def test_odd_lengths(tmp_path: Path, backend: str, n: int) -> None:
    soundfile.write(tmp_path / "a.wav", tones(n, channels=1), RATE, subtype="FLOAT")
    assert torch.equal(load(tmp_path / "a.wav", RATE, backend=backend).samples, torch.from_numpy(tones(n, channels=1)[:, 0]))
    assert len(load(tmp_path / "a.wav", 16000, backend=backend).samples) == math.ceil(n * 16000 / RATE)


def test_many_channels(tmp_path: Path) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (999, 6)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", x, 8000, subtype="FLOAT")
    for backend in BOTH:
        assert torch.equal(load(tmp_path / "a.wav", 8000, mono=False, backend=backend).samples.T, torch.from_numpy(x))


def test_the_content_decides(files: Shelf, tmp_path: Path) -> None:
    for name, liar in (("s16.wav", "a.mp4"), ("s16.wav", "a.raw"), ("a.mp3", "b.wav"), ("a.m4a", "c.wav"), ("a.mkv", "noname")):
        (tmp_path / liar).write_bytes(files[name].read_bytes())
        assert torch.equal(load(tmp_path / liar).samples, load(files[name]).samples)


# rates -------------------------------------------------------------------------------------------------------------------

def sine(hertz: float, rate: int, seconds: float = 2.0) -> torch.Tensor:
    return torch.sin(2 * math.pi * hertz * torch.arange(int(rate * seconds), dtype=torch.float64) / rate)


@pytest.mark.parametrize(("rate", "to"), [(44100, 16000), (48000, 16000), (8000, 16000), (22050, 24000), (96000, 44100)])
def test_resampling_against_the_closed_form(rate: int, to: int) -> None:
    for hertz in (50.0, 440.0, 0.43 * min(rate, to)):
        y = resample(sine(hertz, rate).float(), rate, to)
        assert len(y) == 2 * to
        assert float((y - sine(hertz, to))[to // 20:-to // 20].abs().max()) < 1e-3
    if to < rate:                                                       # what the new rate cannot hold does not come back
        y = resample(sine(0.56 * to, rate).float(), rate, to)
        assert float(y[to // 20:-to // 20].abs().max()) < 1e-3


@pytest.mark.parametrize("backend", BOTH)
def test_a_file_at_another_rate(tmp_path: Path, backend: str) -> None:
    soundfile.write(tmp_path / "a.wav", sine(440, 44100).numpy() / 2, 44100, subtype="FLOAT")
    for to in (16000, 24000, 48000):
        sound = load(tmp_path / "a.wav", to, backend=backend)
        assert (sound.sample_rate, sound.source_rate, sound.seconds) == (to, 44100, 2.0)
        assert float((sound.samples - sine(440, to) / 2)[to // 20:-to // 20].abs().max()) < 1e-3


def test_resampling_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(tones()).T
    whole = resample(x, RATE, 16000)
    assert torch.equal(whole, torchaudio.functional.resample(x.contiguous(), RATE, 16000, lowpass_filter_width=64))
    monkeypatch.setattr(resampling, "PIECE", 1001)
    assert torch.allclose(resample(x, RATE, 16000), whole, atol=1e-6)


def test_rates_without_a_common_factor_are_refused_before_they_take_the_memory(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tones(4000), 44101)
    with pytest.raises(AudioError, match=r"a\.wav: from 44101 to 16000 Hz takes a filter of 7\d\d,.*share only the factor 1"):
        load(tmp_path / "a.wav")
    assert load(tmp_path / "a.wav", 44101).sample_rate == 44101


def test_processors_take_it(files: Shelf) -> None:
    extractor = WhisperFeatureExtractor()
    sound = load(files["a.m4a"], extractor.sampling_rate)
    check_rate(extractor, sound)
    out = extractor(sound.samples.numpy(), sampling_rate=sound.sample_rate, return_tensors="pt")
    assert out["input_features"].shape == (1, 80, 3000) and out["input_features"].isfinite().all()


# stretches ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "backend"), [(n, b) for n in WRITTEN for b in BOTH] + [(n, "pyav") for n in ENCODED])
def test_a_stretch_is_a_slice_of_the_whole(files: Shelf, name: str, backend: str) -> None:
    for to in (16000, files.rate(name)):
        whole = load(files[name], to, mono=False, backend=backend).samples
        for start, end in ((0.0, 0.01), (0.3, 0.7001), (1.37, 2.2), (2.5, None), (2.9, 99.0)):
            part = load(files[name], to, mono=False, start=start, end=end, backend=backend).samples
            want = whole[:, round(start * to):None if end is None else round(end * to)]
            assert part.shape == want.shape
            assert float((part - want).abs().max()) <= (1e-6 if name in LOSSLESS else 1e-4), (to, start, end)


@settings(max_examples=40, deadline=None)
@given(rates=st.sampled_from([(44100, 16000), (48000, 16000), (8000, 16000), (16000, 16000), (22050, 24000), (11025, 48000)]),
       n=st.integers(1, 3000), low=st.integers(0, 3000), length=st.integers(1, 3000))
def test_windows_hold_all_that_the_filter_sees(rates: tuple[int, int], n: int, low: int, length: int) -> None:
    x = torch.from_numpy(tones(n)).T.contiguous()
    whole, window = resample(x, *rates), Window(low, low + length, *rates)
    if low >= whole.shape[1]:
        return
    assert window.stop is not None and window.needed is not None and window.needed <= window.stop
    part = window.cut(resample(x[:, window.first:window.stop], *rates))
    assert part.shape == whole[:, low:low + length].shape
    assert torch.allclose(part, whole[:, low:low + length], atol=1e-6)


def test_a_stretch_is_all_that_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "long.mp4", rate=16000, channels=1, video="libx264", x=np.tile(tones(16000, 16000, 1), (120, 1)))
    decoded = 0
    real = PyAV._decoded

    def counted(self: PyAV) -> Iterator[Any]:
        nonlocal decoded
        for frame in real(self):
            decoded += frame.samples
            yield frame

    monkeypatch.setattr(PyAV, "_decoded", counted)
    assert load(path, start=100, end=101).seconds == 1
    assert decoded < 3 * 16000


MEMORY = """
import json, resource, sys
import mmcompress.audio.reading as reading
at_import = [m for m in ("av", "soundfile", "torchaudio") if m in sys.modules]
path, short = sys.argv[1:]
grown = []
for backend in ("soundfile", "pyav"):
    reading.load(short, start=1, end=2, backend=backend)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reading.load(path, start=500, end=501, backend=backend)
    grown.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
print(json.dumps([at_import, grown]))
"""


def test_memory_and_imports(tmp_path: Path) -> None:
    """Ten minutes of stereo are 202 MiB as float32. And nothing is imported before a file is opened."""
    for name, seconds in (("long.wav", 600), ("short.wav", 3)):
        soundfile.write(tmp_path / name, tones(1000), RATE)
        (tmp_path / name).write_bytes(patched(tmp_path / name, b"data", 4, 4 * seconds * RATE))
        os.truncate(tmp_path / name, 44 + 4 * seconds * RATE)           # silence from there on
    run = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "long.wav"), str(tmp_path / "short.wav")],
                         capture_output=True, text=True, check=True)
    imported, grown = json.loads(run.stdout)
    assert imported == []
    assert max(grown) < 20


# broken input ------------------------------------------------------------------------------------------------------------

def cut(path: Path, share: float) -> bytes:
    data = path.read_bytes()
    return data[:int(share * len(data))]


def wav(x: np.ndarray, tmp: Path, rate: int = 16000) -> bytes:
    soundfile.write(tmp / "made.wav", x, rate, subtype="FLOAT")
    return (tmp / "made.wav").read_bytes()


def patched(path: Path, mark: bytes, offset: int, value: int) -> bytes:
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(mark) + offset, value)
    return bytes(data)


def holed(path: Path, tmp: Path, start: float = 1, end: float = 2) -> bytes:
    """A Matroska file without its sound from `start` to `end`."""
    with av.open(str(path)) as file, av.open(str(tmp / "holed.mkv"), "w") as out:
        track = out.add_stream_from_template(file.streams.audio[0])
        for packet in file.demux(audio=0):
            if packet.dts is not None and not start <= packet.pts * packet.time_base < end:
                packet.stream = track
                out.mux(packet)
    return (tmp / "holed.mkv").read_bytes()


def faststart(files: Shelf, tmp: Path) -> bytes:
    with av.open(str(files["a.m4a"])) as file, av.open(str(tmp / "f.m4a"), "w", options={"movflags": "faststart"}) as out:
        track = out.add_stream_from_template(file.streams.audio[0])
        for packet in file.demux(audio=0):
            if packet.dts is not None:
                packet.stream = track
                out.mux(packet)
    return (tmp / "f.m4a").read_bytes()


def shot(value: float, channel: int) -> np.ndarray:
    x = np.zeros((16000, 2), np.float32)
    x[8000, channel] = value
    return x


# name -> (file name, its bytes, what the error says)
Maker = Callable[[Shelf, Path], bytes]
BROKEN: dict[str, tuple[str, Maker, str]] = {
    "empty": ("a.wav", lambda f, t: b"", r"is empty \(0 bytes\)"),
    "no samples": ("a.wav", lambda f, t: wav(np.zeros((0, 1)), t), "(has no samples|without a single sample)"),
    "text": ("a.wav", lambda f, t: b"this is no sound\n" * 50, "is (no sound|a picture or a text)"),
    "text as mp3": ("a.mp3", lambda f, t: b"this is no sound\n" * 50, "is (no sound|a picture or a text)"),
    "text as au": ("a.au", lambda f, t: b"this is no sound\n" * 50, "is (no sound|a picture or a text)"),
    "text as raw": ("a.raw", lambda f, t: b"this is no sound\n" * 50, "is (no sound|a picture or a text)"),
    "zeros": ("a.wav", lambda f, t: bytes(5000), "is no sound"),
    "random bytes": ("a.wav", lambda f, t: np.random.default_rng(0).bytes(5000), "is no sound"),
    "header only": ("a.wav", lambda f, t: f["s16.wav"].read_bytes()[:44], "cut off|no samples|single sample"),
    "half a header": ("a.wav", lambda f, t: f["s16.wav"].read_bytes()[:20], "is no sound|cut off|damaged"),
    "cut off wav": ("a.wav", lambda f, t: cut(f["s16.wav"], 0.6), r"at its end are missing\): only 1\.8 s .* pass end=1\.8$"),
    "one byte short": ("a.wav", lambda f, t: f["s16.wav"].read_bytes()[:-1], r"1 bytes .*only 3\.001 s"),
    "cut off rf64": ("a.wav", lambda f, t: cut(f["large.rf64"], 0.6), r"only 1\.8 s"),
    "cut off flac": ("a.flac", lambda f, t: cut(f["s16.flac"], 0.6), r"only 1\.\d+ s can be decoded; pass end=1\.\d"),
    "cut off ogg": ("a.ogg", lambda f, t: cut(f["a.ogg"], 0.9), r"last page is missing.*only \d\.\d+ s"),
    "cut off mp3": ("a.mp3", lambda f, t: cut(f["a.mp3"], 0.6), r"only [12]\.\d+ s can be decoded; pass end="),
    "cut off m4a": ("a.m4a", lambda f, t: cut(f["a.m4a"], 0.6), r"has no index \(moov\).*Get the whole file"),
    "cut off fast start": ("a.m4a", lambda f, t: (d := faststart(f, t))[:int(0.6 * len(d))], r"only 1\.\d+ s can be decoded"),
    "cut off mkv": ("a.mkv", lambda f, t: cut(f["a.mkv"], 0.8), r"only [12]\.\d+ s can be decoded; pass end="),
    "cut off webm": ("a.webm", lambda f, t: cut(f["a.webm"], 0.8), r"only [12]\.\d+ s can be decoded; pass end="),
    "hole": ("a.mkv", lambda f, t: holed(f["a.mkv"], t), r"timestamps jump from 1\.0\d+ to 2\.0\d+ s.*pass end=1\.0"),
    "damaged flac": ("a.flac", lambda f, t: (d := f["s16.flac"].read_bytes())[:100000] + bytes(3000) + d[103000:],
                     "only .* s can be decoded"),
    "video without sound": ("a.mp4", lambda f, t: encode(t / "v.mp4", video="libx264", sound=False).read_bytes(),
                            "has no audio track, only video"),
    "nan": ("a.wav", lambda f, t: wav(shot(math.nan, 1), t), r"sample 8000, at 0\.500 s, is nan"),
    "infinity": ("a.wav", lambda f, t: wav(shot(-math.inf, 0), t), r"sample 8000, at 0\.500 s, is -inf"),
    "64 bit integers": ("a.wav", lambda f, t: patched(f["s32.wav"], b"fmt ", 20, 16 | 64 << 16), r"\(s64\)|is no sound"),
    "rate 0": ("a.wav", lambda f, t: patched(f["s16.wav"], b"fmt ", 12, 0), "is no sound|rate"),
}
FOR_SOUNDFILE = {"a.m4a", "a.mkv", "a.webm", "a.mp4"}       # names that it does not read


@pytest.mark.parametrize("backend", ("auto", *BOTH))
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(files: Shelf, tmp_path: Path, name: str, backend: str) -> None:
    file, make, says = BROKEN[name]
    path = tmp_path / "it" / file
    path.parent.mkdir()
    path.write_bytes(make(files, tmp_path))
    with pytest.raises(AudioError) as caught:
        load(path, backend=backend)
    message = str(caught.value)
    assert str(path) in message
    if backend == "soundfile" and file in FOR_SOUNDFILE and "moov" not in says:
        assert "pass backend='pyav'" in message
    else:
        assert re.search(says, message), message


@pytest.mark.parametrize("name", [n for n in BROKEN if n.startswith("cut off") and n != "cut off m4a"])
def test_what_is_left_of_a_file_can_be_read(files: Shelf, tmp_path: Path, name: str) -> None:
    """The end that the error names works, also from a later start, and so does what is before the damage."""
    file, make, _ = BROKEN[name]
    (tmp_path / file).write_bytes(make(files, tmp_path))
    for backend in ("auto", "pyav"):
        with pytest.raises(AudioError, match="pass end=") as caught:
            load(tmp_path / file, backend=backend)
        end = float(str(caught.value).split("pass end=")[1])
        assert load(tmp_path / file, end=end, backend=backend).seconds == pytest.approx(end, abs=1e-3)
        assert load(tmp_path / file, start=0.5, end=end, backend=backend).seconds == pytest.approx(end - 0.5, abs=1e-3)
        with pytest.raises(AudioError, match="cut off"):
            load(tmp_path / file, end=end + 0.5, backend=backend)
        with pytest.raises(AudioError, match=r"nothing from start=2\.99"):
            load(tmp_path / file, start=2.99, backend=backend)


def test_a_hole_behind_the_start(files: Shelf, tmp_path: Path) -> None:
    (tmp_path / "a.mkv").write_bytes(holed(files["a.mkv"], tmp_path, 2.3, 2.6))
    with pytest.raises(AudioError, match=r"timestamps jump from 2\.3\d+ to 2\.6\d+ s.*pass end=2\.3") as caught:
        load(tmp_path / "a.mkv", start=1.6)
    end = float(str(caught.value).split("pass end=")[1])
    part, whole = load(tmp_path / "a.mkv", start=1.6, end=end), load(files["a.mkv"], start=1.6, end=end)
    assert torch.allclose(part.samples[:-300], whole.samples[:-300], atol=1e-4)     # the filter sees silence in the hole


def test_a_wav_that_does_not_know_its_length(files: Shelf, tmp_path: Path) -> None:
    """As one that is written to a pipe."""
    (tmp_path / "piped.wav").write_bytes(patched(files["s16.wav"], b"data", 4, 0xffffffff))
    for backend in BOTH:
        assert torch.equal(load(tmp_path / "piped.wav", backend=backend).samples, load(files["s16.wav"]).samples)


ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "rate 0": ({"sample_rate": 0}, "sample_rate=0: pass samples per second, an int above 0"),
    "negative rate": ({"sample_rate": -16000}, "sample_rate=-16000"),
    "fractional rate": ({"sample_rate": 16000.0}, r"sample_rate=16000\.0"),
    "rate None": ({"sample_rate": None}, "sample_rate=None"),
    "rate True": ({"sample_rate": True}, "sample_rate=True"),
    "text rate": ({"sample_rate": "16k"}, "sample_rate='16k'"),
    "start beyond": ({"start": 4.0}, r"start=4\.0: .* lasts 3\.00\d s; pass less than that"),
    "window beyond": ({"start": 400.0, "end": 401}, r"start=400\.0: .* lasts 3\.0\d+ s"),
    "start is end": ({"start": 2, "end": 2}, "start=2 is not before end=2"),
    "start after end": ({"start": 3, "end": 2}, "start=3 is not before end=2"),
    "less than a sample": ({"start": 1, "end": 1.00001}, "less than a sample apart at 16000 Hz"),
    "negative start": ({"start": -0.1}, r"start=-0\.1: pass seconds, 0 or more"),
    "end 0": ({"end": 0}, "end=0: pass seconds above 0"),
    "nan start": ({"start": math.nan}, "start=nan"),
    "infinite end": ({"end": math.inf}, "end=inf"),
    "text start": ({"start": "0:01"}, "start='0:01'"),
    "unknown backend": ({"backend": "torchaudio"}, "backend='torchaudio': known are auto, soundfile, pyav"),
}


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", ASKED)
def test_wrong_questions(files: Shelf, name: str, backend: str) -> None:
    ask, says = ASKED[name]
    with pytest.raises(AudioError, match=says):
        load(files["s16.wav"], **{"backend": backend, **ask})


def test_start_beyond_a_video(files: Shelf) -> None:
    with pytest.raises(AudioError, match=r"start=50\.0: .* lasts 3\.0\d+ s"):
        load(files["a.mkv"], start=50)


def test_wrong_paths(files: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "dangling.wav").symlink_to(tmp_path / "gone.wav")
    wrong: list[tuple[Any, str]] = [
        (tmp_path / "none.wav", "does not exist"), (tmp_path, "is a directory"), (tmp_path / "pipe.wav", "not a file"),
        (tmp_path / "dangling.wav", "does not exist"), (None, "path=None"), (b"a.wav", r"path=b'a\.wav'"),
        (np.zeros(16000), r"as_sound\(samples, sample_rate\)"), ("https://x.org/a.wav", "download it"),
        ("a\0.wav", "path=|does not exist")]
    for path, says in wrong:
        with pytest.raises(AudioError, match=says):
            load(path)

    def refuse(self: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)                           # chmod would not stop root
    with pytest.raises(AudioError, match="cannot be opened: Permission denied"):
        load(files["s16.wav"])


# samples in memory -------------------------------------------------------------------------------------------------------

def test_integers_are_scaled() -> None:
    ints = np.array([-32768, -1, 0, 16384, 32767], np.int16)
    for x in (ints, torch.from_numpy(ints), ints.astype(np.int32) * 65536):
        assert as_sound(x, 8000, 8000).samples.tolist() == [v / 32768 for v in ints.tolist()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floats_are_taken_as_they_are(dtype: torch.dtype) -> None:
    x = torch.tensor([0.5, -1.25, 0.0], dtype=dtype, requires_grad=True)
    sound = as_sound(x, 8000, 8000)
    assert (sound.samples.tolist(), sound.samples.dtype) == ([0.5, -1.25, 0.0], torch.float32)
    assert not sound.samples.requires_grad


def test_channels_first_or_last() -> None:
    x = torch.from_numpy(tones(1000))                                   # (T, 2)
    for given_ in (x, x.T, x.numpy(), x.T.numpy()[:, ::1]):
        assert torch.equal(as_sound(given_, RATE, RATE, mono=False).samples, x.T)
        assert torch.allclose(as_sound(given_, RATE, RATE).samples, x.mean(1))
    sound = as_sound(x, RATE)
    assert (sound.sample_rate, sound.source_rate, sound.source_channels) == (16000, RATE, 2)
    assert torch.allclose(sound.samples, resample(x.mean(1), RATE, 16000))


def test_a_sound_knows_its_rate(files: Shelf) -> None:
    native = load(files["s16.wav"], RATE)
    sound = as_sound(native)
    assert torch.equal(sound.samples, load(files["s16.wav"]).samples)
    assert (sound.sample_rate, sound.source_rate, sound.source_channels) == (16000, RATE, 2)
    with pytest.raises(AudioError, match="this Sound is at 44100 Hz"):
        as_sound(native, 16000)


def test_the_result_is_not_the_callers_memory() -> None:
    x = np.zeros((2, 100), np.float32)
    for mono in (True, False):
        as_sound(x, 8000, 8000, mono).samples.fill_(1)
    assert not x.any()


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no rate": (np.zeros(100), {}, r"unknown rate: pass sample_rate=.*mmcompress\.audio\.load"),
    "rate 0": (np.zeros(100), {"sample_rate": 0}, "sample_rate=0"),
    "to 0": (np.zeros(100), {"sample_rate": 8000, "to": 0}, "to=0"),
    "square": (np.zeros((8, 8)), {"sample_rate": 8000}, r"shape \(8, 8\): which side"),
    "large square": (np.zeros((100, 100)), {"sample_rate": 8000}, "which side"),
    "batch": (np.zeros((1, 2, 100)), {"sample_rate": 8000}, r"shape \(1, 2, 100\)"),
    "number": (np.float32(0), {"sample_rate": 8000}, r"shape \(\)"),
    "empty": (np.zeros(0), {"sample_rate": 8000}, "not empty"),
    "uint8": (np.zeros(100, np.uint8), {"sample_rate": 8000}, r"torch\.uint8: pass int16"),
    "int64": ([1, 2, 3], {"sample_rate": 8000}, r"torch\.int64"),
    "bool": (np.zeros(100, bool), {"sample_rate": 8000}, r"torch\.bool"),
    "complex": (np.zeros(100, complex), {"sample_rate": 8000}, r"torch\.complex128"),
    "path": ("a.wav", {"sample_rate": 8000}, r"mmcompress\.audio\.load reads files"),
    "row": ({"array": [0.0]}, {"sample_rate": 8000}, "pass a tensor or an array"),
    "None": (None, {"sample_rate": 8000}, "samples=None"),
    "ragged": ([[0.0], [0.0, 1.0]], {"sample_rate": 8000}, "samples of type list"),
    "objects": (np.array([object()] * 9), {"sample_rate": 8000}, "samples of type ndarray"),
    "unscaled": (np.arange(1000.0), {"sample_rate": 8000}, "reach 999; full scale is 1: divide by 32768"),
    "nan": (np.array([0, 0, math.nan]), {"sample_rate": 8000}, r"sample 2, at 0\.000 s, is nan"),
    "infinity": (np.array([math.inf, 0]), {"sample_rate": 8000}, "sample 0, .* is inf"),
    "no common factor": (np.zeros(100), {"sample_rate": 44101}, "samples: from 44101 to 16000 Hz"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_samples(name: str) -> None:
    samples, ask, says = WRONG[name]
    with pytest.raises(AudioError, match=says):
        as_sound(samples, **ask)


def test_check_rate() -> None:
    sound = Sound(torch.zeros(8), 16000, 44100, 1)
    extractor = SimpleNamespace(sampling_rate=16000)
    for right in (16000, extractor, SimpleNamespace(feature_extractor=extractor)):
        check_rate(right, sound)
    with pytest.raises(AudioError, match="at 16000 Hz and 24000 Hz are expected: load it with sample_rate=24000"):
        check_rate(SimpleNamespace(sampling_rate=24000), sound)
    with pytest.raises(AudioError, match="SimpleNamespace names no sampling_rate"):
        check_rate(SimpleNamespace(), sound)


# who reads ---------------------------------------------------------------------------------------------------------------

@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """without("av"): as if that package were not installed."""
    def remove(*names: str) -> None:
        real = importlib.import_module

        def import_module(name: str, package: str | None = None) -> Any:
            if name in names:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return real(name, package)

        monkeypatch.setattr(importlib, "import_module", import_module)

    return remove


def test_declared_order(files: Shelf, without: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Seen(PyAV):
        def __init__(self, path: Path, av: Any):
            opened.append(path.name)
            super().__init__(path, av)

    monkeypatch.setitem(reading.BACKENDS, "pyav", ("av", Seen))
    for name in ("s16.wav", "a.mp3", "a.m4a"):
        load(files[name], end=0.1)
    assert opened == ["a.m4a"]
    without("soundfile")
    load(files["s16.wav"], end=0.1)
    assert opened == ["a.m4a", "s16.wav"]
    with pytest.raises(ImportError, match=r"needs soundfile: pip install 'mmcompress\[audio\]'"):
        load(files["s16.wav"], backend="soundfile")


def test_without_pyav(files: Shelf, without: Callable[..., None]) -> None:
    without("av")
    load(files["a.mp3"], end=0.1)
    with pytest.raises(AudioError, match="PyAV may read it: pip install av"):
        load(files["a.m4a"])


def test_without_both(files: Shelf, without: Callable[..., None]) -> None:
    without("av", "soundfile")
    with pytest.raises(ImportError, match=r"needs soundfile or av: pip install 'mmcompress\[audio\]'"):
        load(files["s16.wav"])


def test_without_torchaudio(files: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    assert load(files["s16.wav"], RATE, end=0.1).sample_rate == RATE
    with pytest.raises(ImportError, match=r"from 44100 to 16000 Hz needs torchaudio: pip install 'mmcompress\[audio\]'"):
        load(files["s16.wav"])


def test_a_torchaudio_for_another_torch(files: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "torchaudio":
                raise OSError("libcudart.so.13: cannot open shared object file")

    for name in [m for m in sys.modules if m.split(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"does not load beside torch .*libcudart\.so\.13"):
        load(files["s16.wav"])
