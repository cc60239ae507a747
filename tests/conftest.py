"""One thread a worker: tests run in parallel on two cores."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")              # before any test makes torch import Triton

import mmcompress
from mmcompress.layers.base import works_on
from mmcompress.registry import reducer_class

torch.set_num_threads(1)
METHODS = sorted(mmcompress.available("image"))
VIDEO_METHODS = sorted(mmcompress.available("video"))
AUDIO_METHODS = sorted(mmcompress.available("audio"))
LAYER_METHODS = sorted(mmcompress.available("layers"))
CACHE_METHODS = sorted(mmcompress.available("cache"))


def reducers(keep):
    """Every registered image reducer at a keep, by name."""
    return {name: reducer_class("image", name)(keep=keep) for name in METHODS}


def video_reducer(name, keep=0.3):
    """A registered video reducer by name."""
    return reducer_class("video", name)(keep=keep)


def audio_reducer(name, keep=0.4):
    """A registered audio reducer by name. Merging inside an encoder of few layers cannot remove more than half a layer."""
    return reducer_class("audio", name)(keep=max(keep, 0.5) if name == "atome" and isinstance(keep, float) else keep)


@pytest.fixture(scope="session")
def pico():
    """(model, processor); tests that wrap it must remove the wrap."""
    return mmcompress.pico.load()


@pytest.fixture(params=METHODS)
def method(request):
    """The name of each registered image reducer in turn."""
    return request.param


def layer_reducer(name, keep=0.4):
    """A registered layer reducer by name, for a language model of four layers."""
    options = {"fastv": dict(layer=2, keep=keep), "pyramid_drop": dict(stages=((1, keep), (3, keep / 2))),
               "stage_pool": dict(layer=1, stride=max(1, round(1 / keep))),
               "in_layer": dict(layer=2, reducer={"name": "global_rank", "keep": keep})}
    return reducer_class("layers", name)(**options.get(name, {}))


@pytest.fixture(params=[name for name in LAYER_METHODS if works_on(reducer_class("layers", name), "image")])
def layer_method(request):
    """The name of each registered layer reducer that works on pictures in turn."""
    return request.param


def cache_plan(name, keep=0.4, **options):
    """A registered cache plan by name, its window no longer than tiny prompts ask for. MiniCache drops nothing."""
    short = {"recent": 3} if name in ("snapkv", "ems", "razor_attention") else {}
    return reducer_class("cache", name)(**{"keep": 1.0 if name == "minicache" else keep, **short, **options})


@pytest.fixture(params=CACHE_METHODS)
def cache_method(request):
    """The name of each registered cache plan in turn."""
    return request.param
