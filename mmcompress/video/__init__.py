"""Clips: reading files, and reducers of their tokens, one file per method, named as its paper names it."""

from importlib import import_module
from typing import Any

_WHERE = {"Clip": "reading", "read": "reading", "EVS": "evs", "DyCoke": "dycoke", "FastVID": "fastvid", "HoliTom": "holitom",
          "VidCom2": "vidcom2", "FramePool": "frame_pool", "Random": "random", "UniformFrames": "uniform_frames",
          "SpatioTemporalMerge": "spatio_temporal_merge", "StreamingReducer": "streaming"}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
