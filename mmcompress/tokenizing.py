"""`mmcompress tokenize`: thousands of sound files to code files. encoding.py does the work, tokenized.py keeps the folder.

Each file is read by its path and encoded by `tokenize_chunked`, so that memory does not grow with its length, and its codes are
what that gives. The parent alone writes the manifest.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .audio.reading.files import within
from .checkpoint import device_of
from .encoding import Answer, Task, by_myself, by_workers, fingerprint, handling, load_codec
from .tokenized import CodeFolder, Source


@dataclass
class Result:
    """What became of the files.

    n_q, kbps        books, and their nominal rate
    seconds, tokens  of the sound that this run has done; `took` is how long that took, from the first file on
    failures         source and reason of each
    interrupted      the signal that ended the run early
    """

    out: str
    model: str
    n_q: int
    kbps: float
    done: int = 0
    skipped: int = 0
    seconds: float = 0.0
    tokens: int = 0
    took: float = 0.0
    failures: list[dict[str, str]] = field(default_factory=list)
    interrupted: int | None = None

    @property
    def realtime(self) -> float:
        """Seconds of sound a second."""
        return self.seconds / self.took if self.took else 0.0

    @property
    def exit_code(self) -> int:
        return 128 + self.interrupted if self.interrupted else int(bool(self.failures))

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "failed": len(self.failures), "realtime": self.realtime}

    def __str__(self) -> str:
        return (f"{self.done} files done, {self.skipped} skipped, {len(self.failures)} failed\n"
                f"{self.seconds / 3600:.3g} hours of sound, {self.tokens:,} tokens, {self.n_q} a frame, nominally "
                f"{self.kbps:.4g} kbps, {self.realtime:.3g} x realtime\n{self.out}")


def tokenize_files(files: Sequence[Path], model: str, out: Path, *, n_q: int | None = None, kbps: float | None = None,
                   tokens_per_second: float | None = None, workers: int = 1, device: str = "auto", chunk: float = 60.0,
                   context: float | None = None) -> Result:
    """Write the codes of sound files, and of all in folders, into `out`, but for those that are there; options of `tokenize`.

    Raises ValueError or OSError where nothing can be done: no such file, no codec, codes of other settings in `out`, a folder
    that cannot be written. A file that cannot be read is among the result's failures.
    """
    from .audio.codec.chunked import _contexts, _frames
    from .audio.codec.codec import books_for

    sources = find(files)
    device = device_of(device)
    if workers < 1 or (workers > 1 and device != "cpu"):
        raise ValueError(f"--workers {workers}: at least 1" if workers < 1 else
                         f"--workers {workers}: on {device} one process does the work; leave it out, or pass --device cpu")
    codec = load_codec(model, device)
    books = books_for(codec.vocab, codec.rate, n_q=n_q, kbps=kbps, tokens_per_second=tokens_per_second)
    _frames("chunk", chunk, codec.rate)                                 # refuse now what every file would
    _contexts(context, None, codec.rate)
    task = Task(model, device, out.absolute(), books, chunk, context)
    settings = {"model": model, "fingerprint": fingerprint(codec.model), "n_q": books, "chunk": chunk, "context": context}
    result = Result(str(out), model, books, codec.rate * math.log2(math.prod(codec.vocab[:books])) / 1000)
    stop = Stop()
    with CodeFolder(out, settings) as folder, handling(signal.SIGINT, stop), handling(signal.SIGTERM, stop):
        try:
            jobs = folder.pending(sources)
            result.skipped = len(sources) - len(jobs)
            workers = min(workers, len(jobs))
            answers = by_workers(jobs, workers, task) if workers > 1 else by_myself(jobs, codec.model, task)
            del codec                                                   # workers have their own
            with contextlib.closing(answers):
                _collect(answers, folder, result, len(sources), stop)
        except KeyboardInterrupt:
            result.interrupted = stop.number or int(signal.SIGINT)
    return result


def find(files: Sequence[Path]) -> list[Source]:
    """The files, and those in folders that have a sound's suffix, each once. Codes of FOLDER/a/b.wav go to FOLDER/a/b.wav.

    Hidden files are passed over, and links to folders. Raises ValueError for what does not exist and a folder without sound.
    """
    found: dict[str, Source] = {}
    for given in files:
        path = Path(os.path.abspath(given))
        if path.is_dir():
            paths = [(p, str(Path(path.name, p.relative_to(path)))) for p in within(path)]
        elif path.exists():
            paths = [(path, path.name)]
        else:
            raise ValueError(f"{given} does not exist (looked in {Path.cwd()}): pass sound files and folders")
        for p, name in paths:
            found.setdefault(str(p), Source(p, name))
    return list(found.values())


class Stop:
    """Handles Ctrl-C and SIGTERM by breaking off what runs.

    soundfile's callbacks swallow that, and then the file that was being read seems to end there: so `check` raises again before
    an answer that came meanwhile is believed.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: Any) -> None:
        self.number = number
        raise KeyboardInterrupt

    def check(self) -> None:
        if self.number is not None:
            raise KeyboardInterrupt


def _collect(answers: Iterator[Answer], folder: CodeFolder, result: Result, files: int, stop: Stop) -> None:
    from tqdm import tqdm

    began = time.perf_counter()
    with tqdm(total=files, initial=result.skipped, unit="file", disable=None) as bar:
        for job, answer in answers:
            stop.check()
            if isinstance(answer, str):
                result.failures.append({"source": _printable(job.source), "reason": _printable(answer)})
            else:
                folder.add(answer)
                result.done += 1
                result.seconds += answer.seconds
                result.tokens += answer.frames * answer.n_q
            result.took = time.perf_counter() - began
            bar.set_postfix_str(f"{result.realtime:.3g} x realtime", refresh=False)
            bar.update()


def _printable(text: str) -> str:
    """Names of files need not be UTF-8."""
    return text.encode(errors="backslashreplace").decode()
