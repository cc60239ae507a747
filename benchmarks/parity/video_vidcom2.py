"""VidCom2 beside its authors' code, `vidcom2_compression` as it is called for Qwen2-VL (any grid, one clip).

Ours gets their total as its budget: the sum of their rounded frame budgets, which the data decide. Where a frame's budget ends
in a half (two frames of 36 cells at a quarter: 4.5 and 13.5) they round to even, and ours gives the seat to the earlier frame:
the case counts as tied.
"""

from __future__ import annotations

import typing
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mmcompress.video.vidcom2 import VidCom2

from .video_case import clip, load, positions, verdict

NAMES = ("MODEL_SPECS", "vidcom2_compression", "select_low_var_channels", "compute_gaussian_scores", "_multi_scale_gaussian",
         "compute_scales", "select_outlier_indices", "map_features", "_map_linear_offset", "_map_grid_vid")
FRAMES, GRIDS, RATES, WIDTH = (1, 2, 8, 16, 31, 32), ((6, 6), (13, 13), (14, 14)), (0.1, 0.25, 0.5, 0.75), 96


def cases(authors: Path, seeds: int) -> list[dict[str, Any]]:
    code = load(authors / "VidCom2/token_compressor/vidcom2/vidcom2.py", NAMES, "xuyang-liu16/VidCom2", torch=torch, F=F,
                **{name: getattr(typing, name) for name in ("Any", "Dict", "List", "Optional", "Tuple")})
    rows = []
    for frames, grid, rate, seed in product(FRAMES, GRIDS, RATES, range(seeds)):
        x = clip(frames, grid, WIDTH, seed)
        features, cells = x.features[0], x.layout.cells
        kept = code["vidcom2_compression"](features, "qwen2_vl", rate, frame_token_len=cells)
        theirs = positions(kept, features)
        out = VidCom2(keep=len(theirs))(x)
        clip_score, frame_score = code["compute_gaussian_scores"](code["select_low_var_channels"](features.double()), cells)
        budgets = code["compute_scales"](-clip_score.mean(dim=-1), rate) * cells
        halves = ((budgets % 1 - 0.5).abs() < 1e-4).nonzero()[:, 0].tolist()
        found = verdict(out.index[0].tolist(), theirs, (clip_score + frame_score).flatten(), cells, halves)
        rows.append({"method": "VidCom2(keep=their total)", "frames": frames, "cells": cells, "keep": rate, "seed": seed,
                     **found, "difference": float((out.tokens[0] - kept).abs().max()) if found["identical"] else None})
    return rows
