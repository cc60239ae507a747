"""Ask a checkpoint about pictures and a clip, with fewer tokens: from files to an answer, or to what a reducer keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .adapters import adapter_for
from .checkpoint import chat, open_picture
from .config import WrapConfig
from .errors import UnsupportedModelError
from .pipeline import Item, reduce_inputs
from .report import Report
from .video.reading import Clip, read
from .wrap import wrap


@dataclass(frozen=True, eq=False)
class Shown:
    """What a question is about: RGB PIL images, and a clip."""

    pictures: list[Any]
    clip: Clip | None = None

    @property
    def slots(self) -> tuple[str, ...]:
        """The reducer slots that have something to reduce."""
        return ("image",) * bool(self.pictures) + ("video",) * (self.clip is not None)

    def of(self, item: Item) -> Any:
        """What to draw an item over: the clip, or the first picture."""
        return self.clip if item.modality == "video" else self.pictures[0]

    def clip_facts(self) -> dict[str, Any] | None:
        """What was read of the video file, as plain data; seconds rounded to a tenth of a millisecond."""
        c = self.clip
        if c is None:
            return None
        return {"path": str(c.path), "frames": len(c.frames), "height": c.frames.shape[1], "width": c.frames.shape[2],
                "timestamps": [round(float(t), 4) for t in c.timestamps], "fps": c.fps, "duration": c.duration,
                "start": c.start, "end": c.end, "total": c.total, "backend": c.backend}


def open_shown(images: Sequence[Path], video: Path | None, frames: int | None = None, fps: float | None = None,
               start: float | None = None, end: float | None = None) -> Shown:
    """Read the files; raises ValueError (also VideoError) or OSError with what is wrong, `frames` ... `end` as `video.read`."""
    if not images and video is None:
        raise ValueError("nothing to look at: pass --image FILE, --video FILE or both")
    sampling = {"frames": frames, "fps": fps, "start": start, "end": end}
    if video is None and (given := [f"--{name}" for name, value in sampling.items() if value is not None]):
        raise ValueError(f"{given[0]} without --video: it says which frames of a video are read")
    pictures = [open_picture(path) for path in images]
    return Shown(pictures, None if video is None else read(video, frames=frames, fps=fps, start=start, end=end))


def inputs_of(model: Any, processor: Any, shown: Shown, question: str) -> dict[str, Any]:
    """What the model takes, on its device; pixels in its dtype. Raises UnsupportedModelError where it reads no clips."""
    media: dict[str, Any] = {"images": shown.pictures} if shown.pictures else {}
    if shown.clip is not None:
        adapter = adapter_for(model)
        if not (adapter.video_inputs or adapter.reads_clips):
            raise UnsupportedModelError(f"--video: {type(model).__name__} reads no clips; known to read them: "
                                        f"llava_next_video, llava_onevision, video_llava, qwen2_5_vl, internvl; or 'pico'")
        media |= {"videos": [shown.clip.frames], "video_metadata": [shown.clip.metadata()], "do_sample_frames": False}
    text = chat(processor, question, len(shown.pictures), int(shown.clip is not None))
    inputs = processor(text=text, return_tensors="pt", **media)
    placed = {name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    for name in placed.keys() & {"pixel_values", "pixel_values_videos"}:        # not seconds per frame: they would be rounded
        placed[name] = placed[name].to(model.dtype)
    return placed


def ask(model: Any, processor: Any, shown: Shown, question: str, config: WrapConfig, max_new_tokens: int,
        plot: Path | None = None) -> tuple[str, Report]:
    """Greedy answer and what it saved; `plot` is where to draw the kept tokens of the clip, or of the first picture."""
    inputs = inputs_of(model, processor, shown, question)
    with wrap(model, config) as w:
        ids = w.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        report = w.report
        if plot is not None:
            from .viz import save

            wanted = shown.slots[-1]
            number = next((i for i, item in enumerate(w.last) if item.modality == wanted), 0)
            save(w.plot(shown.clip or shown.pictures[0], number), plot)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip(), report


def reduced(model: Any, processor: Any, shown: Shown, question: str, config: WrapConfig) -> Item:
    """What a reducer keeps of one picture or clip; the language model does not run."""
    with torch.inference_mode():
        [item] = reduce_inputs(adapter_for(model), inputs_of(model, processor, shown, question), config).items
    return item


def draw(shown: Shown, item: Item, path: Path) -> None:
    """Write the picture of an item's kept tokens."""
    from .viz import plot_kept, plot_strip, save

    save((plot_strip if item.modality == "video" else plot_kept)(shown.of(item), item), path)
