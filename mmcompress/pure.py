"""The pure form: inputs in, shorter inputs out; no module is touched."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from . import seq2seq
from .adapters import adapter_for
from .compat import base_of
from .config import Positions, WrapConfig, given_reducers
from .pipeline import reduce_inputs
from .wrap import handle_of


def compress(model: Any, inputs: Any, *, image: Any = None, video: Any = None, audio: Any = None,
             budget: float | int | None = None, positions: Positions | None = None) -> dict[str, Any]:
    """The pure form: processor inputs -> inputs of the stock `forward` or `generate`, with what they show and sound reduced.

    The result holds input_ids, attention_mask and the like of the shorter prompt, and `mm_encoder_outputs` instead of
    the pixels. `generate` then returns the shorter prompt before its new tokens. With original positions it needs its cache
    (`use_cache=False` drops the mask, and transformers then reads the gaps as packed sequences; a wrapped model guards that).
    Families that take features as one tensor (LLaVA-OneVision's clips, Video-LLaVA, InternVL) mix up the rows of a batch under
    beams or `num_return_sequences`, where transformers repeats that tensor whole: wrap the model for those. Recordings come
    back within `inputs_embeds`, which chunked prefill ignores; Whisper's as `encoder_outputs`.
    """
    if image is None and video is None and audio is None:
        raise ValueError("compress() reduces pictures, clips and recordings before the language model: pass image=..., "
                         "video=... or audio=...; reducers inside it need wrap()")
    base = base_of(model)
    adapter = adapter_for(base)
    config = WrapConfig(**given_reducers(image=image, video=video, audio=audio), positions=positions, budget=budget)
    if not (adapter.has_images(inputs) or adapter.has_videos(inputs) or adapter.has_audio(inputs)):
        return dict(inputs)
    if adapter.seq2seq:
        held = handle_of(base)                                  # the encoder of a wrapped model reduces already
        with nullcontext() if held is None else held.disable():
            return seq2seq.reduce_inputs(adapter, inputs, config)
    return adapter.take_in(reduce_inputs(adapter, inputs, config).inputs)
