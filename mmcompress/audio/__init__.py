"""Recordings: reading files, and reducers of their tokens, one file per method, named as its paper names it."""

from importlib import import_module
from typing import Any

from .base import AudioReducer
from .mean_pool import MeanPool
from .random import Random
from .stride import Stride

__all__ = ["AudioReducer", "MeanPool", "Random", "Sound", "Stride", "as_sound", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Sound", "as_sound", "load"):           # no library of sound files is imported until one is opened
        return getattr(import_module(f"{__name__}.reading"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
