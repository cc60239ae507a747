"""What the methods of video_parity.py share: the authors' functions, clips, and whether two selections are the same."""

from __future__ import annotations

import ast
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcompress.tokens import Tokens, VideoLayout

TIED = 1e-6         # scores this near, in float64, are in an order that float32 decides


def load(path: Path, names: Sequence[str], repository: str, **scope: Any) -> dict[str, Any]:
    """The named functions and constants of a file's top level, compiled without importing the file."""
    wanted = set(names)
    body: list[ast.stmt] = []
    for node in ast.parse(path.read_text()).body:
        name = node.name if isinstance(node, ast.FunctionDef) else \
            node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else ""
        if name in wanted:
            body.append(node)
            wanted.discard(name)
    if wanted:
        raise ValueError(f"{path}: no {', '.join(sorted(wanted))}; pass a checkout of github.com/{repository}")
    exec(compile(ast.Module(body=body, type_ignores=[]), str(path), "exec"), scope)
    return scope


def clip(frames: int, grid: tuple[int, int], width: int, seed: int) -> Tokens:
    """One clip, (1, T * P, D) float32: places that move from frame to frame, some often, flicker, a cut every seven frames."""
    g = torch.Generator().manual_seed(seed + 1000 * frames + 100_000 * grid[0] * grid[1])
    cells = grid[0] * grid[1]
    often = torch.linspace(0, 0.6, cells)[torch.randperm(cells, generator=g), None]
    out: list[Tensor] = []
    now = torch.zeros(cells, width)
    for t in range(frames):
        if t % 7 == 0:
            now = 0.5 * torch.randn(cells, width, generator=g) + torch.randn(1, width, generator=g)
        moves = torch.rand(cells, 1, generator=g) < often
        now = now + moves * torch.randn(cells, width, generator=g) + 0.1 * torch.randn(cells, width, generator=g)
        out.append(now)
    return Tokens(torch.cat(out)[None], VideoLayout(frames, grid))


def positions(kept: Tensor, features: Tensor) -> list[int]:
    """Which rows of `features` (N, D), all of them different, the rows `kept` (K, D) are, in their order."""
    number = {row.tobytes(): i for i, row in enumerate(features.numpy())}
    return [number[row.tobytes()] for row in kept.contiguous().numpy()]


def verdict(ours: Sequence[int], theirs: Sequence[int], scores: Tensor, cells: int, halves: Collection[int] = ()
            ) -> dict[str, Any]:
    """Whether two selections are the same set; "tied" where they differ, within frames, by cells of equal score only.

    scores (N,) float64, by which cells of a frame are ranked; halves: frames whose budget ends in a half, so that one cell more
    or less is a matter of rounding
    """
    swapped = sorted(set(ours) ^ set(theirs))
    gap = 0.0
    for frame in {i // cells for i in swapped}:
        of = [i for i in swapped if i // cells == frame]
        if frame in halves and len(of) == 1:
            continue
        here = len(set(of) & set(ours))
        gap = max(gap, float(scores[of].max() - scores[of].min()) if 2 * here == len(of) else torch.inf)
    return {"kept": len(ours), "kept_theirs": len(theirs), "identical": not swapped, "tied": bool(swapped) and gap < TIED}
