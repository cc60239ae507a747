"""mmcompress: multimodal language models made cheap to run, and an honest account of what that cost.

    w = mmcompress.wrap(model, image=GlobalCom2(keep=0.25))
    ids = w.generate(**inputs, max_new_tokens=64)
    print(w.report)
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from .config import WrapConfig
from .errors import SignalError, UnsupportedModelError, WrapError
from .pure import compress
from .registry import available, register
from .report import Report
from .tokens import ImageLayout, ImageReducer, Layout, Reducer, Reduction, Tokens, VideoLayout, VideoReducer, select
from .wrap import Wrapped, from_pretrained, unwrap, wrap

__version__ = version("mmcompress")

__all__ = [
    "ImageLayout", "ImageReducer", "Layout", "Reducer", "Reduction", "Report", "SignalError", "Tokens",
    "UnsupportedModelError", "VideoLayout", "VideoReducer", "WrapConfig", "WrapError", "Wrapped", "available", "compress",
    "from_pretrained", "register", "select", "unwrap", "wrap",
]


def __getattr__(name: str) -> Any:                             # mmcompress.pico.load()
    if name in ("adapters", "audio", "cache", "eval", "image", "layers", "pico", "train", "video", "viz"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
