"""Which of two twins runs: plain torch, or the Triton kernel of the same name in `ops.triton`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from torch import Tensor

Kernel = Literal["auto", "torch", "triton"]
KERNELS = ("auto", "torch", "triton")
HAS_TRITON = find_spec("triton") is not None                    # without importing it


def use_triton(kernel: str, x: Tensor) -> bool:
    """Whether `kernel` asks for Triton on the device of x. "auto": on a GPU, where Triton is installed.

    Raises ValueError for another word, or for "triton" on the CPU without Triton's interpreter; ImportError where Triton is
    asked for and missing.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}: one of {', '.join(KERNELS)}")
    if kernel == "torch" or (kernel == "auto" and not x.is_cuda):
        return False
    if not HAS_TRITON:
        if kernel == "auto":
            return False
        raise ImportError("kernel='triton': Triton is not installed; pip install 'mmcompress[kernels]', or pass kernel='torch'")
    from .triton.shapes import INTERPRETED

    if not x.is_cuda and not INTERPRETED:
        raise ValueError(f"kernel='triton' with a tensor on {x.device}: move it to a GPU, pass kernel='torch', or set "
                         "TRITON_INTERPRET=1 before anything imports Triton to try kernels on the CPU")
    return True
