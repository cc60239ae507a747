"""pico: an 11M-parameter LLaVA-NeXT that really reads synthetic scenes, with its processor, embedded in the package.

It answers the questions that `mmcompress.pico.scenes` asks about the pictures it draws, offline and on a CPU, so that
what a reducer loses can be measured anywhere. README.md beside this file says what it can be asked and how well it does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import scenes

WEIGHTS = Path(__file__).parent / "weights"


def load(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **options: Any) -> tuple[Any, Any]:
    """-> (LlavaNextForConditionalGeneration in eval mode, LlavaNextProcessor).

    `options` go to `from_pretrained`, for example `attn_implementation="eager"`.
    """
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

    processor = LlavaNextProcessor.from_pretrained(WEIGHTS)
    model: Any = LlavaNextForConditionalGeneration.from_pretrained(WEIGHTS, dtype=dtype, **options)
    return model.to(device).eval(), processor


def prompt(*questions: str, answers: tuple[str, ...] = (), images: int = 1) -> str:
    """The chat of one picture and some questions, each but the last with its answer, up to the assistant's turn."""
    text = "<s>"
    for i, question in enumerate(questions):
        text += "USER: " + "<image>\n" * (images if i == 0 else 0) + question + " ASSISTANT:"
        if i < len(answers):
            text += f" {answers[i]}</s>"
    return text


__all__ = ["WEIGHTS", "load", "prompt", "scenes"]
