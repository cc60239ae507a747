"""What each book of a trained codec carries and repairs, and what choosing books by worth saves.

    python benchmarks/codec_worth.py semantic/model plain/model --out out/codec_worth.csv

Synthesised sentences that no training draws. Of each book: codes that occur, entropy, and what it takes off the log
spectrum error and off the semantic error (the first codec's teacher hears original and decoded sound). Then a mean rate of half
the books: the same number for every sentence, against `choose` by the spectral error. Writes CSV.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import positive, print_table, versions, write_csv
from torch import Tensor
from tqdm import tqdm
from transformers import XcodecModel

from mmcompress.audio import tokenize
from mmcompress.audio.codec import AudioTokens, choose, gains, prefix_errors, semantic_error, spectral_error, usage
from mmcompress.audio.speech import draw

COLUMNS = ("codec", "book", "n", "used", "perplexity", "entropy", "spectral", "spectral_gain", "semantic", "semantic_gain")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders of X-Codecs at 16 kHz; the first one's teacher judges")
    parser.add_argument("--n", type=positive, default=100, help="sentences")
    parser.add_argument("--out", type=Path, default=Path("out/codec_worth.csv"))
    options = parser.parse_args(argv)
    sounds = [draw(f"worth/{i}").sound for i in tqdm(range(options.n), desc="sentences", disable=None)]
    hearer = XcodecModel.from_pretrained(options.models[0]).eval()
    rows: list[dict[str, Any]] = []
    for folder in options.models:
        name = folder.parent.name if folder.name == "model" else folder.name
        model = XcodecModel.from_pretrained(folder).eval()
        tokens = tokenize(model, sounds)
        spectral = prefix_errors(model, tokens, sounds, spectral_error)
        semantic = prefix_errors(model, tokens, sounds, semantic_error(hearer))
        rows += books(name, tokens, spectral, semantic)
        print_table(name, rows[-tokens.n_q:], COLUMNS)
        print(f"{name}, {chosen(tokens, spectral)}", flush=True)
    write_csv(options.out, [row | versions(torch.device("cpu"), torch.float32) for row in rows])
    print(options.out)


def books(name: str, tokens: AudioTokens, spectral: Tensor, semantic: Tensor) -> list[dict[str, Any]]:
    """A row a book; errors are means over sentences."""
    found = usage(tokens)
    # without any book: silence has no log spectrum, so the first book's gain is left out
    columns = {"spectral": spectral.mean(0), "semantic": semantic.mean(0)}
    repairs = {k: [None, *gains(v)[1:].tolist()] for k, v in columns.items()}
    return [{"codec": name, "book": i + 1, "n": len(tokens), "used": float(found.used[i]),
             "perplexity": float(found.perplexity[i]), "entropy": float(found.entropy[i]),
             "spectral": float(columns["spectral"][i]), "spectral_gain": repairs["spectral"][i],
             "semantic": float(columns["semantic"][i]), "semantic_gain": repairs["semantic"][i]} for i in range(tokens.n_q)]


def chosen(tokens: AudioTokens, errors: Tensor) -> str:
    """What `choose` gains at the mean rate of half the books."""
    half = max(1, tokens.n_q // 2)
    count = choose(errors, tokens, tokens_per_second=tokens.rate * half)
    weight = tokens.seconds / tokens.seconds.sum()
    fixed, bought = errors[:, half - 1], errors.gather(1, count[:, None] - 1)[:, 0]
    return (f"{half} books each: spectral error {float((weight * fixed).sum()):.4f}; chosen ({int(count.min())} to "
            f"{int(count.max())}, mean {float((weight * count).sum()):.2f}): {float((weight * bought).sum()):.4f}")


if __name__ == "__main__":
    main()
