"""HoliTom beside its authors' code, on random clips, at their own counts.

The methods that reduce a clip are compiled out of their llava_arch.py; the few lines that call them, within
`prepare_inputs_labels_for_multimodal`, are written again. The noise of 1e-6 on densities is switched off. D is 0, since their
code raises for more. They put a window's static tokens before its frames; here both sides are sorted by cell.
"""

from __future__ import annotations

import ast
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcompress.ops.segments import cell_likeness
from mmcompress.video.holitom import first_of_window, merge_windows, static_windows

from .video_fastvid import Silent, random_clip

FILE = "HoliTom/holitom/llava_arch.py"
METHODS = ("cluster_dpc_knn", "select_static_windows", "merge_tokens_by_clustering", "merge_tokens_by_attention_density",
           "merge_tokens_by_density", "holitom", "get_static_dynamic_features")
SIZES = ((1, 6), (2, 14), (8, 6), (16, 6), (16, 14), (32, 6), (32, 14), (64, 13))           # frames, side of a frame
SETTINGS = ((0.1, 0.65), (0.15, 0.8), (0.25, 0.8), (0.6, 0.5))                              # and threshold; the last clips at 1
BETA, NEIGHBOURS, WINDOW = 0.6, 7, 1024                                                     # their defaults


def load(authors: Path) -> dict[str, Any]:
    """Their methods by name, as functions of an owner."""
    path = authors / FILE
    found = {node.name: node for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.FunctionDef) and node.name in METHODS}
    if missing := sorted(set(METHODS) - set(found)):
        raise ValueError(f"{path}: no {', '.join(missing)}; pass the folder that holds github.com/cokeshao/HoliTom")
    scope: dict[str, Any] = {"torch": Silent(), "math": math}
    exec(compile(ast.Module(list(found.values()), []), str(path), "exec"), scope)
    return {name: scope[name] for name in METHODS}


class Owner(SimpleNamespace):
    """What their methods call `self`; it notes the positions that the merging methods return and `holitom` drops."""

    def __init__(self, methods: dict[str, Any]):
        super().__init__(model=SimpleNamespace(image_newline=torch.zeros(1)), **{
            name: method.__get__(self) for name, method in methods.items()})
        self.static, self.others = torch.empty(0), torch.empty(0)
        by_density, by_attention = methods["merge_tokens_by_density"], methods["merge_tokens_by_attention_density"]

        def static(*arguments: Any) -> Any:
            out = by_density(self, *arguments)
            self.static = out[1]
            return out

        def others(*arguments: Any) -> Any:
            out = by_attention(self, *arguments)
            self.others = out[1]
            return out

        self.merge_tokens_by_density: Any = static
        self.merge_tokens_by_attention_density: Any = others


def theirs(methods: dict[str, Any], frames: Tensor, attention: Tensor, ratio: float, threshold: float
           ) -> tuple[Tensor, Tensor, list[tuple[int, int]], float]:
    """Tokens kept of a clip (T, P, D) by cell, the cells, the windows (first, last), and the ratio that is left for them."""
    owner = Owner(methods)
    t, p, _ = frames.shape
    normed = F.normalize(frames, p=2, dim=-1)
    likeness = F.cosine_similarity(normed[:-1], normed[1:], dim=-1)
    windows, reduced = owner.select_static_windows(likeness, t, threshold, WINDOW)
    ratio = min(ratio / ((t * p - reduced) / (t * p)), 1)
    static, others, _, salience, static_at, others_at = owner.get_static_dynamic_features(frames, attention, windows, likeness,
                                                                                          threshold)
    tokens, cells = [], []
    for i, (first, last) in enumerate(windows):
        owner.static = torch.empty(1, 0)
        tokens.append(owner.holitom(static[i], others[i], salience[i], static_at[i], others_at[i], last - first + 1, ratio, 0.0,
                                    BETA, NEIGHBOURS, frames.dtype, "one_token"))
        cells += [first * p + owner.static.flatten(), (torch.arange(first, last + 1)[:, None] * p + owner.others).flatten()]
    cell, order = torch.cat(cells).long().sort()
    return torch.cat(tokens)[order], cell, windows, ratio


def cases(authors: Path, seeds: int) -> list[dict[str, Any]]:
    methods = load(authors)
    found = []
    for t, side in SIZES:
        for ratio, threshold in SETTINGS:
            for seed in range(seeds):
                frames, attention = random_clip(t, side * side, 1000 * seed + t)
                tokens, cells, windows, rescaled = theirs(methods, frames, attention, ratio, threshold)
                segments, static = static_windows(cell_likeness(frames[None]), threshold, WINDOW)
                once = first_of_window(segments, static)
                size = torch.stack([once.sum(2), (~static).sum(2)], 2)                      # (1, T, 2)
                counts = torch.tensor([[round(s * rescaled), math.ceil(d * rescaled)] for s, d in size[0].tolist()])
                ours = merge_windows(frames[None], attention[None], static, once, torch.zeros_like(static), counts[None],
                                     int(counts.sum()), BETA, NEIGHBOURS)
                begins = sorted(set(segments.first[0].tolist()))
                same = begins == [first for first, _ in windows] and torch.equal(ours.index[0], cells)
                found.append({"method": "HoliTom", "tokens": len(cells), "identical": same,
                              "case": f"{t} frames of {side} x {side}, ratio {ratio}, threshold {threshold}, seed {seed}",
                              "difference": float((ours.tokens[0] - tokens).abs().max()) if same else float("nan")})
    return found
