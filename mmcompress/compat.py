"""The only file that knows transformers versions."""

from __future__ import annotations

import inspect
from typing import Any

import transformers

from .errors import UnsupportedModelError

MINIMUM = "5.18"


def check_seam(model: Any) -> None:
    """Raise unless the model's forward takes precomputed features, as it does from transformers 5.18 on."""
    if "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters:
        raise UnsupportedModelError(
            f"{type(model).__name__}.forward of transformers {transformers.__version__} takes no precomputed features "
            f"(mm_encoder_outputs); mmcompress needs transformers >= {MINIMUM}: pip install -U transformers")


def check_chunked_prefill() -> None:
    """Raise where `generate` would hand every chunk of a prompt the features of all pictures, and go wrong silently."""
    from transformers.generation import utils

    if not hasattr(utils, "_slice_mm_encoder_output"):
        raise ValueError(f"prefill_chunk_size: transformers {transformers.__version__} does not split precomputed features "
                         f"into chunks; pip install -U transformers, or leave prefill_chunk_size out")


def base_of(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
