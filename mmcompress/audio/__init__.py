"""Recordings: reading files, and reducers of their tokens, one file per method, named as its paper names it."""

from importlib import import_module
from typing import Any

from .adaptive_spectral_pool import AdaptiveSpectralPool
from .atome import ATome
from .base import AudioReducer
from .energy_prune import EnergyPrune
from .fastadasp import FastAdaSP
from .mean_pool import MeanPool
from .random import Random
from .silence_prune import SilencePrune
from .spectral_pool import SpectralPool
from .speech_prune import SpeechPrune
from .stride import Stride

__all__ = ["ATome", "AdaptiveSpectralPool", "AudioReducer", "EnergyPrune", "FastAdaSP", "MeanPool", "Random", "SilencePrune",
           "Sound", "SpectralPool", "SpeechPrune", "Stride", "as_sound", "check_rate", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Sound", "as_sound", "check_rate", "load"):     # no library of sound files is imported until one is opened
        return getattr(import_module(f"{__name__}.reading"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
