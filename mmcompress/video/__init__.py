"""Clips: reading files, and reducers of their tokens, one file per method, named as its paper names it."""

from importlib import import_module
from typing import Any

from .dycoke import DyCoke
from .evs import EVS
from .fastvid import FastVID
from .frame_pool import FramePool
from .holitom import HoliTom
from .random import Random
from .spatio_temporal_merge import SpatioTemporalMerge
from .streaming import StreamingReducer
from .uniform_frames import UniformFrames
from .vidcom2 import VidCom2

__all__ = ["EVS", "Clip", "DyCoke", "FastVID", "FramePool", "HoliTom", "Random", "SpatioTemporalMerge", "StreamingReducer",
           "UniformFrames", "VidCom2", "read"]


def __getattr__(name: str) -> Any:
    if name in ("Clip", "read"):                        # numpy alone until a file is opened
        return getattr(import_module(f"{__name__}.reading"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
