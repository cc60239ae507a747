"""What the benchmarks of cached keys share: which machine, which kernels, memory, CUDA graphs, a random model and caches."""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from common import positive, synchronize, versions
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import LlamaConfig, LlamaForCausalLM

from mmcompress.cache import CacheView, CompressedCache
from mmcompress.cache.parts import as_parts
from mmcompress.cache.slots import slots_of
from mmcompress.cache.view import Sight

GIB = 2**30
WINDOW = 64         # queries that a filled cache's plan sees

Call = Callable[[], Any]


def run_arguments(doc: str | None, repeats: int = 10) -> argparse.ArgumentParser:
    """Options of every run."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=positive, default=repeats)
    parser.add_argument("--out", type=Path, help="write the rows to this CSV file")
    return parser


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Options of the benchmarks of one attention."""
    parser = run_arguments(doc)
    parser.add_argument("--heads", type=positive, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=positive, default=8)
    parser.add_argument("--width", type=positive, default=128, help="channels of a head")
    parser.add_argument("--kernel", choices=("auto", "torch", "triton"), default="auto")
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


def peak_and_after(call: Call, device: torch.device) -> tuple[int | None, int | None, Any]:
    """Bytes beyond what there was before, at most and with the result still held (None without a GPU); and the result."""
    synchronize(device)
    if device.type != "cuda":
        return None, None, call()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    out = call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before, out


def held_bytes(cache: Any) -> int:
    """Bytes of all tensors in the layers of a cache of transformers, quantised ones included, by the memory behind them."""
    memory = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
              for layer in cache.layers for x in _tensors(vars(layer))}
    return sum(memory.values())


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        if is_traceable_wrapper_subclass(x):
            for name in x.__tensor_flatten__()[0]:
                yield from _tensors(getattr(x, name))
        else:
            yield x
    elif isinstance(x, (Mapping, list, tuple)):
        for item in x.values() if isinstance(x, Mapping) else x:
            yield from _tensors(item)


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


def llama(layers: int, tiny: bool = False) -> LlamaConfig:
    """Llama-3.1-8B's shape, of so many layers."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}
    return LlamaConfig(hidden_size=64 if tiny else 4096, intermediate_size=128 if tiny else 14336,
                       num_hidden_layers=layers, num_attention_heads=4 if tiny else 32,
                       num_key_value_heads=2 if tiny else 8, vocab_size=128 if tiny else 128256,
                       max_position_embeddings=131072, rms_norm_eps=1e-5, rope_parameters=rope, tie_word_embeddings=False)


def build_llama(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """Random weights, made where they stay."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def kv_heads(config: LlamaConfig) -> tuple[int, int]:
    """Key heads, and channels of one."""
    assert config.num_key_value_heads is not None
    return config.num_key_value_heads, config.hidden_size // config.num_attention_heads


def weight_bytes(config: LlamaConfig, layers: int, itemsize: int, read: bool = False) -> int:
    """Bytes of the weights of so many layers; read: those that a step reads, which are all but the input embedding."""
    h, kv, table = config.hidden_size, math.prod(kv_heads(config)), config.vocab_size * config.hidden_size
    layer = 2 * h * h + 2 * h * kv + 3 * h * config.intermediate_size + 2 * h
    return itemsize * (layers * layer + h + table + (0 if read else table))


def layer_bytes(config: LlamaConfig, tokens: int, batch: int, itemsize: int) -> int:
    """Bytes of one layer's stock keys and values."""
    return 2 * batch * tokens * math.prod(kv_heads(config)) * itemsize


def need(config: LlamaConfig, layers: int, tokens: int, batch: int, itemsize: int) -> int:
    """Bytes that decoding takes at most: weights, a stock cache, two more layers of it in passing, 1 GiB."""
    return weight_bytes(config, layers, itemsize) + (layers + 2) * layer_bytes(config, tokens, batch, itemsize) + GIB


def prefill_need(config: LlamaConfig, tokens: int, batch: int, itemsize: int) -> int:
    """Bytes that prefill takes at most: the same, and what a layer has at once: three of the MLP's width, four of its own."""
    wide = itemsize * tokens * batch * (3 * config.intermediate_size + 4 * config.hidden_size)
    return need(config, config.num_hidden_layers, tokens, batch, itemsize) + wide


def depth_that_fits(config: LlamaConfig, tokens: int, batch: int, itemsize: int, free: int) -> int:
    """Layers of the model that can decode in so many bytes, 0: none."""
    layers = range(1, config.num_hidden_layers + 1)
    return max((n for n in layers if need(config, n, tokens, batch, itemsize) <= free), default=0)


def free_bytes(device: torch.device) -> int | None:
    """What this process may hold in all, its weights included, with 3 % to spare; None without a GPU."""
    if device.type != "cuda":
        return None
    clear()
    return int(0.97 * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)))


def clear() -> None:
    """Give back GPU memory that nothing holds any more."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def draw(model: Any, tokens: int, batch: int, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A layer's random keys and values (B, H_kv, N, d), last queries (B, H_kv, G, q, d), attention received (B, H_kv, N)."""
    config, device, dtype = model.config, model.device, model.dtype
    g = torch.Generator(device).manual_seed(layer)
    heads, d = kv_heads(config)
    k, v = (torch.randn(batch, heads, tokens, d, generator=g, device=device, dtype=dtype) for _ in range(2))
    q = torch.randn(batch, heads, config.num_attention_heads // heads, min(WINDOW, tokens), d, generator=g, device=device,
                    dtype=dtype)
    return k, v, q, torch.rand(batch, heads, tokens, generator=g, device=device)


def fill_stock(cache: Any, model: Any, tokens: int, batch: int) -> Any:
    """Random keys and values into every layer."""
    for i in range(model.config.num_hidden_layers):
        cache.update(*draw(model, tokens, batch, i)[:2], i)
    return cache


def fill_ours(plan: Any, model: Any, tokens: int, batch: int) -> CompressedCache:
    """The same ones through a plan, layer by layer: the shape that a prefill leaves, without the prefill."""
    cache, device = CompressedCache(model.config, plan, model.device), model.device
    cache.timeline.extend(None, batch, 0, tokens, device)
    real, depth = torch.ones(batch, tokens, dtype=torch.bool, device=device), len(cache.slot_layers)
    assert cache.timeline.positions is not None
    for i, layer in enumerate(cache.slot_layers):
        k, v, q, paid = draw(model, tokens, batch, i)
        layer.lazy_initialization(k, v)
        x = CacheView(replace(slots_of(k, v), evidence=paid), q, Sight(None, tokens - q.shape[3]), real,
                      cache.timeline.positions, k.shape[-1] ** -0.5, i, depth)
        layer.put(tuple(replace(part, evidence=None) for part in as_parts(plan(x))))
        layer.seen = layer.base = tokens
        layer.count_up()
    return cache
