"""From what the command line says to a model, its processor, a prompt and a picture or a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .adapters import known_model_types
from .errors import UnsupportedModelError

PICO = "pico"                           # the embedded model


def open_picture(path: Path) -> Any:
    """An RGB PIL image; raises FileNotFoundError, or ValueError if the file is no picture."""
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise FileNotFoundError(f"no picture at {path}")
    try:
        return Image.open(path).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture that Pillow can read") from None


def load(model: str, device: str, dtype: str, attn: str, video: bool = False) -> tuple[Any, Any]:
    """-> (model in eval mode on its device, processor); raises ValueError or OSError with what is wrong.

    video   whether clips are asked about: 'pico' has a model for pictures and one that reads clips too
    """
    import huggingface_hub
    import transformers

    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()                 # else every retry is a line
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = torch.float32 if dtype == "auto" and device == "cpu" else getattr(torch, dtype, None)
    if dtype != "auto" and not isinstance(kind, torch.dtype):
        raise ValueError(f"--dtype {dtype}: 'auto', 'float32', 'bfloat16' or 'float16'")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {device}: this machine has no such device; 'auto' picks one") from None
    if model == PICO:
        from . import pico

        return (pico.load_video if video else pico.load)(kind or torch.float32, where, attn_implementation=attn)
    kind_of_model = transformers.AutoConfig.from_pretrained(model).model_type
    if kind_of_model not in known_model_types():                        # before the weights are fetched
        raise UnsupportedModelError(f"{model} is of model_type {kind_of_model!r}, which has no adapter; known: "
                                    f"{', '.join(known_model_types())}; adapters/README.md shows how to write one")
    processor = transformers.AutoProcessor.from_pretrained(model)
    auto: Any = transformers.AutoModelForImageTextToText
    loaded = auto.from_pretrained(model, dtype=kind or "auto", attn_implementation=attn)
    return loaded.to(where).eval(), processor


def chat(processor: Any, question: str, images: int, videos: int = 0) -> str:
    """The prompt of a first turn, by the processor's chat template, or placeholders and the question without one."""
    if getattr(processor, "chat_template", None) is None:
        return "<image>\n" * images + f"{getattr(processor, 'video_token', '<video>')}\n" * videos + question
    content = [{"type": kind} for kind, count in (("image", images), ("video", videos)) for _ in range(count)]
    content.append({"type": "text", "text": question})
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)


def device_name(model: Any) -> str:
    """What the model runs on, in words: a GPU's name, or the processor and its threads, and the dtype."""
    where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else (
        f"{model.device.type}, {torch.get_num_threads()} threads")
    return f"{where}, {str(model.dtype).removeprefix('torch.')}"
