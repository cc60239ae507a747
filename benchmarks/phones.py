"""Which phone is spoken when in recorded speech: forced alignment of the corpus that speech.py makes, for probing tokens.

    pip install 'mmcompress[speech]' pocketsphinx==5.1.1
    python benchmarks/phones.py align corpus                # writes corpus/phones.json, in a minute or two
    python benchmarks/phones.py check                       # the aligner on synthesised speech, of which the phones are known

PocketSphinx (BSD-2-Clause) brings an American acoustic model and the CMU dictionary in its wheel. A clip is aligned in one
piece, with a pause allowed between words; a word that the dictionary lacks is spelt as espeak pronounces it. The labels are
the 39 phones of ARPAbet and SIL, which stands for pauses and noises. They say what a hidden Markov model of 10-ms frames found
for words that an actor may have strayed from, in any accent: good for a probe that compares codecs, too coarse for phonetics.

phones.json is {file of a clip: [[label, start, end], ...]}, in seconds, without holes from 0 to the end of the clip. Clips
that cannot be aligned are left out and named.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import print_table
from speech import RATE, Clip, read_corpus
from tqdm import tqdm

from mmcompress.audio.speech import PHONEMES, SILENCE, Utterance, draw, say, voices

FRAME, WINDOW = 0.01, 0.0256                    # seconds: the aligner's step, and what it hears at each
MARGIN = 0.2                                    # seconds of silence around what is synthesised
NATS = 1024 * math.log(1.0001)                  # of its unit of score


class Phone(NamedTuple):
    """`label` from `start` until before `end`, in seconds; `score` in nats below the best state of each frame, summed."""
    label: str
    start: float
    end: float
    score: float


def make_decoder(beam: float = 1e-120) -> Any:
    """A PocketSphinx with its own acoustic model and dictionary, for `align`. Its default beams lose the end of some clips, and
    its default `bestpath` adds an empty word that the second pass cannot place."""
    try:
        from pocketsphinx import Decoder
    except ImportError as e:
        raise ImportError("aligning needs PocketSphinx: pip install pocketsphinx==5.1.1") from e
    return Decoder(lm=None, loglevel="FATAL", bestpath=False, beam=beam, wbeam=beam, pbeam=beam)


def spoken(decoder: Any, text: str) -> list[str]:
    """The words of `text` as the decoder's dictionary has them, which gets those that it lacks."""
    words = []
    for word in re.findall(r"[a-z']+", text.lower()):
        if decoder.lookup_word(word) is None:
            word = word.strip("'")
        if word and decoder.lookup_word(word) is None:
            decoder.add_word(word, " ".join(p.label for p in say(word).phones if p.label != SILENCE), True)
        words += [word] if word else []
    return words


def align(decoder: Any, samples: np.ndarray, text: str) -> list[Phone]:
    """The phones of `text` in samples (T,) float at 16 kHz, without holes from 0 to the end.

    Raises ValueError if the text does not fit the sound.
    """
    words = spoken(decoder, text)
    decoder.reinit_feat(decoder.config)                             # or it would go on from the last clip's mean
    raw = (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
    try:
        decoder.set_align_text(" ".join(words))
        _hear(decoder, raw)
        decoder.set_alignment()                                     # the second pass: phones in the words that the first found
        _hear(decoder, raw)
        entries = [phone for word in decoder.get_alignment() for phone in word]
    except RuntimeError as e:
        raise ValueError(f"{text!r:.80} cannot be aligned with {len(samples) / RATE:.1f} s of sound: {e}") from e
    if {e.name for e in entries} <= {SILENCE}:
        raise ValueError(f"{text!r:.80} cannot be aligned with {len(samples) / RATE:.1f} s of sound: nothing was found in it")
    starts = [0.0] + [e.start * FRAME + (WINDOW - FRAME) / 2 for e in entries[1:]]      # frames are told by their middles
    ends = [*starts[1:], len(samples) / RATE]
    return _joined([Phone(e.name if e.name in PHONEMES else SILENCE, round(start, 4), round(end, 4), e.score * NATS)
                    for e, start, end in zip(entries, starts, ends) if end > start])


def _hear(decoder: Any, raw: bytes) -> None:
    decoder.start_utt()
    decoder.process_raw(raw, full_utt=True)
    decoder.end_utt()


def _joined(phones: list[Phone]) -> list[Phone]:
    """Neighbouring silences as one."""
    out = phones[:1]
    for p in phones[1:]:
        if p.label == SILENCE == out[-1].label:
            out[-1] = Phone(SILENCE, out[-1].start, p.end, out[-1].score + p.score)
        else:
            out.append(p)
    return out


def align_corpus(clips: Sequence[Clip]) -> tuple[dict[str, list[Phone]], dict[str, str]]:
    """(file -> phones, file -> why it has none)."""
    decoder, found, failed = make_decoder(), {}, {}
    for clip in tqdm(clips, unit="clip", desc="align"):
        try:
            found[clip.file] = align(decoder, clip.audio(), clip.text)
        except ValueError as e:
            failed[clip.file] = str(e)
    return found, failed


def summary(clips: Sequence[Clip], found: dict[str, list[Phone]]) -> list[dict[str, Any]]:
    """One row a source and one for all."""
    rows = []
    for source in [*dict.fromkeys(c.source for c in clips), "all"]:
        some = [c for c in clips if source in ("all", c.source)]
        phones = [p for c in some for p in found.get(c.file, ())]
        heard = [p for p in phones if p.label != SILENCE]
        if not heard:
            continue
        seconds = sum(p.end - p.start for p in phones)
        lengths = [1000 * (p.end - p.start) for p in heard]
        rows.append({"source": source, "clips": sum(c.file in found for c in some), "of": len(some), "minutes": seconds / 60,
                     "SIL %": 100 * (1 - sum(lengths) / 1000 / seconds), "phones": len(heard),
                     "median ms": statistics.median(lengths), "5 % ms": float(np.percentile(lengths, 5)),
                     "95 % ms": float(np.percentile(lengths, 95)),
                     "nats a frame": sum(p.score for p in heard) / sum(lengths) * 1000 * FRAME})
    return rows


# the check ------------------------------------------------------------------------------------------------------------


def frames(phones: Sequence[Any], count: int) -> np.ndarray:
    """(count,) the label in the middle of each 10 ms."""
    ends = [p.end for p in phones]
    at = np.searchsorted(ends, (np.arange(count) + 0.5) * FRAME, side="right")
    return np.array([phones[min(i, len(phones) - 1)].label for i in at])


def agreement(decoder: Any, said: Utterance) -> dict[str, Any]:
    """How the aligner's phones of synthesised speech compare with what the synthesiser played.

    frames, agree    10-ms frames in which it played a phone, and in how many of them the aligner has the same
    boundaries       (n,) ms, aligner minus synthesiser, where a phone begins that both have, in the longest common sequences
    """
    ours = [p._replace(start=p.start - MARGIN, end=p.end - MARGIN) for p in align(decoder, _recorded(said), said.text)]
    count = int(said.sound.seconds / FRAME)
    true, found = frames(said.phones, count), frames(ours, count)
    heard = true != SILENCE
    blocks = difflib.SequenceMatcher(None, [p.label for p in said.phones], [p.label for p in ours], False).get_matching_blocks()
    pairs = [(said.phones[a + i], ours[b + i]) for a, b, n in blocks for i in range(n)]
    return {"frames": int(heard.sum()), "agree": int((true == found)[heard].sum()),
            "boundaries": [1000 * (b.start - a.start) for a, b in pairs if a.start and b.start and a.label != SILENCE]}


def _recorded(said: Utterance) -> np.ndarray:
    """Its samples (T,) with MARGIN before and after and noise at -60 dBFS: a recording has no digital zeros."""
    x = np.pad(said.sound.samples.numpy(), int(MARGIN * RATE))
    return x + np.random.default_rng(0).normal(0, 1e-3, len(x)).astype(np.float32)


def check(sentences: int) -> list[dict[str, Any]]:
    """`agreement` on drawn sentences: in American voices, as the acoustic model is, and in all of them."""
    decoder, rows = make_decoder(), []
    for name, some in (("American", [v for v in voices() if v.partition("+")[0] == "en-us"]), ("all", list(voices()))):
        texts = [draw(f"check/{i}").text for i in range(sentences)]
        results = [agreement(decoder, say(t, some[i * 7 % len(some)])) for i, t in enumerate(tqdm(texts, desc=name))]
        offsets = np.array([ms for r in results for ms in r["boundaries"]])
        total = sum(r["frames"] for r in results)
        rows.append({"voices": name, "sentences": sentences, "frames": total,
                     "agree %": 100 * sum(r["agree"] for r in results) / total, "boundaries": len(offsets),
                     "median ms": float(np.median(offsets)), "median |ms|": float(np.median(abs(offsets))),
                     "within 20 ms %": 100 * float((abs(offsets) <= 20).mean())})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    aligning = commands.add_parser("align", help="write phones.json into a corpus")
    aligning.add_argument("corpus", type=Path)
    checking = commands.add_parser("check", help="how well the aligner does where the phones are known")
    checking.add_argument("--sentences", type=int, default=20)
    args = parser.parse_args(argv)
    if args.command == "check":
        rows = check(args.sentences)
        print_table("forced alignment of synthesised speech", rows, list(rows[0]))
        return 0
    clips = read_corpus(args.corpus)
    found, failed = align_corpus(clips)
    out = {file: [[p.label, p.start, p.end] for p in phones] for file, phones in found.items()}
    Path(args.corpus, "phones.json").write_text(json.dumps(out) + "\n")
    rows = summary(clips, found)
    print_table(f"phones of {len(found)} of {len(clips)} clips", rows, list(rows[0]))
    for file, why in failed.items():
        print(f"left out {file}: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
