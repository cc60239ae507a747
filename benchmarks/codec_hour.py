"""The claim of memory: an hour of sound is encoded and decoded in less than 1 GB more than half a minute of it.

    python benchmarks/codec_hour.py             # an X-Codec of tiny shape, an hour of wav and one of flac
    python benchmarks/codec_hour.py --shape published --minutes 3 --chunk 30 --formats wav --append
    python benchmarks/codec_hour.py --model hf-audio/xcodec-hubert-general

The file, noise at 16 kHz whose loudness wanders, is written block by block in a temporary folder. A fresh process loads the
model and encodes and decodes 30 s of it, which loads the libraries; then `tokenize_chunked` encodes the file by its path, and
`sound_blocks` decodes the codes into a file, block by block. Random weights (codebooks of noise) unless --model is given.

loaded MB   resident memory at most until then, the model and the 30 s included
encode MB   what encoding the whole adds to the largest resident memory so far; decode MB: what decoding adds to that.
            The exit code is 1 if both together reach 1000
s           of the whole, once; x: seconds of sound a second
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import peak_rss, positive, print_table, versions, write_csv

RATE, BLOCK, FIRST = 16_000, 10, 30     # Hz; seconds written at once; seconds that the baseline has heard
LIMIT = 1000                            # MB, the claim
COLUMNS = ("model", "format", "minutes", "chunk", "loaded MB", "encode MB", "decode MB", "encode s", "encode x", "decode s",
           "decode x", "frames", "n_q")


def noise(seconds: int) -> Iterator[torch.Tensor]:
    """Blocks of (n,) float32."""
    g = torch.Generator().manual_seed(0)
    for at in range(0, seconds, BLOCK):
        n = min(BLOCK, seconds - at)
        loud = torch.randn(20 * n, generator=g).abs()
        loud = torch.nn.functional.interpolate(loud[None, None], n * RATE, mode="linear")[0, 0]
        yield (0.2 * torch.randn(n * RATE, generator=g) * loud).clamp(-1, 1)


def write(path: Path, seconds: int) -> Path:
    import soundfile

    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as file:
        for block in noise(seconds):
            file.write(block.numpy())
    return path


def xcodec(shape: str) -> Any:
    """X-Codec with random weights: of the published shape, or with little of everything but the hop of 320."""
    from transformers import DacConfig, HubertConfig, XcodecConfig, XcodecModel

    config = XcodecConfig()
    if shape == "tiny":
        ratios = [8, 5, 4, 2]
        acoustic = DacConfig(encoder_hidden_size=4, downsampling_ratios=ratios, decoder_hidden_size=32, codebook_size=16)
        semantic = HubertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                conv_dim=[8] * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
        acoustic.hidden_size, acoustic.upsampling_ratios = 8, ratios
        config = XcodecConfig(acoustic_model_config=acoustic.to_dict(), semantic_model_config=semantic.to_dict())
    torch.manual_seed(0)
    model = XcodecModel(config)
    for quantizer in model.quantizer.quantizers:
        quantizer.codebook.embed.normal_()
    return model


def build(model: str | None, shape: str, device: torch.device) -> Any:
    """In eval mode, float32."""
    from transformers import AutoModel

    loaded = xcodec(shape) if model is None else AutoModel.from_pretrained(model, dtype=torch.float32)
    return loaded.to(device).eval()


def decode(model: Any, tokens: Any, path: Path, chunk: float) -> int:
    """Write the sound of `tokens`, never whole in memory. -> samples"""
    import soundfile

    from mmcompress.audio.codec import sound_blocks

    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as file:
        return sum(file.write(block.numpy()) or len(block) for block in sound_blocks(model, tokens, chunk=chunk))


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """In this process, which has done nothing else."""
    from mmcompress.audio import load
    from mmcompress.audio.codec import tokenize_chunked

    device = torch.device(options.device)
    model = build(options.model, options.shape, device)
    out = path.with_name("decoded.wav")
    decode(model, tokenize_chunked(model, load(path, RATE, end=FIRST)), out, options.chunk)
    marks = [(time.perf_counter(), peak_rss())]
    tokens = tokenize_chunked(model, path, chunk=options.chunk)
    marks.append((time.perf_counter(), peak_rss()))
    decode(model, tokens, out, options.chunk)
    marks.append((time.perf_counter(), peak_rss()))
    times, peaks = zip(*marks)
    seconds = float(tokens.seconds)
    took = [b - a for a, b in pairwise(times)]
    more = [(b - a) / 1e6 for a, b in pairwise(peaks)]
    return {"parameters": sum(p.numel() for p in model.parameters()), "minutes": seconds / 60, "chunk": options.chunk,
            "loaded MB": peaks[0] / 1e6, "encode MB": more[0], "decode MB": more[1], "encode s": took[0],
            "encode x": seconds / took[0], "decode s": took[1], "decode x": seconds / took[1],
            "frames": int(tokens.lengths), "n_q": tokens.n_q, **versions(device, torch.float32)}


def in_a_fresh_process(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", str(path), "--shape", options.shape, "--device", options.device,
               "--chunk", str(options.chunk)]
    command += [] if options.model is None else ["--model", options.model]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    name = options.model or f"X-Codec, {options.shape} shape"
    with tempfile.TemporaryDirectory() as folder:
        for suffix in options.formats:
            path = write(Path(folder) / f"long.{suffix}", 60 * options.minutes)
            row = {"model": name, "format": suffix, **in_a_fresh_process(path, options)}
            row |= {"soundfile": version("soundfile"), "n": 1}
            path.unlink()
            yield row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder of any codec that takes 16 kHz; default: random weights")
    parser.add_argument("--shape", choices=("tiny", "published"), default="tiny", help="of the X-Codec of random weights")
    parser.add_argument("--minutes", type=positive, default=60)
    parser.add_argument("--chunk", type=float, default=60.0, help="seconds")
    parser.add_argument("--formats", nargs="+", choices=("wav", "flac"), default=["wav", "flac"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--append", action="store_true", help="keep the rows that --out has")
    parser.add_argument("--out", type=Path, default=Path("out/codec_hour.csv"))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options)))
        return 0
    rows = read(options.out) if options.append and options.out.is_file() else []
    for row in rows_of(options):
        rows.append(row)
        write_csv(options.out, rows)
        print_table(f"{row['minutes']:.0f} min", [row], COLUMNS)
    print(options.out)
    return int(any(float(row["encode MB"]) + float(row["decode MB"]) >= LIMIT for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    import csv

    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    sys.exit(main())
