"""The claim of cost: an audio reducer takes under 1 % of the encoder's time, and what follows gets cheaper by what is reported.

    python benchmarks/audio_cost.py --out out/audio_cost.csv                    # Whisper shapes, random weights
    python benchmarks/audio_cost.py --shapes tiny --keep 0.5 --device cpu

For each Whisper shape and reducer, in one process and on the same windows: milliseconds of the encoder, of the reducer, of one
decoder step over all states and over those left, the bytes of the cross-attention's cache (measured) and what the report says.
A reducer inside the encoder (ATome) costs what the encoder then takes longer, below nothing where it is faster. Medians; the
reducer is timed as the hook runs it, with the search for where each recording ends. Writes CSV.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import clock, positive, print_table, versions, write_csv
from torch import Tensor

import mmcompress
from mmcompress.adapters import adapter_for
from mmcompress.config import WrapConfig
from mmcompress.registry import build, reducer_class
from mmcompress.seq2seq import encoded_states

SHAPES = {          # d_model, layers, heads, mel bins
    "tiny": (384, 4, 6, 80), "base": (512, 6, 8, 80), "small": (768, 12, 12, 80), "large-v3": (1280, 32, 20, 128),
}
COLUMNS = ("shape", "method", "keep", "windows", "encoder_ms", "reducer_ms", "reducer_share", "step_ms_all", "step_ms",
           "step_ratio", "cache_mib_all", "cache_mib", "cache_ratio", "claimed_ratio")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["tiny", "base", "small"], choices=SHAPES)
    parser.add_argument("--methods", help="names, comma-separated; default: all that need no question")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--windows", type=positive, default=4, help="30 s windows in a batch")
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("out/audio_cost.csv"))
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    methods = [name for name in mmcompress.available("audio") if not reducer_class("audio", name).reads_question]
    methods = options.methods.split(",") if options.methods else methods
    rows = []
    for shape in options.shapes:
        rows += measure(shape, methods, options, device, dtype)
        print_table(f"{shape}, {options.windows} windows of 30 s, keep {options.keep}",
                    [r for r in rows if r["shape"] == shape], COLUMNS[1:])
    write_csv(options.out, [{**row, "n": options.repeats, **versions(device, dtype)} for row in rows])
    print(options.out)


@torch.inference_mode()
def measure(shape: str, methods: Sequence[str], options: argparse.Namespace, device: torch.device, dtype: torch.dtype
            ) -> list[dict[str, Any]]:
    model = whisper(shape).to(device, dtype).eval()
    mel = torch.randn(options.windows, SHAPES[shape][3], 3000, device=device, dtype=dtype)
    encoder, adapter = model.get_encoder(), adapter_for(model)
    states = encoder(mel).last_hidden_state
    timed = lambda call: clock(call, device, options.repeats)  # noqa: E731
    whole, encoding = step_milliseconds(model, states, timed), timed(lambda: encoder(mel))
    size = cache_bytes(model, states)
    rows = []
    for name in methods:
        reducer = build("audio", {"name": name, "keep": options.keep})
        config = WrapConfig(audio=reducer)
        with mmcompress.wrap(model, config) as w:
            shorter = encoder(mel).last_hidden_state
            claimed = w.report.kv_bytes_after / w.report.kv_bytes_before
            within = timed(lambda: encoder(mel)) if reducer.in_encoder else None
        cost = within - encoding if within is not None else timed(
            lambda: encoded_states(adapter, mel, states, config))  # noqa: B023
        step, held = step_milliseconds(model, shorter, timed), cache_bytes(model, shorter)
        rows.append({"shape": shape, "method": name, "keep": options.keep, "windows": options.windows, "encoder_ms": encoding,
                     "reducer_ms": cost, "reducer_share": cost / encoding, "step_ms_all": whole, "step_ms": step,
                     "step_ratio": step / whole, "cache_mib_all": size / 2**20, "cache_mib": held / 2**20,
                     "cache_ratio": held / size, "claimed_ratio": claimed})
    return rows


def whisper(shape: str) -> Any:
    """A Whisper of a released shape with random weights."""
    import transformers

    width, layers, heads, bins = SHAPES[shape]
    config = transformers.WhisperConfig(vocab_size=51865, num_mel_bins=bins, d_model=width, encoder_layers=layers,
                                        decoder_layers=layers, encoder_attention_heads=heads, decoder_attention_heads=heads,
                                        encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width)
    torch.manual_seed(0)
    return transformers.WhisperForConditionalGeneration(config)


def step_milliseconds(model: Any, states: Tensor, timed: Any) -> float:
    """One decoder step behind a prompt of four tokens, with the cross-attention's cache filled."""
    from transformers.modeling_outputs import BaseModelOutput

    ids = torch.full((len(states), 4), 5, device=states.device)
    out = BaseModelOutput(last_hidden_state=states)
    cache = model(encoder_outputs=out, decoder_input_ids=ids, use_cache=True).past_key_values

    def step() -> None:
        model(encoder_outputs=out, decoder_input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.self_attention_cache.crop(-1)

    return timed(step)


def cache_bytes(model: Any, states: Tensor) -> int:
    """Bytes that the cross-attention's cache holds."""
    from transformers.modeling_outputs import BaseModelOutput

    ids, out = torch.full((len(states), 1), 5, device=states.device), BaseModelOutput(last_hidden_state=states)
    cache = model(encoder_outputs=out, decoder_input_ids=ids, use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.cross_attention_cache.layers)


if __name__ == "__main__":
    main()
