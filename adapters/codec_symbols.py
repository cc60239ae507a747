"""Recordings among text: codes as the symbols that a language model reads and writes, and prompts with room for them.

A recording is one begin symbol, the steps of its layout (mmcompress.audio.codec.layouts) and, if it ends, an end symbol. Each
of these takes a column of the prompt. All books share one vocabulary, in which book k's codes begin where book k - 1's end:

    0 ... sum(vocab) - 1    codes
    sum(vocab)              the pad of the layouts, which also says that the sound ends
    sum(vocab) + 1          begin
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcompress.audio.codec import AudioTokens, arrange
from mmcompress.audio.codec.layouts import streams

Layout = Literal["parallel", "delay", "flatten"]
LAYOUTS: tuple[str, ...] = get_args(Layout)


@dataclass(frozen=True, eq=False)
class Symbols:
    """R recordings of at most M columns, side by side in S streams: n_q of them in parallel and delay, one in flatten.

    ids     (R, S, M) int64
    valid   (R, M) bool: which columns are a recording's
    book    (R, S, M) int64: whose head a symbol is to be predicted by. n_q: nobody's. The end is book 0's
    """

    ids: Tensor
    valid: Tensor
    book: Tensor

    @property
    def columns(self) -> Tensor:
        """Columns that each recording takes. (R,) int64"""
        return self.valid.sum(1)


def symbols(tokens: AudioTokens, layout: Layout, ended: Tensor | bool = True) -> Symbols:
    """What stands for each recording. `ended`: which of them end, (R,) bool or one for all.

    A delayed recording that does not end stops with its last code of book 0, where its continuation begins; the codes that the
    later books still owe are not read.
    """
    sequence = arrange(tokens, layout, joint=True)
    ended = which(ended, tokens, "ended")
    ids = sequence.ids if streams(layout) else sequence.ids[:, None]
    side = ids.new_full((*ids.shape[:2], 1), sequence.pad)
    ids = torch.cat([side + 1, ids, side], 2)
    steps = tokens.lengths if layout == "delay" else sequence.lengths               # without end
    columns = 1 + torch.where(ended, sequence.lengths + 1, steps)
    column = torch.arange(ids.shape[2], device=ids.device)
    valid = column < columns[:, None]
    edges = torch.tensor(tokens.vocab, device=ids.device).cumsum(0)
    book = torch.bucketize(ids, edges, right=True).where(valid[:, None], tokens.n_q)
    end = (column == 1 + steps[:, None]) & ended[:, None]                           # behind book 0's last code
    book[:, 0] = torch.where(end, 0, book[:, 0])
    return Symbols(ids, valid, book)


def which(chosen: Tensor | bool, tokens: AudioTokens, name: str) -> Tensor:
    """(R,) bool on the device of the codes."""
    out = torch.as_tensor(chosen, dtype=torch.bool, device=tokens.codes.device)
    if out.ndim and out.shape != tokens.lengths.shape:
        raise ValueError(f"{name} of shape {tuple(out.shape)} for {len(tokens)} recordings: pass one bool for all, or (R,)")
    return out.expand(len(tokens))


def check_places(here: Tensor, columns: Tensor) -> None:
    """here (B, T) placeholders, columns (R,): raises ValueError unless the recordings fill them, each within one row."""
    row, column = here.nonzero(as_tuple=True)
    if len(row) != int(columns.sum()):
        raise ValueError(f"{len(row)} placeholders for {int(columns.sum())} columns of {len(columns)} recordings "
                         f"({columns.tolist()[:8]} ...): make input_ids by expand() with the same tokens and `ended`")
    if not len(row):
        return
    last = columns.cumsum(0) - 1
    first = last + 1 - columns
    wrong = (row[first] != row[last]) | (column[last] - column[first] + 1 != columns)
    if wrong.any():
        raise ValueError(f"the placeholders of recording {int(wrong.nonzero()[0])} do not lie side by side in one row: make "
                         "input_ids by expand() with the same tokens and `ended`")


def expand(rows: Sequence[Any], columns: Tensor, audio_token_id: int, labels: Sequence[Any] | None = None,
           side: Literal["left", "right"] = "right", pad: int = 0) -> dict[str, Tensor]:
    """Rows of ids, one `audio_token_id` for each recording, to a padded batch with one for each of its columns.

    rows     lists of ids or 1-D tensors, unpadded; labels likewise, of the same lengths: placeholders get -100
    columns  (R,) of the recordings, in the order of their placeholders, row by row

    Returns input_ids and attention_mask, (B, T) int64, and labels if given.
    """
    ids = [torch.as_tensor(row, dtype=torch.int64).cpu() for row in rows]
    found = sum(int((row == audio_token_id).sum()) for row in ids)
    if found != len(columns):
        raise ValueError(f"{found} placeholders ({audio_token_id}) for {len(columns)} recordings: put one where each begins")
    left = iter(columns.tolist())
    repeats = [torch.tensor([next(left) if i == audio_token_id else 1 for i in row.tolist()], dtype=torch.int64) for row in ids]
    out = {"input_ids": _padded([row.repeat_interleave(n) for row, n in zip(ids, repeats)], pad, side)}
    out["attention_mask"] = _padded([torch.ones(int(n.sum()), dtype=torch.int64) for n in repeats], 0, side)
    if labels is not None:
        targets = [torch.as_tensor(row, dtype=torch.int64).cpu() for row in labels]
        if [len(row) for row in targets] != [len(row) for row in ids]:
            raise ValueError(f"labels of {[len(row) for row in targets]} ids for rows of {[len(row) for row in ids]}: pass a "
                             "label for every id, -100 where none is learned")
        targets = [torch.where(row == audio_token_id, -100, target) for row, target in zip(ids, targets)]
        out["labels"] = _padded([row.repeat_interleave(n) for row, n in zip(targets, repeats)], -100, side)
    return out


def _padded(rows: Sequence[Tensor], value: int, side: Literal["left", "right"]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), True, value, padding_side=side)


class SoundSymbols(nn.Module):
    """Embedding of the symbols and the books' heads, in float32 unless cast.

    codebook    (K, d) of each book: what the codec itself decodes. A learned linear map of it is added to the embeddings
    scale       standard deviation of what a column's embeddings sum up to at first; that of the words
    spread      that of the heads' weights
    """

    codebook: Tensor
    project: nn.Linear

    def __init__(self, vocab: Sequence[int], size: int, streams: int, scale: float, spread: float = 0.02,
                 codebook: Sequence[Tensor] | None = None):
        super().__init__()
        self.table = nn.Embedding(sum(vocab) + 2, size)
        self.heads = nn.ModuleList(nn.Linear(size, k + (not i), bias=False) for i, k in enumerate(vocab))
        scale *= (streams * (1 if codebook is None else 2)) ** -0.5
        nn.init.normal_(self.table.weight, std=scale)
        for weight in self.heads.parameters():
            nn.init.normal_(weight, std=spread)
        if codebook is not None:
            rows = torch.cat([book.detach().float().cpu() for book in codebook])
            self.register_buffer("codebook", F.pad(rows, (0, 0, 0, 2)))
            self.project = nn.Linear(rows.shape[1], size, bias=False)
            nn.init.normal_(self.project.weight, std=scale / max(float(rows.square().sum(1).mean().sqrt()), 1e-6))

    def embed(self, ids: Tensor) -> Tensor:
        """ids (..., S) of one column -> (..., D), the sum over streams"""
        out = self.table(ids).sum(-2)
        if hasattr(self, "project"):
            out = out + self.project(self.codebook[ids].sum(-2))
        return out

    def logits(self, book: int, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., K), of book 0 (..., K + 1): the last is the end"""
        head: Any = self.heads[book]
        return head(hidden.to(head.weight.dtype))
