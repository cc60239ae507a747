"""Reducers of a picture's tokens, one file per method, named as its paper names it."""

from .average_pool import AveragePool
from .cls_topk import ClsTopK
from .global_rank import GlobalRank
from .globalcom2 import GlobalCom2
from .random import Random
from .uniform import Uniform
from .visionzip import VisionZip

__all__ = ["AveragePool", "ClsTopK", "GlobalCom2", "GlobalRank", "Random", "Uniform", "VisionZip"]
