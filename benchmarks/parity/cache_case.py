"""What the lines of cache_parity.py share: tensors, public code without its imports, and whether two choices are the same."""

from __future__ import annotations
import __future__

import ast
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcompress.cache import CachePlan, CacheView
from mmcompress.cache.slots import slots_of
from mmcompress.cache.view import Sight

SHAPES = ((1, 2, 1, 40, 8), (2, 4, 1, 129, 16), (1, 2, 4, 257, 32), (2, 3, 2, 64, 64))      # B, H_kv, groups, N, d
SHARES = (0.3, 0.5, 0.9)

Scope = dict[str, Any]
Found = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """queries (B, H, G, N, d), keys and values (B, H, N, d), the first channel of a value being its column; keep a number"""

    queries: Tensor
    keys: Tensor
    values: Tensor
    keep: int

    @property
    def single(self) -> Case:
        """The same with one query head a key head."""
        return Case(self.queries[:, :, :1], self.keys, self.values, self.keep)

    @property
    def view(self) -> CacheView:
        batch, _, _, n, d = self.queries.shape
        return CacheView(slots=slots_of(self.keys, self.values), queries=self.queries, sight=Sight(None, 0),
                         real=torch.ones(batch, n, dtype=torch.bool), positions=torch.arange(n).expand(batch, -1),
                         scaling=d**-0.5, layer=0, depth=1)

    @property
    def maps(self) -> Tensor:
        """Attention, (B, H * G, N, N)."""
        n, d = self.keys.shape[2:]
        logits = self.queries @ self.keys[:, :, None].transpose(-1, -2) * d**-0.5
        return logits.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf).softmax(-1).flatten(1, 2)


def cases(seeds: int) -> Iterator[Case]:
    for seed in range(seeds):
        for i, shape in enumerate(SHAPES):
            for structured in (False, True):
                g = torch.Generator().manual_seed(1000 * seed + 10 * i + structured)
                queries, keys = walk(shape, g) if structured else noise(shape, g)
                values = torch.randn(keys.shape, generator=g)
                values[..., 0] = torch.arange(shape[3])
                for share in SHARES:
                    yield Case(queries, keys, values, int(shape[3] * share))


def noise(shape: Sequence[int], g: torch.Generator) -> tuple[Tensor, Tensor]:
    batch, heads, _, n, d = shape
    return torch.randn(*shape, generator=g), torch.randn(batch, heads, n, d, generator=g)


def walk(shape: Sequence[int], g: torch.Generator) -> tuple[Tensor, Tensor]:
    batch, heads, _, n, d = shape
    queries, keys = noise(shape, g)
    keys = 0.3 * keys.cumsum(2) + 2 * torch.randn(batch, heads, 1, d, generator=g)
    again = torch.randperm(n, generator=g)[:n // 8]
    keys[:, :, again] = keys[:, :, again // 2]                      # copies, so that scores tie
    keys[:, :, :4] *= 0.1
    seeks = keys[:, :, torch.randint(n, (n,), generator=g)]
    return queries + 0.5 * seeks[:, :, None], keys


def compiled(checkout: Path, sources: Mapping[str, tuple[str, ...]], standins: Scope) -> Scope:
    """The named functions, classes and constants of some files' top levels, compiled without importing the files.

    standins: what they use of that which is not here
    """
    scope = {"torch": torch, "nn": nn, "F": F, "math": math, "dataclass": dataclass, **standins}
    for file, names in sources.items():
        wanted, body, path = set(names), [], checkout / file
        for node in ast.parse(path.read_text() if path.is_file() else "").body:
            name = node.name if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else \
                node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else ""
            if name in wanted:
                body.append(node)
                wanted.discard(name)
        if wanted:
            raise SystemExit(f"{path}: no {', '.join(sorted(wanted))}; check out the commit that the results name")
        module = ast.Module(body=body, type_ignores=[])             # and annotations that name what is not here stay text
        exec(compile(module, str(path), "exec", __future__.annotations.compiler_flag), scope)
    return scope


def verdict(x: CacheView, plan: CachePlan, columns: Tensor, theirs: Tensor | None = None,
            adjust: Callable[[Tensor], Tensor] = lambda s: s) -> Found:
    """Ours beside theirs. columns (B, H, K) that they keep; theirs (B, H, M): their scores of the first M slots"""
    scores = adjust(plan.scores(x))
    mask = plan.evict(x, scores).mask
    found = choice(mask, torch.zeros_like(mask).scatter(2, columns.long(), True), scores)
    return {**found, "difference": None} if theirs is None else scored(found, scores[..., :theirs.shape[-1]], theirs)


def scored(found: Found, ours: Tensor, theirs: Tensor) -> Found:
    """What was found of a choice, once the scores are compared too."""
    difference = far(ours, theirs)
    if difference > 1e-4 * float(theirs.abs().max()):
        found = {"equal": False, "tied": False}
    return {**found, "difference": difference}


def choice(ours: Tensor, theirs: Tensor, scores: Tensor) -> Found:
    """Whether two selections are equal, or tied. ours, theirs (..., N) bool, scores (..., N)"""
    swapped = ours ^ theirs
    high = scores.masked_fill(~swapped, -torch.inf).amax(-1)
    low = scores.masked_fill(~swapped, torch.inf).amin(-1)
    near = (high - low <= 1e-7 + 1e-5 * high.abs()) | ~swapped.any(-1)
    same = ours.sum(-1) == theirs.sum(-1)
    return {"equal": not swapped.any(), "tied": bool(swapped.any() and (near & same).all())}


def far(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def close(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-5) -> Found:
    """Tensors in place of a choice: equal within `tolerance`, relative to the largest."""
    if any(a.shape != b.shape for a, b in zip(ours, theirs)):
        return {"equal": False, "tied": False, "difference": None}
    worst = max(far(a, b) / max(1.0, float(b.abs().max())) for a, b in zip(ours, theirs))
    return {"equal": worst <= tolerance, "tied": False, "difference": max(far(a, b) for a, b in zip(ours, theirs))}
