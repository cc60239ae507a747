"""What every kernel's caller asks: widths of tiles, tensors as kernels read them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor


@triton.jit
def _nothing():
    pass


INTERPRETED = not isinstance(_nothing, triton.JITFunction)      # TRITON_INTERPRET was set when this was imported


Launch = TypeVar("Launch", bound=Callable[..., Any])


def on_its_device(launch: Launch) -> Launch:
    """`launch` on the device of its first argument: Triton launches on the current one, which a sharded model's may not be."""
    @wraps(launch)
    def run(x: Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(x):
            return launch(x, *args)
    return run      # type: ignore[return-value]


def wide(d: int) -> int:
    """The width of a tile that holds d channels: a power of two that a matrix product takes."""
    return max(16, triton.next_power_of_2(d))


def widens(x: Tensor) -> bool:
    """Whether products of x must be made in float32: Triton's interpreter multiplies the bits of bfloat16 as integers."""
    return x.dtype == torch.bfloat16 and INTERPRETED


def dense(x: Tensor) -> Tensor:
    """x with the last axis side by side in memory; other strides may be any."""
    return x if x.stride(-1) == 1 else x.contiguous()


def given(x: Tensor | None, like: Tensor, axes: int = 3) -> Tensor:
    """What to pass for a tensor that may be missing: itself, dense, or one that no kernel reads."""
    return like.new_empty((1,) * axes, dtype=torch.float32) if x is None else dense(x)
