"""Reducers inside the language model: `wrap(model, layers=[FastV(2, 0.5)])`."""

from .base import LayerReducer, Step
from .fastv import FastV
from .in_layer import InLayer
from .pyramid_drop import PyramidDrop
from .stage_pool import StagePool, StridedPool

__all__ = ["FastV", "InLayer", "LayerReducer", "PyramidDrop", "StagePool", "Step", "StridedPool"]
