"""Sound files to code files, the work of `mmcompress tokenize`: the model, one file, and processes that share many.

Each worker is a process with the model and its share of torch's threads. It dies with its parent, whatever kills that one, and
a file that kills its worker is one that failed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tokenized import Entry, Job, write_codes

NOT_THE_MODEL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")      # of a configuration
Answer = tuple[Job, Entry | str]        # a job, and what became of it: its line of the manifest, or why there is none


@dataclass(frozen=True)
class Task:
    """What a process must know to do a job."""

    model: str
    device: str
    out: Path
    n_q: int
    chunk: float
    context: float | None


def load_codec(model: str, device: str) -> Any:
    """The Codec of a checkpoint, float32 and in eval mode, on its device; raises ValueError or OSError with what is wrong."""
    import torch
    import transformers

    from .audio.codec.families import FAMILIES, codec_of
    from .checkpoint import _quiet
    from .errors import UnsupportedModelError

    _quiet()
    kind = transformers.AutoConfig.from_pretrained(model).model_type
    if kind not in FAMILIES:
        raise UnsupportedModelError(f"--model {model} is of model_type {kind!r}, no codec that is known: {', '.join(FAMILIES)}")
    return codec_of(transformers.AutoModel.from_pretrained(model, dtype=torch.float32).to(device).eval())


def fingerprint(model: Any) -> str:
    """Of the configuration and every weight, wherever they lie: 16 hexadecimal digits."""
    import torch

    config = _of_the_model(model.config.to_diff_dict())
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _of_the_model(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _of_the_model(value) for key, value in config.items() if key not in NOT_THE_MODEL}
    return config


def encode(job: Job, model: Any, task: Task) -> Entry | str:
    """Write the codes of one file; why not, if it cannot be read or encoded. Raises OSError where they cannot be written."""
    from .audio.codec.chunked import tokenize_chunked

    try:
        before = os.stat(job.source)
        tokens = tokenize_chunked(model, job.source, chunk=task.chunk, context=task.context, n_q=task.n_q)
    except Exception as e:                                              # whatever is wrong with one file, the others go on
        return next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
    size = write_codes(tokens, task.out, job.file)
    return Entry(job.source, job.file, round(float(tokens.seconds), 6), int(tokens.lengths), tokens.n_q, round(tokens.kbps, 6),
                 before.st_size, before.st_mtime_ns, size)


def by_myself(jobs: Sequence[Job], model: Any, task: Task) -> Generator[Answer, None, None]:
    """The answers in order, from this process."""
    for job in jobs:
        yield job, encode(job, model, task)


def by_workers(jobs: Sequence[Job], count: int, task: Task) -> Generator[Answer, None, None]:
    """The answers as they come, from so many processes; they have ended when this has, however it does."""
    from multiprocessing import connection

    import torch

    waiting, pool = deque(jobs), dict[Any, tuple[Any, Job | None]]()    # the parent's end -> (process, what it does)
    threads = max(1, torch.get_num_threads() // count)
    try:
        for _ in range(count):
            _start(pool, task, threads)
        while pool:
            end: Any
            for end in connection.wait(list(pool)):
                process, job = pool[end]
                try:
                    answer = end.recv()
                except (EOFError, OSError):
                    answer = _ended(process, job)
                    del pool[end]
                    if waiting:
                        _start(pool, task, threads)
                if isinstance(answer, Exception):
                    raise answer
                if end in pool:
                    _give(pool, end, waiting)
                if job is not None:
                    yield job, answer
    finally:
        for process, _ in pool.values():
            process.kill()
        for process, _ in pool.values():
            process.join()


def _start(pool: dict[Any, tuple[Any, Job | None]], task: Task, threads: int) -> None:
    import multiprocessing

    context = multiprocessing.get_context("spawn")                      # a fork would inherit torch's threads, locked
    ours, theirs = context.Pipe()
    process = context.Process(target=_worker, args=(theirs, task, threads), daemon=True)
    with handling(signal.SIGINT, signal.SIG_IGN):                        # which it inherits: Ctrl-C is for the parent
        process.start()
    theirs.close()
    pool[ours] = process, None


def _give(pool: dict[Any, tuple[Any, Job | None]], end: Any, waiting: deque[Job]) -> None:
    """The next job for a worker, or its end."""
    process, _ = pool.pop(end)
    if not waiting:
        end.close()
        process.join()
        return
    job = waiting.popleft()
    with contextlib.suppress(BrokenPipeError):                          # seen when its answer is read
        end.send(job)
    pool[end] = process, job


def _ended(process: Any, job: Job | None) -> str | Exception:
    process.join()
    if job is None:
        return OSError(f"a worker ended with exit code {process.exitcode} while it loaded the model: fewer --workers take less "
                       "memory")
    return f"its worker ended with exit code {process.exitcode} (-9: there may be too little memory for so many --workers)"


def _worker(end: Any, task: Task, threads: int) -> None:
    """Answers jobs until there are none; the first answer, None, says that the model is loaded."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        import torch

        torch.set_num_threads(threads)
        model = load_codec(task.model, task.device).model
        end.send(None)
        while True:
            end.send(encode(end.recv(), model, task))
    except EOFError:
        return
    except Exception as e:
        end.send(OSError(str(e)))


def _end_with_parent() -> None:
    from multiprocessing import connection, parent_process

    parent: Any = parent_process()
    connection.wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def handling(number: int, handler: Any) -> Iterator[None]:
    """Handle a signal so meanwhile; only the main thread can, and what is ignored (under nohup, say) remains so."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
