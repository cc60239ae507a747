"""DyCoke's first stage beside its authors' code, `dycole_ttm` of llava_arch.py.

The default is compared where both keep as many: where the last window of four frames is begun by two, so that their code is
what the paper says. Theirs leaves a frame's cells in the order of their similarity; sets are compared, and values in ours.
"""

from __future__ import annotations

import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mmcompress.video.dycoke import DyCoke

from .video_case import clip, load, positions, verdict

FRAMES, GRIDS, RATES, WIDTH = (5, 6, 7, 8, 16, 17, 18, 31, 32), ((6, 6), (13, 13), (14, 14)), (0.3, 0.5, 0.7), 96


def cases(authors: Path, seeds: int) -> list[dict[str, Any]]:
    code = load(authors / "DyCoke/llava/model/llava_arch.py", ("dycole_ttm",), "KD-TAO/DyCoke", torch=torch)
    rows = []
    for frames, grid, rate, seed in product(FRAMES, GRIDS, RATES, range(seeds)):
        x = clip(frames, grid, WIDTH, seed)
        features, cells = x.features[0], x.layout.cells
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                         # torch.tensor of a tensor
            kept = code["dycole_ttm"](features, cells, rate)
        theirs = positions(kept, features)
        number = torch.arange(frames)
        exact = F.cosine_similarity(x.frames[0].double(), x.frames[0].double()[number & (number - 1)], dim=-1).flatten()
        for paper_code in (True, False):
            reducer = DyCoke(rate=rate, paper_code=paper_code)
            if reducer.count(x.layout) != len(theirs):
                continue
            out = reducer(x)
            found = verdict(out.index[0].tolist(), theirs, exact, cells)
            same = found["identical"]
            rows.append({"method": "DyCoke(paper_code=True)" if paper_code else "DyCoke(), T = 4 n + 2", "frames": frames,
                         "cells": cells, "keep": 1 - rate, "seed": seed, **found,
                         "difference": float((out.tokens[0] - features[sorted(theirs)]).abs().max()) if same else None})
    return rows
