"""FastVID beside its authors' code for LLaVA-Video, on random clips, at their own counts per frame.

The block that their `Qwen2Model.forward` runs on the input embeddings is compiled out of their file. In it the sizes
64 x 13 x 13 and the row length 14 are constants; they become the clip's, so that other sizes run too. The noise of 1e-6 on
densities is switched off. Their rows are closed by newlines, which they add back outside the budget; they are left out here.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmcompress.ops.segments import Segments, cut_least_alike, frame_likeness
from mmcompress.video.fastvid import density_anchors, gather_context, most_salient

FILE = "FastVID/fastvid_llavavideo/LLaVA-NeXT/llava/model/language_model/modeling_qwen2.py"
SIZES = ((8, 6), (9, 14), (16, 6), (16, 14), (32, 6), (32, 14), (64, 13))               # frames, side of a frame
RATIOS = (0.1, 0.25, 0.4)
SEGMENTS, THRESHOLD, CONTEXT, EVERY, BETA = 8, 0.9, 0.4, 4, 0.6                             # their defaults


class Silent:
    """torch without the noise that their densities get."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def rand(*size: Any, **options: Any) -> Tensor:
        return torch.zeros(*size, **options)


class Sizes(ast.NodeTransformer):
    """Constants of one model's clips as names: 64 frames, 13 patches in a row, 14 with the newline."""

    NAMES: ClassVar[dict[int, str]] = {64: "frames", 13: "side", 14: "row"}

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if type(node.value) is int and node.value in self.NAMES:
            return ast.copy_location(ast.Name(self.NAMES[node.value], ast.Load()), node)
        return node


def load(authors: Path) -> Callable[..., tuple[Tensor, Tensor, list[int]]]:
    """f(self, hidden_states, seq_length, frames, side, row) -> (tokens, positions, frames of each segment), as theirs."""
    path = authors / FILE
    blocks = [node for node in ast.walk(ast.parse(path.read_text()))
              if isinstance(node, ast.If) and ast.unparse(node.test) == "seq_length > 1" and "DySeg" in ast.unparse(node)]
    if len(blocks) != 1:
        raise ValueError(f"{path}: {len(blocks)} blocks of FastVID; pass the folder that holds github.com/LunarShen/FastVID")
    last = max(i for i, line in enumerate(blocks[0].body) if ast.unparse(line) == "keep_indexs = keep_indexs.sort().values")
    function = ast.parse("def block(self, hidden_states, seq_length, frames, side, row): pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    function.body = [Sizes().visit(line) for line in blocks[0].body[:last + 1]]
    function.body += ast.parse("return hidden_states, keep_indexs, segment_sizes").body
    scope: dict[str, Any] = {"torch": Silent()}
    exec(compile(ast.fix_missing_locations(ast.Module([function], [])), str(path), "exec"), scope)
    return scope["block"]


def theirs(block: Callable[..., tuple[Tensor, Tensor, list[int]]], frames: Tensor, attention: Tensor, ratio: float
           ) -> tuple[Tensor, Tensor, list[int]]:
    """Tokens kept of a clip (T, P, D), their cells, and the frames of each segment."""
    t, p, width = frames.shape
    side = int(p ** 0.5)
    rows = torch.cat([frames.view(t, side, side, width), torch.zeros(t, side, 1, width)], 2).view(1, -1, width)
    model = SimpleNamespace(
        video_start_idx=0, video_token_len=rows.shape[1], frame_num=t, frame_attn_weights=attention,
        frame_global_features=frames.mean(1), fastvid_retention_ratio=ratio, fastvid_DySeg_c=SEGMENTS,
        fastvid_DySeg_tau=THRESHOLD, fastvid_STPrune_d=CONTEXT, fastvid_DTM_p=EVERY, fastvid_DTM_beta=BETA)
    tokens, place, sizes = block(model, rows, rows.shape[1], t, side, side + 1)
    shown = place % (side + 1) < side
    return tokens[0, shown], (place // (side + 1) * side + place % (side + 1))[shown], sizes


def their_counts(sizes: list[int], p: int, ratio: float) -> tuple[Tensor, Tensor]:
    """How many salient and how many context tokens their rule gives each frame. (T,), (T,)"""
    salient: list[int] = []
    context: list[int] = []
    for length in sizes:
        total = int(p * ratio) * length
        merged, anchors = int(total * CONTEXT), -(-length // EVERY)
        salient += [(total - merged) // length + (j < (total - merged) % length) for j in range(length)]
        own = [0] * length
        for a in range(anchors):
            own[length - 1 - a * EVERY] = merged // anchors + (a < merged % anchors)
        context += own
    return torch.tensor(salient), torch.tensor(context)


def random_clip(t: int, p: int, seed: int, width: int = 64) -> tuple[Tensor, Tensor]:
    """Features that drift, with cuts every 7 frames and cells that move more the later they come; and attention."""
    made = torch.Generator().manual_seed(seed)
    frame, frames = torch.empty(0), []
    for at in range(t):
        if at % 7 == 0:
            frame = 0.5 * torch.randn(p, width, generator=made) + torch.randn(1, width, generator=made)
        moves = (torch.rand(p, 1, generator=made) < torch.linspace(0, 0.6, p)[:, None]).float()
        frame = frame + moves * torch.randn(p, width, generator=made) + 0.02 * torch.randn(p, width, generator=made)
        frames.append(frame)
    return torch.stack(frames), torch.randn(t, p, generator=made).softmax(-1)


def cases(authors: Path, seeds: int) -> list[dict[str, Any]]:
    block = load(authors)
    found = []
    for t, side in SIZES:
        for ratio in RATIOS:
            for seed in range(seeds):
                frames, attention = random_clip(t, side * side, 1000 * seed + t)
                tokens, cells, sizes = theirs(block, frames, attention, ratio)
                salient, context = their_counts(sizes, side * side, ratio)
                segments: Segments = cut_least_alike(frame_likeness(frames[None]), SEGMENTS, THRESHOLD)
                chosen = most_salient(attention[None], salient)
                anchors = density_anchors(frames[None], chosen, context[None])
                ours = gather_context(frames[None], chosen, anchors, segments, len(cells), int(context.sum()), BETA)
                same = torch.equal(ours.index[0], cells)
                found.append({"method": "FastVID", "case": f"{t} frames of {side} x {side}, ratio {ratio}, seed {seed}",
                              "tokens": len(cells), "identical": same,
                              "difference": float((ours.tokens[0] - tokens).abs().max()) if same else float("nan")})
    return found
