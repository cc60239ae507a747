"""A language model from scratch on codec tokens: it reads spoken digits, and it goes on with them.

    python benchmarks/spoken_digits.py --codec semantic=FOLDER plain=FOLDER --n-q 1 4 --out out/spoken_digits.csv

Three to six digits in eSpeak's English voices (mmcompress.audio.speech), codes of any codec that `tokenize` takes, and a Llama
of about a million parameters around which stands a CodecLM. Each codec, task and number of books is a training of its own:

    read   codes -> digits as text: digit error rate and share of utterances with an error, greedy
    write  codes -> next codes: bits a code of each book, beside what the frequencies of the codes alone give; and WAV files:
           each begins with half a second of a held-out utterance, which the model goes on with (sampled) until it ends it

Held out: other utterances of the voices heard in training, and voices never heard (m3 and f2 in all accents). A row is written
as soon as it is known, and rows that are there are not measured again: delete the file to start anew. One seed; the intervals
(95 %) are over utterances.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import math
import random
import time
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import positive, print_table, versions
from speech import Errors, word_error_rate, word_errors
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from mmcompress.adapters.codec_lm import CodecLM
from mmcompress.audio.codec import AudioTokens, detokenize, tokenize
from mmcompress.audio.speech import say, voices

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
START, END, PAD = 10, 11, 12                        # of the answer; 0 ... 9 are the digits
HELD_OUT = ("+m3", "+f2")
SPLITS = {"train": False, "known": False, "new": True}          # whether the voices are those held out
COLUMNS = ("codec", "task", "layout", "n_q", "steps", "seed", "voices", "measure", "book", "value", "low", "high", "unigram",
           "nominal", "n", "utterances", "parameters", "minutes")
SHOWN = ("codec", "task", "n_q", "voices", "measure", "book", "value", "low", "high", "unigram", "n")


class Split(NamedTuple):
    tokens: AudioTokens
    digits: list[list[int]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", nargs="+", required=True, help="folders of codecs, or name=folder")
    parser.add_argument("--task", nargs="+", choices=("read", "write"), default=("read", "write"))
    parser.add_argument("--layout", choices=("parallel", "delay", "flatten"), default="delay")
    parser.add_argument("--n-q", type=positive, nargs="+", default=(1, 4), help="numbers of books")
    parser.add_argument("--steps", type=positive, default=1500)
    parser.add_argument("--batch", type=positive, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--train", type=positive, default=4000, help="utterances to learn from")
    parser.add_argument("--test", type=positive, default=300, help="held-out utterances, of known and of new voices each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("out/spoken_digits"), help="folder of codes, made once, and of WAVs")
    parser.add_argument("--out", type=Path, default=Path("out/spoken_digits.csv"))
    options = parser.parse_args(argv)
    codecs = [tuple(text.partition("=")[::2]) if "=" in text else (Path(text).name, text) for text in options.codec]
    for (name, folder), n_q, task in itertools.product(codecs, options.n_q, options.task):
        about = {"codec": name, "task": task, "layout": options.layout, "n_q": n_q, "steps": options.steps,
                 "seed": options.seed, "utterances": options.train}
        if known(options.out, about):
            print(f"{about}: in {options.out} already")
            continue
        codec = AutoModel.from_pretrained(folder).eval()
        splits = {split: data(codec, folder, split, options) for split in SPLITS}
        measure(codec, {split: Split(x.tokens.prefix(n_q), x.digits) for split, x in splits.items()}, about, options)
    with options.out.open(newline="") as file:
        rows = [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]
    print_table(f"spoken digits, {options.layout}", rows, SHOWN)
    draw(rows, options.out.with_suffix(".png"))
    print(f"{options.out}\n{options.out.with_suffix('.png')}")


# data -----------------------------------------------------------------------------------------------------------------

def script(split: str, i: int) -> tuple[list[int], str, int, int]:
    """The i-th of a split, a function of the arguments: digits, voice, words per minute, pitch."""
    rng = random.Random(f"spoken digits/{split}/{i}")
    digits = [rng.randrange(10) for _ in range(rng.randint(3, 6))]
    voice = rng.choice([v for v in voices() if v.endswith(HELD_OUT) == SPLITS[split]])
    return digits, voice, rng.randint(130, 210), rng.randint(25, 75)


def speak(split: str, i: int) -> Any:
    """A Sound of 16 kHz."""
    digits, *how = script(split, i)
    return say(" ".join(DIGITS[d] for d in digits), *how).sound


def data(codec: Any, folder: str, split: str, options: argparse.Namespace) -> Split:
    """A split's codes of all books, from the cache or made."""
    count = options.train if split == "train" else options.test
    file = options.cache / f"{digest(folder)}-{split}-{count}.safetensors"
    if not file.is_file():
        tokens = joined([tokenize(codec, [speak(split, i) for i in range(first, min(first + 50, count))])
                         for first in tqdm(range(0, count, 50), unit="50", desc=f"speak and tokenize, {split}")])
        file.parent.mkdir(parents=True, exist_ok=True)
        tokens.save(file)
    return Split(AudioTokens.load(file), [script(split, i)[0] for i in range(count)])


def digest(folder: str) -> str:
    """Of a checkpoint's weights, so that codes of another training are not taken for its own."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def joined(parts: Sequence[AudioTokens]) -> AudioTokens:
    most = max(part.codes.shape[2] for part in parts)
    codes = torch.cat([torch.nn.functional.pad(part.codes, (0, most - part.codes.shape[2])) for part in parts])
    first = parts[0]
    return AudioTokens(codes, torch.cat([p.lengths for p in parts]), first.rate, first.vocab, first.codec, first.sample_rate)


def picked(split: Split, rows: Sequence[int]) -> tuple[AudioTokens, list[list[int]]]:
    tokens = split.tokens
    lengths = tokens.lengths[rows]
    codes = tokens.codes[rows, :, :int(lengths.max())]
    return AudioTokens(codes, lengths, tokens.rate, tokens.vocab, tokens.codec, tokens.sample_rate), \
        [split.digits[i] for i in rows]


def batches(split: Split, size: int, seed: int) -> Iterator[list[int]]:
    """Rows without end, in random order, those of a batch about equally long."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(len(split.digits)), len(split.digits))
        for first in range(0, len(order), 8 * size):
            near = sorted(order[first:first + 8 * size], key=lambda i: int(split.tokens.lengths[i]))
            groups = [near[i:i + size] for i in range(0, len(near), size)]
            yield from rng.sample(groups, len(groups))


# model ----------------------------------------------------------------------------------------------------------------

def build(vocab: Sequence[int], layout: Any, seed: int) -> CodecLM:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=PAD + 1, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                         max_position_embeddings=4096, bos_token_id=None, eos_token_id=END, pad_token_id=PAD)
    return CodecLM(LlamaForCausalLM(config), vocab, layout)


def loss_of(model: CodecLM, tokens: AudioTokens, digits: Sequence[list[int]], task: str) -> Tensor:
    if task == "write":
        return model(**model.expand([[model.audio_token_id]] * len(tokens), tokens), tokens=tokens).loss
    rows = [[model.audio_token_id, START, *d, END] for d in digits]
    labels = [[-100, -100, *d, END] for d in digits]
    return model(**model.expand(rows, tokens, labels=labels), tokens=tokens, spoken=False).loss


def train(model: CodecLM, split: Split, task: str, options: argparse.Namespace) -> None:
    """AdamW, a warm-up of a tenth, then a cosine to a tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.05)
    warm = max(1, options.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm) * (
        0.55 + 0.45 * math.cos(math.pi * max(0, step - warm) / max(1, options.steps - warm))))
    bar = tqdm(itertools.islice(batches(split, options.batch, options.seed), options.steps), total=options.steps, unit="step",
               desc=task)
    model.train()
    for step, rows in enumerate(bar):
        loss = loss_of(model, *picked(split, rows), task)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
    model.eval()


# measures -------------------------------------------------------------------------------------------------------------

def measure(codec: Any, splits: dict[str, Split], about: dict[str, Any], options: argparse.Namespace) -> None:
    """Train one model and append what it can do to the CSV."""
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    start, task = time.perf_counter(), about["task"]
    model = build(splits["train"].tokens.vocab, about["layout"], options.seed)
    train(model, splits["train"], task, options)
    about = {**about, "parameters": sum(p.numel() for p in model.parameters()), "minutes": (time.perf_counter() - start) / 60}
    for split in ("known", "new"):
        found = reading(model, splits[split]) if task == "read" else writing(model, splits[split], splits["train"])
        for row in found:
            append(options.out, {**about, "voices": split, **row, **versions(model.device, torch.float32)})
    if task == "write":
        sounds(codec, model, splits["known"], options.cache / f"wav-{about['codec']}-{about['layout']}-{about['n_q']}")


@torch.no_grad()
def reading(model: CodecLM, split: Split, size: int = 50) -> list[dict[str, Any]]:
    errors: list[Errors] = []
    for first in range(0, len(split.digits), size):
        tokens, digits = picked(split, range(first, min(first + size, len(split.digits))))
        prompt = model.expand([[model.audio_token_id, START]] * len(tokens), tokens, side="left")
        said = model.generate_text(**prompt, tokens=tokens, max_new_tokens=10, do_sample=False)
        for true, ids in zip(digits, said.tolist()):
            heard = list(itertools.takewhile(lambda i: i < 10, ids))
            errors.append(word_errors(letters(true), letters(heard)))
    digit, wrong = word_error_rate(errors), wilson(sum(e.edits > 0 for e in errors), len(errors))
    return [{"measure": name, "value": 100 * value, "low": 100 * low, "high": 100 * high, "n": len(errors)}
            for name, (value, low, high) in (("digit errors, %", digit[:3]), ("utterances with an error, %", wrong))]


def letters(digits: Sequence[int]) -> str:
    """A word for each, which the normaliser of numbers leaves alone."""
    return " ".join("bcdfghjklm"[i] for i in digits)


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float, float]:
    """A share and its 95 % interval."""
    centre, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return k / n, max(0.0, centre - half), min(1.0, centre + half)


@torch.no_grad()
def writing(model: CodecLM, split: Split, trained: Split, size: int = 50) -> list[dict[str, Any]]:
    """Bits a code of each book, the sound's end left out, and of all books together as kbit/s."""
    sums = torch.zeros(len(split.digits), model.n_q, dtype=torch.float64)                               # bits
    for first in range(0, len(sums), size):
        tokens, _ = picked(split, range(first, min(first + size, len(sums))))
        out = model(**model.expand([[model.audio_token_id]] * len(tokens), tokens), tokens=tokens)
        for k, (logits, targets) in enumerate(zip(out.code_logits, out.code_targets)):
            bits = torch.nn.functional.cross_entropy(logits, targets, reduction="none").double() / math.log(2)
            recording = torch.repeat_interleave(torch.arange(len(tokens)), tokens.lengths + (k == 0))
            sums[first:first + len(tokens), k].index_add_(0, recording, bits * (targets < model.vocab[k]))
    counts = split.tokens.lengths.double()
    simple = torch.stack([unigram(split.tokens, trained.tokens, k) for k in range(model.n_q)], 1)
    rows = []
    for k, nominal in enumerate(split.tokens.bits):
        value, low, high = ratio(sums[:, k], counts)
        rows.append({"measure": "bits a code", "book": k, "value": value, "low": low, "high": high, "n": len(sums),
                     "unigram": ratio(simple[:, k], counts)[0], "nominal": nominal})
    kilo = split.tokens.rate / 1000
    value, low, high = (kilo * x for x in ratio(sums.sum(1), counts))
    return [*rows, {"measure": "kbit/s", "value": value, "low": low, "high": high, "n": len(sums),
                    "unigram": kilo * ratio(simple.sum(1), counts)[0], "nominal": split.tokens.kbps}]


def unigram(tokens: AudioTokens, trained: AudioTokens, k: int) -> Tensor:
    """Bits of each recording's codes of book k by how often a code occurs in training, each once more. (B,) float64"""
    counts = torch.bincount(trained.codes[:, k][trained.mask], minlength=trained.vocab[k]).double() + 1
    bits = -(counts / counts.sum()).log2()
    return (bits[tokens.codes[:, k]] * tokens.mask).sum(1)


def ratio(sums: Tensor, counts: Tensor, draws: int = 2000) -> tuple[float, float, float]:
    """Sum over sum, with a percentile bootstrap over recordings."""
    picks = np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))
    a, b = sums.numpy(), counts.numpy()
    low, high = np.percentile(a[picks].sum(1) / b[picks].sum(1), (2.5, 97.5))
    return float(a.sum() / b.sum()), float(low), float(high)


def sounds(codec: Any, model: CodecLM, split: Split, folder: Path, count: int = 4) -> None:
    """WAV files: half a second of a held-out utterance and how the model goes on, and the utterance itself as decoded."""
    tokens, _ = picked(split, range(count))
    begun = tokens.cut(0, 0.5)
    said = model.continue_sound(begun, seconds=3.0, temperature=0.9, generator=torch.Generator().manual_seed(0))
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in (("written", said), ("spoken", tokens)):
        for i, sound in enumerate(detokenize(codec, some)):
            with wave.open(str(folder / f"{i}-{name}.wav"), "wb") as file:
                file.setparams((1, 2, sound.sample_rate, 0, "NONE", ""))
                file.writeframes((sound.samples.clamp(-1, 1) * 32767).short().numpy().tobytes())


# tables ---------------------------------------------------------------------------------------------------------------

def append(path: Path, row: dict[str, Any]) -> None:
    fields = [*COLUMNS, *(key for key in row if key not in COLUMNS)]
    new = not path.is_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if new:
            writer.writeheader()
        writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})


def known(path: Path, about: dict[str, Any]) -> bool:
    """Whether rows of both groups of voices are there."""
    if not path.is_file():
        return False
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row[key] == str(value) for key, value in about.items())]
    return {row["voices"] for row in rows} == {"known", "new"}


def _number(text: str) -> Any:
    try:
        return float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        return text or None


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Digit errors over the number of books, and bits a code of each book, a line a codec."""
    from mmcompress.viz.figure import SOFT, new_figure, quiet, save

    figure = new_figure(9, 3.6)
    panels = (("digit errors, %", "n_q", "books read"), ("bits a code", "book", "book"))
    for i, (measured, x, label) in enumerate(panels):
        ax = figure.add_axes((0.08 + 0.5 * i, 0.16, 0.4, 0.76))
        some = [r for r in rows if r["measure"] == measured]
        if measured == "bits a code":
            some = [r for r in some if r["n_q"] == max(r["n_q"] for r in some)]
        for codec, who in sorted({(str(r["codec"]), r["voices"]) for r in some}):
            mine = sorted((r for r in some if (str(r["codec"]), r["voices"]) == (codec, who)), key=lambda r: r[x])
            value = [float(r["value"]) for r in mine]
            [line] = ax.plot([r[x] for r in mine], value, "o-" if who == "known" else "o--", markersize=4, linewidth=1.4,
                             label=f"{codec}, {who} voices")
            ax.fill_between([r[x] for r in mine], [float(r["low"]) for r in mine], [float(r["high"]) for r in mine], alpha=0.1,
                            color=line.get_color(), linewidth=0)
        ax.set_xlabel(label, color=SOFT, fontsize=9)
        ax.set_ylabel(measured, color=SOFT, fontsize=9)
        ax.set_xticks(sorted({r[x] for r in some}))
        quiet(ax)
        if some:
            ax.legend(frameon=False, fontsize=7)
    save(figure, path)


if __name__ == "__main__":
    main()
