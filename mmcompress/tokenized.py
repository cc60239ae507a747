"""What `mmcompress tokenize` leaves behind: code files, a manifest of what is finished, and the settings that all share.

    settings.json                   the model's name and fingerprint, n_q, chunk, context
    manifest.jsonl                  one line per finished source, an `Entry`
    corpus/a/b.wav.safetensors      AudioTokens.save's, of corpus/a/b.wav
    .unfinished/                    what is being written; gone when a run has ended, or when the next one begins

A code file is written under .unfinished, put in place by one rename, and only then has its line. A source is finished if its
line says the size and the time of change that it has now, and its code file has as many bytes as that line says. Whatever ended
a run, the next one does all sources that are not, and no other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from .audio.codec.tokens import AudioTokens

SETTINGS, MANIFEST, UNFINISHED, SUFFIX = "settings.json", "manifest.jsonl", ".unfinished", ".safetensors"
FORMAT = "mmcompress.tokenize.1"
LONGEST = 255                           # bytes of a file's name on common file systems


@dataclass(frozen=True)
class Source:
    """A sound file, and where its codes go if nothing else is there: `name`, relative, without the suffix."""

    path: Path
    name: str


@dataclass(frozen=True)
class Job:
    """A source to be done: its absolute path, and its code file relative to the folder."""

    source: str
    file: str


@dataclass(frozen=True)
class Entry:
    """A line of the manifest.

    source           absolute path of the sound file; size (bytes) and mtime_ns are its own, before it was read
    file             the code file, relative to the folder, of so many bytes
    seconds, frames  of the codes, the last frame counted whole
    kbps             nominal
    """

    source: str
    file: str
    seconds: float
    frames: int
    n_q: int
    kbps: float
    size: int
    mtime_ns: int
    bytes: int


class CodeFolder:
    """The folder of a run, which no other run may write at the same time.

        with CodeFolder(out, settings) as folder:
            for job in folder.pending(sources):
                folder.add(entry)

    Raises ValueError where the folder holds codes of other settings, or another run is writing there.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, {"format": FORMAT, **settings}
        self.entries: dict[str, Entry] = {}                             # by source

    def __enter__(self) -> CodeFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = _lock(self.path)
        try:
            shutil.rmtree(self.path / UNFINISHED, ignore_errors=True)
            self._check_settings()
            self.entries = {entry.source: entry for entry in read_manifest(self.path)}
            self._write_manifest()                                      # without what a kill left half written
            self.manifest = (self.path / MANIFEST).open("a")
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *raised: Any) -> None:
        self.manifest.close()
        shutil.rmtree(self.path / UNFINISHED, ignore_errors=True)
        self._release()

    def pending(self, sources: Sequence[Source]) -> list[Job]:
        """Those of `sources` that are to be done; what is here of them is out of date and goes."""
        left = [source for source in sources if not self._finished(str(source.path))]
        old = [entry for source in left if (entry := self.entries.pop(str(source.path), None)) is not None]
        if old:
            self.manifest.close()
            self._write_manifest()
            self.manifest = (self.path / MANIFEST).open("a")
        for entry in old:
            (self.path / entry.file).unlink(missing_ok=True)
        return self._named(left)

    def add(self, entry: Entry) -> None:
        """Note what is finished, on disk before it returns."""
        self.entries[entry.source] = entry
        self.manifest.write(json.dumps(asdict(entry)) + "\n")
        self.manifest.flush()
        os.fsync(self.manifest.fileno())

    def _finished(self, source: str) -> bool:
        entry = self.entries.get(source)
        if entry is None:
            return False
        try:
            now, codes = os.stat(source), os.stat(self.path / entry.file)
        except OSError:
            return False
        return (now.st_size, now.st_mtime_ns, codes.st_size) == (entry.size, entry.mtime_ns, entry.bytes)

    def _named(self, sources: Sequence[Source]) -> list[Job]:
        """Names that no other source has, not even in other letters; who has one keeps it."""
        taken = {entry.file.casefold() for entry in self.entries.values()}
        jobs = []
        for source in sources:
            name = _fitting(source.name)
            if (name + SUFFIX).casefold() in taken:
                name = f"{_fitting(source.name, room=9)}.{_digest(str(source.path))}"
            taken.add((name + SUFFIX).casefold())
            jobs.append(Job(str(source.path), name + SUFFIX))
        return jobs

    def _check_settings(self) -> None:
        path = self.path / SETTINGS
        if not path.is_file():
            return _replace(path, json.dumps(self.settings, indent=2) + "\n", self.path)
        try:
            before = dict(json.loads(path.read_text()))
        except ValueError as e:
            raise ValueError(f"{path} is damaged ({e}): pass another --out") from None
        names = [name for name in self.settings if name != "model"]     # the same weights may lie elsewhere
        other = [name for name in names if before.get(name) != self.settings[name]]
        if "fingerprint" in other:
            other = ["model", *other]
        if other:
            was, now = (", ".join(f"{name}={of.get(name)}" for name in other) for of in (before, self.settings))
            raise ValueError(f"{self.path} holds codes of {was}, and this is {now}: pass another --out, or go on there with "
                             "the settings that it has")

    def _write_manifest(self) -> None:
        lines = [json.dumps(asdict(entry)) + "\n" for entry in self.entries.values()]
        _replace(self.path / MANIFEST, "".join(lines), self.path)

    def _release(self) -> None:
        if self.lock is not None:
            os.close(self.lock)


def read_manifest(folder: Path) -> Iterator[Entry]:
    """The lines of a folder's manifest, but for what a kill cut short."""
    path = folder / MANIFEST
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, TypeError):
            yield Entry(**json.loads(line))


def write_codes(tokens: AudioTokens, folder: Path, name: str) -> int:
    """Put a code file in its place whole or not at all. -> its bytes; raises OSError where it cannot be written."""
    part, place = _part(folder, SUFFIX), folder / name
    tokens.save(part)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    size = part.stat().st_size
    place.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, place)
    return size


def _replace(path: Path, text: str, folder: Path) -> None:
    part = _part(folder, ".txt")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _part(folder: Path, suffix: str) -> Path:
    """Where this process writes what is not whole yet."""
    scratch = folder / UNFINISHED
    scratch.mkdir(exist_ok=True)
    return scratch / f"{os.getpid()}{suffix}"


def _lock(folder: Path) -> int | None:
    """A descriptor that locks the folder until it is closed or its process has ended, None where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"another run is writing to {folder}: wait for it, or pass another --out") from None
    except OSError:                                                     # some network file systems
        pass
    return descriptor


def _fitting(name: str, room: int = 0) -> str:
    """`name`, its last part shortened if a file system would not take it with the suffix and `room` bytes more."""
    *folders, last = PurePath(name).parts
    most, raw = LONGEST - len(SUFFIX) - room, os.fsencode(last)
    if len(raw) > most:
        last = f"{os.fsdecode(raw[:most - 9]).encode(errors='ignore').decode()}.{_digest(name)}"
    return str(PurePath(*folders, last))


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]
