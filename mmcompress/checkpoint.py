"""From what the command line says to a model, its processor, a prompt and a picture, a clip or a recording."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .adapters import known_model_types
from .errors import UnsupportedModelError

PICO = "pico"                           # the embedded model
WHISPER = "whisper"                     # writes down what it hears; the others that hear are asked
_HEARING = {                            # model_type -> its class; the others are AutoModelForImageTextToText's
    "audioflamingo3": "AudioFlamingo3ForConditionalGeneration",
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",           # the part of the checkpoint that reads prompts
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "voxtral": "VoxtralForConditionalGeneration",
    WHISPER: "WhisperForConditionalGeneration",
}
HEARING = tuple(sorted(_HEARING))       # model types that hear


def open_picture(path: Path) -> Any:
    """An RGB PIL image; raises FileNotFoundError, or ValueError if the file is no picture."""
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise FileNotFoundError(f"no picture at {path}")
    try:
        return Image.open(path).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture that Pillow can read") from None


def kind_of(model: str) -> str:
    """The model_type of a checkpoint, without its weights, or 'pico'; raises UnsupportedModelError if it has no adapter."""
    if model == PICO:
        return PICO
    import transformers

    _quiet()
    kind = transformers.AutoConfig.from_pretrained(model).model_type
    if kind not in known_model_types() and kind not in _HEARING:
        raise UnsupportedModelError(f"{model} is of model_type {kind!r}, which has no adapter; known: "
                                    f"{', '.join(known_model_types())}; adapters/README.md shows how to write one")
    return kind


def hearing_rate(model: str) -> int:
    """Samples per second that a checkpoint hears, without its weights; raises UnsupportedModelError if it does not hear."""
    kind = kind_of(model)
    if kind not in _HEARING:
        which = "the embedded model" if kind == PICO else f"{model}, a {kind},"
        raise UnsupportedModelError(f"--audio: {which} does not hear; pass --model with a folder or hub id such as "
                                    f"openai/whisper-tiny.en; known to hear: {', '.join(HEARING)}")
    import transformers

    return int(transformers.AutoFeatureExtractor.from_pretrained(model).sampling_rate)


def device_of(name: str) -> str:
    """What 'auto' stands for; raises ValueError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: this machine has no such device; 'auto' picks one") from None
    return name


def load(model: str, device: str, dtype: str, attn: str, video: bool = False) -> tuple[Any, Any]:
    """-> (model in eval mode on its device, processor); raises ValueError or OSError with what is wrong.

    video   whether clips are asked about: 'pico' has a model for pictures and one that reads clips too
    """
    import transformers

    _quiet()
    device = device_of(device)
    kind = torch.float32 if dtype == "auto" and device == "cpu" else getattr(torch, dtype, None)
    if dtype != "auto" and not isinstance(kind, torch.dtype):
        raise ValueError(f"--dtype {dtype}: 'auto', 'float32', 'bfloat16' or 'float16'")
    where = torch.device(device)
    if model == PICO:
        from . import pico

        return (pico.load_video if video else pico.load)(kind or torch.float32, where, attn_implementation=attn)
    name = _HEARING.get(kind_of(model), "AutoModelForImageTextToText")
    processor = transformers.AutoProcessor.from_pretrained(model)
    loaded = getattr(transformers, name).from_pretrained(model, dtype=kind or "auto", attn_implementation=attn)
    return loaded.to(where).eval(), processor


def _quiet() -> None:
    import huggingface_hub
    import transformers

    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()                 # else every retry is a line


def chat(processor: Any, question: str, images: int, videos: int = 0, sounds: int = 0) -> str:
    """The prompt of a first turn, by the processor's chat template, or placeholders and the question without one."""
    if getattr(processor, "chat_template", None) is None:
        held = (("<image>", images), (getattr(processor, "video_token", "<video>"), videos),
                (getattr(processor, "audio_token", "<audio>"), sounds))
        return "".join(f"{token}\n" * count for token, count in held) + question
    counts = {"image": images, "video": videos, "audio": sounds}
    content = [{"type": kind} for kind, count in counts.items() for _ in range(count)]
    content.append({"type": "text", "text": question})
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)


def device_name(model: Any) -> str:
    """What the model runs on, in words: a GPU's name, or the processor and its threads, and the dtype."""
    where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else (
        f"{model.device.type}, {torch.get_num_threads()} threads")
    return f"{where}, {str(model.dtype).removeprefix('torch.')}"
