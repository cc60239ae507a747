"""One thread a worker: tests run in parallel on two cores."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import mmcompress
from mmcompress.registry import reducer_class

torch.set_num_threads(1)
METHODS = sorted(mmcompress.available("image"))


def reducers(keep):
    """Every registered image reducer at a keep, by name."""
    return {name: reducer_class("image", name)(keep=keep) for name in METHODS}


@pytest.fixture(scope="session")
def pico():
    """(model, processor); tests that wrap it must remove the wrap."""
    return mmcompress.pico.load()


@pytest.fixture(params=METHODS)
def method(request):
    """The name of each registered image reducer in turn."""
    return request.param
