"""Ask a checkpoint about pictures, a clip and a recording, with fewer tokens: from files to an answer, or to what is kept."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .adapters import adapter_for
from .audio.reading import Sound, check_rate
from .audio.reading import load as load_sound
from .checkpoint import HEARING, WHISPER, chat, kind_of, open_picture
from .config import WrapConfig
from .errors import UnsupportedModelError
from .pipeline import Item, reduce_inputs
from .report import Report
from .video.reading import Clip, read
from .wrap import wrap

TOKENS = 128            # of an answer, unless the caller says otherwise; Whisper's own limit holds for what it writes down


@dataclass(frozen=True, eq=False)
class Recording:
    """A sound, of the file `path` from `start` seconds on."""

    sound: Sound
    path: Path
    start: float


@dataclass(frozen=True, eq=False)
class Shown:
    """What a question is about: RGB PIL images, a clip, and a recording."""

    pictures: list[Any]
    clip: Clip | None = None
    recording: Recording | None = None

    @property
    def slots(self) -> tuple[str, ...]:
        """The reducer slots that have something to reduce."""
        held = {"image": bool(self.pictures), "video": self.clip is not None, "audio": self.recording is not None}
        return tuple(slot for slot, there in held.items() if there)

    def of(self, item: Item) -> Any:
        """What to draw an item over: the sound, the clip, or the first picture."""
        if item.modality == "audio":
            assert self.recording is not None
            return self.recording.sound
        return self.clip if item.modality == "video" else self.pictures[0]

    def facts(self) -> dict[str, Any]:
        """What was read of the clip's and of the recording's file, as plain data; seconds to a tenth of a millisecond."""
        return {"clip": self._clip_facts(), "recording": self._recording_facts()}

    def _clip_facts(self) -> dict[str, Any] | None:
        c = self.clip
        if c is None:
            return None
        return {"path": str(c.path), "frames": len(c.frames), "height": c.frames.shape[1], "width": c.frames.shape[2],
                "timestamps": [round(float(t), 4) for t in c.timestamps], "fps": c.fps, "duration": c.duration,
                "start": c.start, "end": c.end, "total": c.total, "backend": c.backend}

    def _recording_facts(self) -> dict[str, Any] | None:
        r = self.recording
        if r is None:
            return None
        return {"path": str(r.path), "seconds": round(r.sound.seconds, 4), "start": r.start,
                "end": round(r.start + r.sound.seconds, 4), "sample_rate": r.sound.sample_rate,
                "source_rate": r.sound.source_rate, "source_channels": r.sound.source_channels}


def open_shown(images: Sequence[Path], video: Path | None, frames: int | None = None, fps: float | None = None,
               start: float | None = None, end: float | None = None, audio: Path | None = None, rate: int = 16_000) -> Shown:
    """Read the files; raises ValueError (also VideoError and AudioError) or OSError with what is wrong.

    frames, fps  as `video.read`
    start, end   of the clip and of the recording
    rate         samples per second of the recording, as the model hears it
    """
    if not images and video is None and audio is None:
        raise ValueError("nothing to ask about: pass --image FILE, --video FILE or both, or --audio FILE")
    frames_of, stretch = {"frames": frames, "fps": fps}, {"start": start, "end": end}
    for options, files, what in ((frames_of, (video,), "which frames of a video are read"),
                                 (stretch, (video, audio), "which stretch of a video or a recording is read")):
        said = [f"--{name}" for name, value in options.items() if value is not None]
        if said and files == (None,) * len(files):
            raise ValueError(f"{said[0]} without {' or '.join(('--video', '--audio')[:len(files)])}: it says {what}")
    pictures = [open_picture(path) for path in images]
    clip = None if video is None else read(video, frames=frames, fps=fps, start=start, end=end)
    recording = None if audio is None else Recording(load_sound(audio, rate, start=start, end=end), audio, start or 0.0)
    return Shown(pictures, clip, recording)


def check_prompt(model: str, prompt: str | None) -> None:
    """Raises ValueError where a question is missing, or has nobody to answer it; reads the checkpoint's configuration."""
    whisper = kind_of(model) == WHISPER
    if whisper and prompt is not None:
        raise ValueError("--prompt: Whisper writes down what it hears and takes no question; leave it out")
    if not whisper and prompt is None:
        raise ValueError("--prompt is missing: the question about what is shown; Whisper alone needs none")


def inputs_of(model: Any, processor: Any, shown: Shown, question: str | None) -> dict[str, Any]:
    """What the model takes, on its device; pixels and spectrograms in its dtype.

    Raises UnsupportedModelError for what it does not see or hear, and ValueError where its processor would cut the recording.
    """
    adapter = adapter_for(model)
    _check_senses(adapter, shown)
    if shown.recording is not None:
        check_rate(processor, shown.recording.sound)
    if adapter.seq2seq:
        inputs = _whole(processor, shown)
    elif model.config.model_type == "voxtral":
        inputs = _conversation(processor, shown, question or "")
    else:
        inputs = _prompt(processor, shown, question or "")
    if shown.recording is not None:
        _check_cut(processor, inputs, shown.recording)
    placed = {name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    for name in placed.keys() & {"pixel_values", "pixel_values_videos", "input_features"}:  # not seconds per frame: they would
        placed[name] = placed[name].to(model.dtype)                                         # be rounded
    return placed


def _check_senses(adapter: Any, shown: Shown) -> None:
    name = type(adapter.model).__name__
    if shown.pictures and not adapter.reads("image"):
        raise UnsupportedModelError(f"--image: {name} sees no pictures")
    if shown.clip is not None and not adapter.reads("video"):
        raise UnsupportedModelError(f"--video: {name} reads no clips; known to read them: llava_next_video, llava_onevision, "
                                    f"video_llava, qwen2_5_vl, qwen2_5_omni, internvl; or 'pico'")
    if shown.recording is not None and not adapter.reads("audio"):
        raise UnsupportedModelError(f"--audio: {name} does not hear; known to hear: {', '.join(HEARING)}")


def _prompt(processor: Any, shown: Shown, question: str) -> Any:
    """Placeholders in the text, and what they stand for beside it."""
    media: dict[str, Any] = {"images": shown.pictures} if shown.pictures else {}
    if shown.clip is not None:
        media |= {"videos": [shown.clip.frames], "video_metadata": [shown.clip.metadata()], "do_sample_frames": False}
        if hasattr(processor, "position_id_per_seconds") and len(shown.clip.frames) > 1:    # Qwen2.5-Omni's assumes 2 a second
            media["fps"] = (len(shown.clip.frames) - 1) / float(shown.clip.timestamps[-1] - shown.clip.timestamps[0])
    if shown.recording is not None:
        sound = shown.recording.sound
        media |= {"audio": [sound.samples.numpy()], "sampling_rate": sound.sample_rate}
    text = chat(processor, question, len(shown.pictures), int(shown.clip is not None), int(shown.recording is not None))
    return processor(text=text, return_tensors="pt", **media)


def _conversation(processor: Any, shown: Shown, question: str) -> Any:
    """Voxtral's processor takes sound as a part of the conversation, in a file's form."""
    import soundfile

    assert shown.recording is not None
    file, sound = io.BytesIO(), shown.recording.sound
    soundfile.write(file, sound.samples.numpy(), sound.sample_rate, format="WAV", subtype="FLOAT")
    content = [{"type": "audio", "base64": base64.b64encode(file.getvalue()).decode()}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}])


def _whole(processor: Any, shown: Shown) -> Any:
    """The spectrogram of the whole recording; one longer than a window comes with its mask, as Whisper's long form wants."""
    assert shown.recording is not None
    samples, rate = shown.recording.sound.samples.numpy(), shown.recording.sound.sample_rate
    if len(samples) <= processor.feature_extractor.n_samples:
        return processor(audio=samples, sampling_rate=rate, return_tensors="pt")
    return processor(audio=samples, sampling_rate=rate, return_tensors="pt", truncation=False, padding="longest",
                     return_attention_mask=True)


def _is_long(processor: Any, inputs: dict[str, Any]) -> bool:
    """Whether Whisper needs several windows."""
    return inputs["input_features"].shape[-1] > processor.feature_extractor.nb_max_frames


def _check_cut(processor: Any, inputs: Any, recording: Recording) -> None:
    mel, hop = inputs["input_features"], processor.feature_extractor.hop_length
    mask = next((inputs[name] for name in ("feature_attention_mask", "input_features_mask") if name in inputs), None)
    heard = hop * (len(mel) * mel.shape[-1] if mask is None else int(mask.sum()))
    sound = recording.sound
    if heard < sound.samples.shape[-1] - hop:
        seconds = heard / sound.sample_rate
        raise ValueError(f"--audio {recording.path}: {sound.seconds:.1f} s, and {type(processor).__name__} hears {seconds:.1f} "
                         f"s at most; pass --end {recording.start + seconds:g}, or a later --start with it")


def ask(model: Any, processor: Any, shown: Shown, question: str | None, config: WrapConfig, max_new_tokens: int | None = None,
        plot: Path | None = None) -> tuple[str, Report]:
    """Greedy answer and what it saved.

    question        None: Whisper, which writes down what it hears
    max_new_tokens  None: 128, and what Whisper's configuration says of its windows
    plot            where to draw the kept tokens of the recording (Whisper: its first window), the clip, or the first picture
    """
    inputs = inputs_of(model, processor, shown, question)
    with wrap(model, config) as w:
        most = TOKENS if max_new_tokens is None and not w.adapter.seq2seq else max_new_tokens
        how: dict[str, Any] = {} if most is None else {"max_new_tokens": most}
        if w.adapter.seq2seq and _is_long(processor, inputs):
            how["return_timestamps"] = True
        ids = w.generate(**inputs, **how, do_sample=False)
        report = w.report
        if plot is not None:
            from .viz import save

            wanted = shown.slots[-1]
            number = next((i for i, item in enumerate(w.last) if item.modality == wanted), 0)
            save(w.plot(shown.of(w.last[number]), number), plot)
    said = ids[0] if "input_ids" not in inputs else ids[0, inputs["input_ids"].shape[1]:]
    return processor.tokenizer.decode(said, skip_special_tokens=True).strip(), report


def reduced(model: Any, processor: Any, shown: Shown, question: str, config: WrapConfig) -> Item:
    """What a reducer keeps of one picture, clip or recording; the language model does not run."""
    inputs = inputs_of(model, processor, shown, question)
    adapter = adapter_for(model)
    with torch.inference_mode():
        if not adapter.seq2seq:
            [item] = reduce_inputs(adapter, inputs, config).items
            return item
        if _is_long(processor, inputs):
            raise ValueError(f"Whisper hears {processor.feature_extractor.chunk_length} s at a time, and one window is drawn: "
                             f"pass --start and --end that are no further apart")
        with wrap(model, config) as w:
            w.adapter.encoder(inputs["input_features"])
            [item] = w.last
            return item


def draw(shown: Shown, item: Item, path: Path) -> None:
    """Write the picture of an item's kept tokens."""
    from .viz import plot_kept, plot_spans, plot_strip, save

    plots: dict[str, Any] = {"image": plot_kept, "video": plot_strip, "audio": plot_spans}
    save(plots[item.modality](shown.of(item), item), path)
