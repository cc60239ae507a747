"""Model families: how each encodes what it sees and hears and takes features back. Installed as `mmcompress.adapters`.

One file per family; README.md beside this file shows how to write one.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mmcompress.errors import UnsupportedModelError

from .base import Adapter, Encoded
from .vision import Captures

_ADAPTERS: dict[str, str] = {
    "audioflamingo3": "audioflamingo3:AudioFlamingo3Adapter",
    "internvl": "internvl:InternVLAdapter",
    "llava": "llava:LlavaAdapter",
    "llava_next": "llava_next:LlavaNextAdapter",
    "llava_next_video": "llava_next_video:LlavaNextVideoAdapter",
    "llava_onevision": "llava_onevision:LlavaOnevisionAdapter",
    "qwen2_5_vl": "qwen2_5_vl:Qwen25VLAdapter",
    "qwen2_5_omni_thinker": "qwen2_5_omni:Qwen25OmniAdapter",
    "qwen2_audio": "qwen2_audio:Qwen2AudioAdapter",
    "video_llava": "video_llava:VideoLlavaAdapter",
    "voxtral": "voxtral:VoxtralAdapter",
    "whisper": "whisper:WhisperAdapter",
}
_INSIDE = {"qwen2_5_omni": "thinker"}       # models whose part is what has an adapter


def adapter_for(model: Any, text: bool = False) -> Adapter:
    """The adapter of a transformers model, chosen by its `config.model_type`.

    text  take families that have none for models of text; else they raise UnsupportedModelError
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type in _INSIDE:
        raise UnsupportedModelError(f"{type(model).__name__} speaks as well as hears: wrap the part that reads prompts, "
                                    f"mmcompress.wrap(model.{_INSIDE[model_type]}, ...); it answers in text then, since the "
                                    f"part that speaks needs the hidden states of the whole prompt (generation_mode='text')")
    if model_type not in _ADAPTERS and text:
        from .text import TextAdapter

        return TextAdapter(model)
    if model_type not in _ADAPTERS:
        raise UnsupportedModelError(f"no adapter for model_type {model_type!r}; known: {', '.join(sorted(_ADAPTERS))}; "
                                    f"adapters/README.md shows how to write one")
    module, _, name = _ADAPTERS[model_type].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), name)(model)


def known_model_types() -> tuple[str, ...]:
    """Model types that have an adapter."""
    return tuple(sorted(_ADAPTERS))


__all__ = ["Adapter", "Captures", "Encoded", "adapter_for", "known_model_types"]
