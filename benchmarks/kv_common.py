"""What the two benchmarks of cached keys share: which machine, which kernels, peak memory, a call as a CUDA graph."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from common import positive, versions

Call = Callable[[], Any]


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Options of both."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--heads", type=positive, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=positive, default=8)
    parser.add_argument("--width", type=positive, default=128, help="channels of a head")
    parser.add_argument("--kernel", choices=("auto", "torch", "triton"), default="auto")
    parser.add_argument("--repeats", type=positive, default=10)
    parser.add_argument("--out", type=Path, help="write the rows to this CSV file")
    return parser


def about(device: torch.device, dtype: torch.dtype, kernel: str) -> dict[str, str]:
    """The columns that every figure carries; `note` says so where no GPU was measured."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    note = "" if device.type == "cuda" else "not measured on GPU"
    return {**versions(device, dtype), "triton": triton, "kernel": kernel, "note": note}


def title(about: dict[str, str], repeats: int) -> str:
    head = f"NOT MEASURED ON GPU: {about['device']}, a check that the code runs\n" if about["note"] else ""
    return head + f"medians of {repeats}\n" + ", ".join(f"{k} {v}" for k, v in about.items() if v and k != "note")


def peak_mib(call: Call, device: torch.device) -> float | None:
    """MiB allocated at most during the call beyond what there was before; None without a GPU."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    out = call()
    torch.cuda.synchronize(device)
    del out
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def graphed(call: Call, device: torch.device) -> Call:
    """The call as a CUDA graph, as decoding with static shapes runs it; itself without a GPU."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
