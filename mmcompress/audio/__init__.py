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

__all__ = ["ATome", "AdaptiveSpectralPool", "AudioReducer", "AudioTokens", "EnergyPrune", "FastAdaSP", "MeanPool", "Random",
           "SilencePrune", "Sound", "SpectralPool", "SpeechPrune", "Stride", "XCodec", "as_sound", "check_rate", "detokenize",
           "load", "tokenize"]


def __getattr__(name: str) -> Any:
    if name in ("Sound", "as_sound", "check_rate", "load"):     # no library of sound files is imported until one is opened
        return getattr(import_module(f"{__name__}.reading"), name)
    if name in ("AudioTokens", "detokenize", "tokenize"):       # nor a codec before one is asked for
        return getattr(import_module(f"{__name__}.codec"), name)
    if name == "XCodec":
        return import_module(f"{__name__}.xcodec").XCodec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
