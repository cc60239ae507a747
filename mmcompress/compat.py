"""The only file that knows transformers versions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from .errors import UnsupportedModelError

MINIMUM, BEFORE = "5.18", "5.24"


def check_seam(model: Any, takes_features: bool = True) -> None:
    """Raise unless the model's forward takes precomputed features, as it does from transformers 5.18 on.

    takes_features  whether the family's forward is one that does; audio families get input embeddings instead
    """
    parameters = inspect.signature(type(model).forward).parameters
    if takes_features and "mm_encoder_outputs" not in parameters:
        raise UnsupportedModelError(
            f"{type(model).__name__}.forward of transformers {transformers.__version__} takes no precomputed features "
            f"(mm_encoder_outputs); mmcompress needs transformers >= {MINIMUM}: pip install -U transformers")
    if "past_key_values" not in parameters:
        raise UnsupportedModelError(
            f"{type(model).__name__}.forward of transformers {transformers.__version__} has no past_key_values (renamed to "
            f"cache in {BEFORE}), which mmcompress does not know yet: pip install 'transformers>={MINIMUM},<{BEFORE}'")


def check_thinker(model: Any) -> None:
    """Raise where Qwen2.5-Omni's thinker is not yet a model with a head on it, as it is from transformers 5.21 on."""
    if not hasattr(model.model, "get_rope_index"):
        raise UnsupportedModelError(f"{type(model).__name__} of transformers {transformers.__version__} is laid out "
                                    f"differently; mmcompress needs transformers >= 5.21 for it: pip install -U transformers")


def pictures_argument(model: Any) -> str:
    """What `get_image_features` of Video-LLaVA calls its pixels; transformers once had `pixel_values_images`."""
    names = inspect.signature(type(model).get_image_features).parameters
    return "pixel_values" if "pixel_values" in names else "pixel_values_images"


def check_chunked_prefill() -> None:
    """Raise where `generate` would hand every chunk of a prompt the features of all pictures, and go wrong silently."""
    from transformers.generation import utils

    if not hasattr(utils, "_slice_mm_encoder_output"):
        raise ValueError(f"prefill_chunk_size: transformers {transformers.__version__} does not split precomputed features "
                         f"into chunks; pip install -U transformers, or leave prefill_chunk_size out")


def check_gaps_over_cache(model: Any, prompts: int, what: str) -> None:
    """Raise where FlashAttention would misread positions with gaps on top of a filled cache.

    For one prompt without padding, transformers takes position ids that do not rise by one for packed sequences and
    then forgets the cache. A first prefill is right (one sequence from its own start), and so are padded or larger batches.
    """
    implementation = str(getattr(model.config.get_text_config(), "_attn_implementation", ""))
    if prompts == 1 and "flash" in implementation:
        raise ValueError(f"{what} with positions='original' under {implementation}: transformers reads the gaps as packed "
                         f"sequences; pass positions='closed' to wrap, or attn_implementation='sdpa' to the model")


def check_layers(model: Any, steps: Sequence[Any]) -> None:
    """Raise where tokens cannot be dropped inside the language model."""
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    sliding = "sliding_attention" in kinds or (not kinds and getattr(text, "sliding_window", None))
    if steps and sliding:
        raise UnsupportedModelError(f"{type(model).__name__}: sliding-window attention counts columns, which layers=[...] "
                                    f"would change; use an image reducer")
    if steps and "flex" in str(getattr(text, "_attn_implementation", "")):
        raise UnsupportedModelError("layers=[...] cannot cut flex attention's block masks; load the model with "
                                    "attn_implementation='sdpa', 'eager' or 'flash_attention_2'")


def check_decoding(call: dict[str, Any]) -> None:
    """Raise for ways of generating that assume that every layer of the cache has the same length."""
    config = call.get("generation_config")
    for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"):
        if call.get(name, getattr(config, name, None)):
            raise ValueError(f"{name}: with layers=[...] the cache's layers have different lengths, which this way of "
                             f"generating does not know; leave it out, or use an image reducer")


def check_hooks_recomputed(layer: Any, what: str) -> None:
    """Raise where gradient checkpointing would run a layer again, with its hooks, when these are gone (before 5.23 or so)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if layer.training and getattr(layer, "gradient_checkpointing", False) and "__call__" in vars(GradientCheckpointingLayer):
        raise ValueError(f"{what} with gradient checkpointing of the audio encoder: transformers {transformers.__version__} "
                         f"runs its layers again without the hooks that merged; pip install -U transformers, or checkpoint the "
                         f"language model alone")


def check_resumed(model: Any, folder: Path) -> None:
    """Raise if `Trainer` resumed a checkpoint's optimizer and step but not its weights.

    transformers 5.23 writes LLaVA checkpoints under other names than the model's, and its Trainer reads them back without
    translating: it warns of missing keys and trains on from whatever the model holds.
    """
    file = folder / "model.safetensors"
    if not file.is_file():
        return                                                  # sharded, PEFT, FSDP: other ways of loading
    from safetensors import safe_open

    held = base_of(model).state_dict()
    with safe_open(file, "pt") as saved:
        names = list(saved.keys())
        if any(name in held for name in names):
            return
        for name in names:
            for same in (key for key in held if key.endswith(f".{name}")):
                if not torch.equal(saved.get_tensor(name), held[same].cpu()):
                    raise ValueError(f"transformers {transformers.__version__}'s Trainer did not load the weights of {folder} "
                                     f"(it does not translate their names); build the Trainer with "
                                     f"{type(base_of(model)).__name__}.from_pretrained({str(folder)!r}) and resume again")
                return


def base_of(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def from_inside(model: Any) -> Any:
    """The transformers or PEFT model inside DDP, FSDP or torch.compile, or the model itself."""
    while (inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None)) is not None:
        model = inner
    return model
