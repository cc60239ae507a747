"""pico: an 11M-parameter LLaVA-NeXT that really reads synthetic scenes, with its processor, embedded in the package.

It answers the questions that `mmcompress.pico.scenes` asks about the pictures it draws, offline and on a CPU, so that
what a reducer loses can be measured anywhere; `load_video` gives its twin for the short clips of `mmcompress.pico.clips`.
README.md beside this file says what they can be asked and how well they do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import clips, scenes, video

WEIGHTS = Path(__file__).parent / "weights"


def load(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **options: Any) -> tuple[Any, Any]:
    """-> (LlavaNextForConditionalGeneration in eval mode, LlavaNextProcessor).

    `options` go to `from_pretrained`, for example `attn_implementation="eager"`.
    """
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

    processor = LlavaNextProcessor.from_pretrained(WEIGHTS)
    model: Any = LlavaNextForConditionalGeneration.from_pretrained(WEIGHTS, dtype=dtype, **options)
    return model.to(device).eval(), processor


def load_video(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **options: Any) -> tuple[Any, Any]:
    """-> (LlavaNextVideoForConditionalGeneration in eval mode, LlavaNextVideoProcessor), which reads clips and pictures.

    Frames of 168 x 168 pixels, 36 tokens each. `options` go to `from_pretrained`, as in `load`.
    """
    return video.build(dtype=dtype, device=device, **options)


def prompt(*questions: str, answers: tuple[str, ...] = (), images: int = 1, videos: int = 0) -> str:
    """The chat of pictures or clips and some questions, each but the last with its answer, up to the assistant's turn.

    Asking about clips only takes `images=0`.
    """
    text = "<s>"
    for i, question in enumerate(questions):
        shown = "<image>\n" * images + "<video>\n" * videos if i == 0 else ""
        text += "USER: " + shown + question + " ASSISTANT:"
        if i < len(answers):
            text += f" {answers[i]}</s>"
    return text


__all__ = ["WEIGHTS", "clips", "load", "load_video", "prompt", "scenes"]
