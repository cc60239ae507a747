"""What a run leaves behind: seconds that count, a log of rows, and the checkpoint it resumes from."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

LOG, STATE = "log.jsonl", "state.pt"
FREE = ("eval", "log_every", "save_every", "data.workers")      # may differ between a run and its continuation


class Clock:
    """Seconds of training on the wall and of this process's processor; what runs inside `paused` does not count.

    On a shared machine the wall's seconds depend on the neighbours, the processor's hardly do.
    """

    def __init__(self, device: torch.device, seconds: float = 0.0, cpu_seconds: float = 0.0) -> None:
        self.device, self.spent = device, (seconds, cpu_seconds)
        self.start()

    def start(self) -> None:
        """Count from now on."""
        self.since = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """-> {"seconds": ..., "cpu_seconds": ...} of a running clock"""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter(), time.process_time()
        return dict(zip(("seconds", "cpu_seconds"), (s + n - b for s, n, b in zip(self.spent, now, self.since))))

    @contextmanager
    def paused(self) -> Iterator[dict[str, float]]:
        """Yields the seconds at which the clock stands."""
        stands = self.read()
        self.spent = stands["seconds"], stands["cpu_seconds"]
        try:
            yield stands
        finally:
            self.start()


class Log:
    """Rows of log.jsonl, one JSON object a line; a continuation drops the rows after its step."""

    def __init__(self, folder: Path, step: int, writes: bool) -> None:
        self.path, self.writes, self.rows = folder / LOG, writes, list[dict[str, Any]]()
        if writes:
            self.rows = [r for r in read_log(self.path) if r["step"] <= step] if step else []
            self.path.write_text("".join(json.dumps(r) + "\n" for r in self.rows))

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a log.jsonl; a last line that was cut off is left out."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint in one move: a run killed while writing leaves the old one whole."""
    torch.save(state, folder / f"{STATE}.new")
    (folder / f"{STATE}.new").replace(folder / STATE)


def read_state(folder: Path, recipe: dict[str, Any], processes: int, resume: bool) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None at a start; raises ValueError if it belongs to something else."""
    if not (folder / STATE).is_file():
        return None
    if not resume:
        raise ValueError(f"{folder} holds a run already; pass --resume to go on with it, or another --out")
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    old, new = _flat(state["recipe"]), _flat(recipe)
    changed = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k) and not k.startswith(FREE)]
    if changed:
        told = ", ".join(f"{k} ({old.get(k)!r} then, {new.get(k)!r} now)" for k in changed)
        raise ValueError(f"{folder} was trained with another recipe: {told}; use the old values, or another --out")
    if state["processes"] != processes:
        raise ValueError(f"{folder} was trained by {state['processes']} processes, this is {processes}; "
                         f"launch as many, the stream of scenes depends on it")
    return state


def _flat(tree: dict[str, Any], where: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    out = {}
    for key, value in tree.items():
        out.update(_flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value})
    return out
