"""Reading video files: the right frames at the right times, the same from both backends, and a named error for all else."""

from __future__ import annotations

import importlib
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2VLVideoProcessor
from transformers.video_utils import VideoMetadata

from mmcompress.errors import VideoError
from mmcompress.video import reading
from mmcompress.video.reading import pick, read

BOTH = ("decord", "pyav")
W, H, N, RATE = 128, 72, 40, 10                 # pixels, frames, frames per second of the clips here


# clips -------------------------------------------------------------------------------------------------------------------

def picture(i: int, width: int = W, height: int = H) -> np.ndarray:
    """Frame `i`: its number as eight black or white bars in the upper half, colours below."""
    y, x = np.mgrid[:height, :width]
    colours = np.stack([x * 255 / width, y * 255 / height, np.full_like(x, i * 6 % 256)], -1)
    bars = 255 * (i >> (x * 8 // width) & 1)
    return np.where((y < height // 2)[..., None], bars[..., None], colours).astype(np.uint8)


def number(frame: np.ndarray) -> int:
    """The number that `picture` wrote into a frame."""
    bars = frame[:frame.shape[0] // 2].mean(axis=(0, 2))
    eighth = len(bars) / 8
    return sum((bars[round(eighth * (j + 0.3)):round(eighth * (j + 0.7))].mean() > 128) << j for j in range(8))


def encode(path: Path, n: int = N, width: int = W, height: int = H, codec: str = "libx264", pix_fmt: str = "yuv420p",
           pts: Sequence[int] | None = None, gop: int = 12, b_frames: int = 2, options: dict[str, str] | None = None,
           tags: dict[str, int] | None = None, container: dict[str, str] | None = None, rotation: int = 0,
           audio: bool = False, flat: bool = False) -> Path:
    """A clip of numbered frames; `pts` in milliseconds, or RATE frames per second."""
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=RATE, options={"bf": str(b_frames), **(options or {})})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        base = Fraction(1, 1000 if pts else RATE)
        stream.codec_context.time_base = base
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if rotation:
            stream.set_display_rotation(rotation)
        sound = out.add_stream("aac", rate=16000) if audio else None
        still = picture(0, width, height)
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(still if flat else picture(i, width, height), format="rgb24")
            frame.pts, frame.time_base = (pts[i] if pts else i), base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound is not None:
            add_sound(out, sound)
    return path


def add_sound(out: Any, stream: Any) -> None:
    for i in range(30):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 1024 * i
        out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


VFR = np.cumsum(np.random.default_rng(0).integers(20, 300, N)).tolist()
X265 = "log-level=none:pools=none:frame-threads=1:keyint=12:"
CLIPS: dict[str, tuple[str, dict[str, Any]]] = {            # name -> (file name, how it is encoded)
    "plain": ("plain.mp4", {}),
    "audio": ("audio.mp4", {"audio": True}),
    "one group": ("one.mp4", {"gop": 250}),
    "no B-frames": ("nob.mp4", {"b_frames": 0}),
    "fast start": ("fast.mp4", {"container": {"movflags": "faststart"}}),
    "mov": ("clip.mov", {}),
    "variable rate": ("vfr.mp4", {"pts": VFR}),
    "late start": ("late.mp4", {"pts": [5000 + 100 * i for i in range(N)]}),
    "odd size": ("odd.mp4", {"width": 131, "height": 77, "pix_fmt": "yuv444p"}),
    "narrow": ("narrow.mp4", {"width": 96, "height": 64}),
    "narrow 144": ("narrow2.mp4", {"width": 144, "height": 176}),
    "10 bit": ("ten.mp4", {"pix_fmt": "yuv420p10le"}),
    "BT.709": ("bt709.mp4", {"tags": {"colorspace": 1, "color_primaries": 1, "color_trc": 1}}),
    "full range": ("full.mp4", {"tags": {"color_range": 2}}),
    "turned 90": ("r90.mp4", {"rotation": 90}),
    "turned 180": ("r180.mp4", {"rotation": 180}),
    "turned 270": ("r270.mp4", {"rotation": 270}),
    "HEVC": ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": X265 + "open-gop=0"}}),
    "VP9 in mp4": ("vp9.mp4", {"codec": "libvpx-vp9", "b_frames": 0, "options": {"cpu-used": "8", "deadline": "realtime"}}),
    "open groups": ("open.mp4", {"options": {"x264-params": "open-gop=1:scenecut=0:b-adapt=0"}}),
    "HEVC, open": ("hevco.mp4", {"codec": "libx265", "options": {"x265-params": X265 + "open-gop=1:scenecut=0:bframes=4"}}),
    "fragments": ("frag.mp4", {"container": {"movflags": "frag_keyframe+empty_moov"}}),
    "mkv": ("clip.mkv", {"pts": [5000 + 100 * i for i in range(N)]}),
    "mkv, sound": ("sound.mkv", {"audio": True}),
    "webm": ("clip.webm", {"codec": "libvpx-vp9", "b_frames": 0, "options": {"cpu-used": "8", "deadline": "realtime"}}),
    "ts": ("clip.ts", {}),
    "avi": ("clip.avi", {"codec": "mpeg4", "b_frames": 0}),
    "mjpeg": ("mjpeg.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p", "b_frames": 0}),
}
PYAV_ONLY = ("HEVC", "open groups", "HEVC, open", "fragments", "mkv", "mkv, sound", "webm", "ts", "avi", "mjpeg",
             "trimmed", "mirrored")
NAMES = (*CLIPS, "trimmed", "mirrored")


class Shelf:
    """Clips by name, encoded when they are first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __getitem__(self, name: str) -> Path:
        if name in ("trimmed", "mirrored"):
            path = self.folder / f"{name}.mp4"
            if not path.exists():
                path.write_bytes(trimmed(self["plain"]) if name == "trimmed" else mirrored(self["plain"]))
            return path
        file, how = CLIPS[name]
        path = self.folder / file
        return path if path.exists() else encode(path, **how)

    def seconds(self, name: str) -> np.ndarray:
        """When each of its frames appears, as encoded."""
        pts = CLIPS.get(name, ("", {}))[1].get("pts")
        if pts:
            return (np.array(pts) - pts[0]) / 1000
        return np.arange(N - 15 if name == "trimmed" else N) / RATE


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("clips"))


def trimmed(path: Path) -> bytes:
    """The same file with an edit list that starts at 1.5 s, within a group of pictures."""
    data = bytearray(path.read_bytes())
    at, scale = data.index(b"elst") + 12, struct.unpack_from(">I", data, data.index(b"mdhd") + 16)[0]
    length, media = struct.unpack_from(">Ii", data, at)
    struct.pack_into(">Ii", data, at, length - 1500, media + scale * 3 // 2)
    return bytes(data)


def mirrored(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    struct.pack_into(">i", data, data.index(b"tkhd") + 44, -1 << 16)
    return bytes(data)


# the right frames at the right times -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_known_frames_at_known_times(clips: Shelf, name: str) -> None:
    times, first = clips.seconds(name), 15 if name == "trimmed" else 0
    for ask in ({"frames": 11}, {"frames": 1000}, {"fps": 2.5, "start": 0.9, "end": 3.15}):
        clip = read(clips[name], **ask)
        positions = np.searchsorted(times, clip.timestamps - 1e-4)
        assert np.allclose(times[positions], clip.timestamps, atol=1e-4)
        upright = clip.frames
        if name.startswith("turned"):                               # the rotation is counted counterclockwise
            upright = np.rot90(upright, -int(name[7:]) // 90, axes=(1, 2))
        upright = upright[:, :, ::-1] if name == "mirrored" else upright
        assert [number(f) for f in upright] == [first + p for p in positions]
        assert (clip.frames.dtype, clip.timestamps.dtype, clip.frames.shape[3]) == (np.uint8, np.float64, 3)
        assert clip.backend == ("pyav" if name in PYAV_ONLY else "decord")
    assert clip.duration == pytest.approx(times[-1] + 0.1, abs=0.21 if name == "variable rate" else 1e-3)
    assert clip.fps == pytest.approx(len(times) / clip.duration)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in PYAV_ONLY])
def test_both_backends_give_the_same_bytes(clips: Shelf, name: str) -> None:
    for ask in ({"frames": 9}, {"fps": 3, "start": 1}, {"frames": 3, "size": 40}, {"frames": 2, "size": (51, 93)}):
        a, b = (read(clips[name], backend=backend, **ask) for backend in BOTH)
        assert (a.backend, b.backend) == BOTH
        assert a.frames.shape == b.frames.shape
        assert np.abs(a.frames.astype(int) - b.frames).max() <= 2
        assert np.allclose(a.timestamps, b.timestamps, atol=1e-6)
        assert (a.total, a.start) == (b.total, b.start)
        assert a.fps == pytest.approx(b.fps)
        assert a.end == pytest.approx(b.end)


@pytest.mark.parametrize("name", PYAV_ONLY)
def test_decord_refuses_what_it_misreads(clips: Shelf, name: str) -> None:
    with pytest.raises(VideoError, match="backend='pyav'"):
        read(clips[name], backend="decord")


def test_pictures_are_what_was_encoded(clips: Shelf) -> None:
    """Colours, not only their order: within what 4:4:4 at quality 23 loses."""
    clip = read(clips["odd size"], frames=5)
    for at, frame in zip(clip.timestamps, clip.frames):
        assert np.abs(frame[40:].astype(int) - picture(round(at * RATE), 131, 77)[40:]).mean() < 4


@pytest.mark.parametrize("backend", BOTH)
def test_tagged_colours_are_converted_by_their_matrix(tmp_path: Path, backend: str) -> None:
    """Pure red in BT.709 is (63, 102, 240) in limited range; read by BT.601's matrix it would not come back as red."""
    path = tmp_path / "red.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1
        for i in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((3, 64, 64), [[[63]], [[102]], [[240]]], np.uint8), format="yuv444p")
            frame.pts, frame.time_base, frame.colorspace, frame.color_range = i, Fraction(1, RATE), 1, 1
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert np.abs(read(path, backend=backend).frames.astype(int) - [255, 0, 0]).max() <= 3


# frames, fps, start, end -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", BOTH)
def test_semantics(clips: Shelf, backend: str) -> None:
    def times(**ask: Any) -> list[float]:
        return [round(float(t), 4) for t in read(clips["plain"], backend=backend, **ask).timestamps]

    assert times(frames=4) == [0, 1.3, 2.6, 3.9]                       # both ends
    assert times(frames=1) == [2.0]                                     # the middle
    assert times() == times(frames=32)                                  # the default
    assert times(frames=N + 5) == times(frames=N) == [i / 10 for i in range(N)]      # no frame twice
    assert times(fps=1) == [0, 1, 2, 3]
    assert times(fps=4, end=1) == [0, 0.2, 0.5, 0.7]                   # what is on the screen at 0.25 appeared at 0.2
    assert times(fps=1000, start=3.7) == [3.7, 3.8, 3.9]
    assert times(fps=0.01) == [0]
    assert times(start=1, end=1.3, frames=9) == [1.0, 1.1, 1.2]        # `end` is outside
    assert times(start=1.01, end=1.3, frames=9) == [1.1, 1.2]
    assert times(start=3.5, end=99, frames=2) == [3.5, 3.9]            # an end beyond the end
    clip = read(clips["plain"], start=1, end=3, frames=5, backend=backend)
    assert (clip.start, clip.end, clip.total, clip.path) == (1, 3, 20, clips["plain"].absolute())


@given(n=st.integers(1, 300), frames=st.integers(1, 400), seed=st.integers(0, 9))
def test_counts_are_exact_and_even(n: int, frames: int, seed: int) -> None:
    seconds = np.cumsum(np.random.default_rng(seed).uniform(0.01, 1, n))
    at = pick(seconds, 0, n, frames, None, 0.0, seconds[-1])
    assert len(at) == min(n, frames)
    steps = np.diff(at)
    assert at.min() >= 0 and at.max() < n
    if len(at) > 1:
        assert (at[0], at[-1]) == (0, n - 1) and steps.min() >= 1 and np.ptp(steps) <= 1


@given(n=st.integers(1, 30), fps=st.floats(0.01, 40), seed=st.integers(0, 9), start=st.floats(0, 2), tail=st.floats(0.001, 2))
def test_fps_shows_what_is_on_the_screen(n: int, fps: float, seed: int, start: float, tail: float) -> None:
    seconds = np.cumsum(np.random.default_rng(seed).uniform(0.01, 1, n)) - 0.01
    low = int(np.searchsorted(seconds, start - 5e-4))
    if low == n:
        return
    until = seconds[-1] + tail
    at = pick(seconds, low, n, None, fps, start, until)
    naive, i = {low}, 0
    while (t := start + i / fps) < until - 5e-4:                        # independently: walk over the times
        naive.add(max([k for k in range(low, n) if seconds[k] <= t + 5e-4], default=low))
        i += 1
    assert at.tolist() == sorted(naive)


def test_metadata_is_what_processors_take(clips: Shelf) -> None:
    for name in ("plain", "variable rate", "late start"):
        clip = read(clips[name], frames=8, start=0.5, end=3)
        meta = VideoMetadata(**clip.metadata())
        assert np.allclose(meta.timestamps, clip.timestamps, atol=1e-3)
        assert meta.sampled_fps == pytest.approx(8 / clip.total * clip.fps)
        assert all(isinstance(i, int) for i in meta.frames_indices) == (name != "variable rate")
    processor = Qwen2VLVideoProcessor()
    out = processor(videos=[clip.frames], video_metadata=[clip.metadata()], do_sample_frames=False, return_metadata=True,
                    return_tensors="pt")
    assert out["video_grid_thw"][0, 0] == 4
    assert np.allclose(out["video_metadata"][0].timestamps, clip.timestamps, atol=1e-3)


# broken input ------------------------------------------------------------------------------------------------------------

def smashed(path: Path, *which: int, how: str) -> bytes:
    """The file with these packets (in the order of decoding) zeroed or random."""
    with av.open(str(path)) as file:
        packets = [(p.pos, p.size) for p in file.demux(video=0) if p.size]
    data, rng = bytearray(path.read_bytes()), np.random.default_rng(0)
    for at, size in (packets[k] for k in which):
        data[at:at + size] = bytes(size) if how == "zero" else rng.bytes(size)
    return bytes(data)


def audio_only(path: Path, **how: Any) -> Path:
    with av.open(str(path), "w") as out:
        add_sound(out, out.add_stream("aac", rate=16000))
    return path


def no_frames(clips: Shelf) -> bytes:
    """A video track whose sample table is empty."""
    data = bytearray(clips["no B-frames"].read_bytes())
    for box in (b"stts", b"stsc", b"stco", b"stss", b"ctts"):
        if box in data:
            struct.pack_into(">I", data, data.index(box) + 8, 0)
    struct.pack_into(">I", data, data.index(b"stsz") + 12, 0)
    return bytes(data)


def scrambled_index(clips: Shelf) -> bytes:
    data = bytearray(clips["plain"].read_bytes())
    struct.pack_into(">I", data, data.index(b"stts") + 12, 1 << 31)
    return bytes(data)


def image(tmp: Path, kind: str) -> bytes:
    Image.fromarray(picture(1)).save(tmp / f"x.{kind}")
    return (tmp / f"x.{kind}").read_bytes()


def cut(path: Path, share: float) -> bytes:
    data = path.read_bytes()
    return data[:int(share * len(data))]


# name -> (file name, its bytes or None, arguments, what the error says under PyAV)
Maker = Callable[[Shelf, Path], bytes]
FILES: dict[str, tuple[str, Maker, dict[str, Any], str]] = {
    "empty": ("a.mp4", lambda c, t: b"", {}, "is empty"),
    "text": ("a.mp4", lambda c, t: b"this is no video\n" * 50, {}, "not a video|no video"),
    "text as text": ("a.txt", lambda c, t: b"this is no video\n" * 50, {}, "text|not a video"),
    "zeros": ("a.mp4", lambda c, t: bytes(5000), {}, "not a video"),
    "random bytes": ("a.mp4", lambda c, t: np.random.default_rng(0).bytes(5000), {}, "not a video"),
    "png": ("a.mp4", lambda c, t: image(t, "png"), {}, "picture"),
    "jpeg": ("a.jpg", lambda c, t: image(t, "jpeg"), {}, "picture"),
    "index missing": ("a.mp4", lambda c, t: cut(c["plain"], 0.6), {}, "no index.*Get the whole file"),
    "only the header": ("a.mp4", lambda c, t: c["plain"].read_bytes()[:32], {}, "no index"),
    "half a header": ("a.mp4", lambda c, t: c["plain"].read_bytes()[:12], {}, "no index|not a video"),
    "cut off": ("a.mp4", lambda c, t: cut(c["fast start"], 0.7), {}, r"only [\d.]+ of 4.000 s can be decoded; pass end="),
    "one byte short": ("a.mp4", lambda c, t: c["fast start"].read_bytes()[:-1], {}, r"of 4.000 s can be decoded; pass end="),
    "cut off, later": ("a.mp4", lambda c, t: cut(c["fast start"], 0.6), {"start": 3.9}, "nothing from start=3.9"),
    "cut in the index": ("a.mp4", lambda c, t: c["fast start"].read_bytes()[:400], {}, "no index"),
    "cut off mkv": ("a.mkv", lambda c, t: cut(c["mkv"], 0.6), {}, r"of 4.000 s can be decoded"),
    "cut off webm": ("a.webm", lambda c, t: cut(c["webm"], 0.6), {}, r"of 4.000 s can be decoded"),
    "cut off avi": ("a.avi", lambda c, t: cut(c["avi"], 0.6), {}, "is cut off"),
    "sound only": ("a.mp4", lambda c, t: audio_only(t / "s.mp4").read_bytes(), {}, "no video (stream|track)"),
    "track of no frames": ("a.mp4", lambda c, t: no_frames(c), {}, "without a single frame"),
    "scrambled index": ("a.mp4", lambda c, t: scrambled_index(c), {}, "its index counts"),
    "packet zeroed": ("a.mp4", lambda c, t: smashed(c["plain"], 20, how="zero"), {"frames": N}, "is damaged: its frame"),
    "packets random": ("a.mp4", lambda c, t: smashed(c["plain"], 14, 15, 25, how="random"), {"frames": N}, r"pass end=1\.[12]"),
    "key packet zeroed": ("a.mp4", lambda c, t: smashed(c["one group"], 0, how="zero"), {"frames": 3}, "no keyframe before it"),
    "packet of mkv": ("a.mkv", lambda c, t: smashed(c["mkv"], 20, how="random"), {"frames": N},
                      r"no frame from 2.\d+ to 3.600 s is left; pass end=2.\d+ or start=3.600"),
}


@pytest.mark.parametrize("backend", ("auto", *BOTH))
@pytest.mark.parametrize("name", FILES)
def test_broken_files(clips: Shelf, tmp_path: Path, name: str, backend: str) -> None:
    file, make, ask, says = FILES[name]
    (tmp_path / file).write_bytes(make(clips, tmp_path))
    with pytest.raises(VideoError) as caught:
        read(tmp_path / file, backend=backend, **ask)
    message = str(caught.value)
    assert str(tmp_path / file) in message
    if backend != "decord":                                             # what decord does not vouch for is PyAV's to explain
        assert re.search(says, message), message


ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "start beyond": ({"start": 4.0}, "lasts 4.000 s"),
    "start is end": ({"start": 2, "end": 2}, "start=2 is not before end=2"),
    "start after end": ({"start": 3, "end": 2}, "start=3 is not before end=2"),
    "negative start": ({"start": -0.1}, "start=-0.1"),
    "negative end": ({"end": -1}, "end=-1"),
    "nan start": ({"start": float("nan")}, "start=nan"),
    "text start": ({"start": "0:01"}, "start='0:01'"),
    "between frames": ({"start": 1.01, "end": 1.05}, "the one before is of 1.000 s"),
    "frames=0": ({"frames": 0}, "frames=0"),
    "frames=-3": ({"frames": -3}, "frames=-3"),
    "frames=True": ({"frames": True}, "frames=True"),
    "frames=8.0": ({"frames": 8.0}, "frames=8.0"),
    "frames='8'": ({"frames": "8"}, "frames='8'"),
    "fps=0": ({"fps": 0}, "fps=0"),
    "fps=-1": ({"fps": -1}, "fps=-1"),
    "fps nan": ({"fps": float("nan")}, "fps=nan"),
    "fps inf": ({"fps": float("inf")}, "fps=inf"),
    "fps=True": ({"fps": True}, "fps=True"),
    "both": ({"frames": 8, "fps": 1}, "pass one of them"),
    "size=0": ({"size": 0}, "size=0"),
    "size of three": ({"size": (1, 2, 3)}, "size="),
    "unknown backend": ({"backend": "opencv"}, "known are auto, decord, pyav"),
}


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", ASKED)
def test_wrong_questions(clips: Shelf, name: str, backend: str) -> None:
    ask, says = ASKED[name]
    with pytest.raises(VideoError, match=says):
        read(clips["plain"], **{"backend": backend, **ask})


@pytest.mark.parametrize("backend", BOTH)
def test_wrong_paths(clips: Shelf, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "gone.mp4")
    wrong: list[tuple[Any, str]] = [
        (tmp_path / "none.mp4", "does not exist"), (tmp_path, "is a directory"), (tmp_path / "pipe.mp4", "not a file"),
        (tmp_path / "dangling.mp4", "does not exist"), (None, "path=None"), (7, "int is none"), (b"a.mp4", "bytes is none"),
        (np.zeros((2, 4, 4, 3)), "ndarray is none"), ("https://x.org/a.mp4", "download it"),
        ("a\0.mp4", "path=|does not exist")]
    for path, says in wrong:
        with pytest.raises(VideoError, match=says):
            read(path, backend=backend)

    def refuse(self: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)                           # chmod would not stop root
    with pytest.raises(VideoError, match="cannot be opened: Permission denied"):
        read(clips["plain"], backend=backend)


def test_what_is_left_of_a_file_can_be_read(clips: Shelf, tmp_path: Path) -> None:
    """The end that the error names works, and gives whole frames in an unbroken row."""
    path = tmp_path / "cut.mp4"
    path.write_bytes(cut(clips["fast start"], 0.7))
    with pytest.raises(VideoError, match="pass end=") as caught:
        read(path)
    end = float(str(caught.value).split("pass end=")[1])
    clip = read(path, end=end, frames=N)
    assert [number(f) for f in clip.frames] == list(range(len(clip.frames)))
    assert len(clip.frames) == round(end * RATE) > 15
    path.write_bytes(smashed(clips["plain"], 30, how="zero"))
    with pytest.raises(VideoError, match="pass end=") as caught:
        read(path, frames=N, backend="pyav")
    end = float(str(caught.value).split("pass end=")[1].split(",")[0])
    for backend in ("auto", "pyav"):
        assert [number(f) for f in read(path, frames=5, start=0, end=1, backend=backend).frames] == [0, 2, 5, 7, 9]
    try:                                                            # decord decodes ahead: on a busy machine into the damage
        assert [number(f) for f in read(path, frames=5, start=0, end=1, backend="decord").frames] == [0, 2, 5, 7, 9]
    except VideoError as e:
        assert "cannot be decoded" in str(e)
    assert read(path, frames=4, end=end, backend="pyav").timestamps[-1] < end


def test_pyav_refuses_what_the_decoder_patched_over(clips: Shelf, tmp_path: Path) -> None:
    """One flipped byte a file: the picture decodes, mostly wrong, and the decoder says so of most."""
    path, refused, wrong = tmp_path / "flipped.mp4", 0, 0
    whole = read(clips["plain"], frames=N).frames.astype(int)
    with av.open(str(clips["plain"])) as file:
        middles = [p.pos + p.size // 2 for p in file.demux(video=0) if p.size]
    for at in middles:
        data = bytearray(clips["plain"].read_bytes())
        data[at] ^= 0xff
        path.write_bytes(data)
        try:
            wrong += int(np.abs(read(path, frames=N, backend="pyav").frames - whole).max() > 2)
        except VideoError:
            refused += 1
    assert refused >= N * 3 // 4
    assert wrong <= N // 8


def test_damage_elsewhere_does_not_matter(clips: Shelf, tmp_path: Path) -> None:
    path = tmp_path / "holed.mp4"
    path.write_bytes(smashed(clips["no B-frames"], 2, how="zero"))
    assert [number(f) for f in read(path, start=3, frames=4, backend="pyav").frames] == [30, 33, 36, 39]


# who reads ---------------------------------------------------------------------------------------------------------------

@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """without("av"): as if that package were not installed."""
    def remove(*names: str) -> None:
        real = importlib.import_module

        def import_module(name: str, package: str | None = None) -> Any:
            if name in names:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return real(name, package)

        monkeypatch.setattr(reading.importlib, "import_module", import_module)

    yield remove


def test_declared_order(clips: Shelf, without: Callable[..., None]) -> None:
    assert read(clips["plain"], frames=2).backend == "decord"
    without("decord")
    assert read(clips["plain"], frames=2).backend == "pyav"
    with pytest.raises(ImportError, match=r"decord2.*mmcompress\[video\]"):
        read(clips["plain"], backend="decord")


def test_without_pyav(clips: Shelf, without: Callable[..., None]) -> None:
    without("av")
    assert read(clips["plain"], frames=2).backend == "decord"
    with pytest.raises(VideoError, match="pip install av"):
        read(clips["mkv"])
    with pytest.raises(ImportError, match=r"mmcompress\[video\]"):
        read(clips["plain"], backend="pyav")


def test_without_both(clips: Shelf, without: Callable[..., None]) -> None:
    without("av", "decord")
    with pytest.raises(ImportError, match=r"pip install 'mmcompress\[video\]'"):
        read(clips["plain"])


def test_a_broken_installation_is_not_taken_for_none(clips: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'numpy.core'", name="numpy.core")

    monkeypatch.setattr(reading.importlib, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError, match=r"numpy\.core"):
        read(clips["plain"])


def test_importing_needs_neither() -> None:
    code = "import sys, mmcompress.video.reading; print([m for m in ('av', 'decord') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# memory ------------------------------------------------------------------------------------------------------------------

PEAK = """
import json, resource, sys
from mmcompress.video.reading import read
path, short, backend = sys.argv[1:]
read(short, frames=8, backend=backend)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clip = read(path, frames=8, backend=backend)
print(json.dumps([clip.duration, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""


@pytest.mark.parametrize("backend", BOTH)
def test_memory_does_not_grow_with_the_file(clips: Shelf, tmp_path_factory: pytest.TempPathFactory, backend: str) -> None:
    """4,000 frames of 256 x 144 are 422 MiB; eight of them, and a short clip of the same size before, are 1."""
    folder = tmp_path_factory.getbasetemp()
    paths = [folder / "long.mp4", folder / "short.mp4"]
    for path, n in zip(paths, (4000, 40)):
        if not path.exists():
            encode(path, n=n, width=256, height=144, gop=100, options={"preset": "ultrafast"}, b_frames=0, flat=True)
    run = subprocess.run([sys.executable, "-c", PEAK, *map(str, paths), backend], capture_output=True, text=True, check=True)
    duration, mebibytes = json.loads(run.stdout)
    assert duration == pytest.approx(400)
    assert mebibytes < 30
