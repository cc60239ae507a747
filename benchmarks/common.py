"""What the benchmarks share: a clock, a random LLaVA-NeXT of the real 7B shape, CSV files and tables."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig

import mmcompress

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]      # (height, width), as released


def clock(call: Callable[[], Any], device: torch.device, repeats: int, warm_up: int = 2,
          after: Callable[[Any], None] | None = None) -> float:
    """Median milliseconds of `call` on an idle device, host included; `after` sees each timed result, off the clock."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        out = call()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
        if after is not None:
            after(out)
        del out                                                     # or the next repeat would hold two caches
    return statistics.median(times)


def peak_rss() -> int:
    """Bytes this process has held at most. Not getrusage's: that one is inherited from the process which started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build_model(device: torch.device, dtype: torch.dtype, small: bool = False) -> LlavaNextForConditionalGeneration:
    """LLaVA-NeXT-7B's shape (Mistral-7B, CLIP-L/336) with random weights, made where they stay.

    `small` keeps the geometry (tiles of 24 x 24 tokens, 2,928 for a five-tile picture) and little else.
    """
    if small:
        vision = CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                                  image_size=336, patch_size=14, projection_dim=64)
        text = MistralConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                             num_key_value_heads=1, vocab_size=512, max_position_embeddings=32768, sliding_window=None)
    else:
        vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                                  image_size=336, patch_size=14, projection_dim=768)
        text = MistralConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                             num_key_value_heads=8, vocab_size=32064, max_position_embeddings=32768, sliding_window=None)
    config = LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=PINPOINTS,
                             image_token_index=500 if small else 32000)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlavaNextForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def versions(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The columns that every figure carries."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"device": name, "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__,
            "transformers": transformers.__version__, "mmcompress": mmcompress.__version__}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def print_table(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(_show(row[c]) for c in columns))
    Console(width=160).print(table)


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value
