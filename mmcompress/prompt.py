"""The prompt before and after: which placeholders stay, and how a caller's columns map to the shorter prompt's.

All of it is planned on the host from `input_ids` and the counts, before any feature exists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PromptMap:
    """How the columns of a full prompt lie in the reduced one.

    `column` (B, L') int64, on the host, gives the full prompt's column of each reduced column, -1 for padding; a picture's
    are those of its first placeholders, which are all alike (`Wrapped.last` says which tokens stand there). Columns that
    follow the prompt (generated tokens, later turns) map to themselves, shifted. With it a caller lays anything of the full
    prompt's shape beside the reduced logits: `w.prompt.select(labels, -100)`.
    """

    input_ids: Tensor           # (B, L), as the caller passed them, where the caller keeps them
    column: Tensor              # (B, L')

    @property
    def full(self) -> int:
        return self.input_ids.shape[1]

    @property
    def reduced(self) -> int:
        return self.column.shape[1]

    @property
    def is_padded(self) -> bool:
        return bool((self.column < 0).any())

    @cached_property
    def _near(self) -> Tensor:
        """The columns on the caller's device: copied once, before the vision tower is launched."""
        return self.column.to(self.input_ids.device)

    def select(self, x: Tensor, pad: int) -> Tensor:
        """(B, L) -> (B, L'), with `pad` in the padding columns."""
        column = self._near.to(x.device)
        return x.gather(1, column.clamp_min(0)).masked_fill(column < 0, pad)

    def restore(self, sequences: Tensor) -> Tensor:
        """Generated (B * n, L' + T) -> (B * n, L + T): the caller's prompt put back before the new tokens."""
        prompt = self.repeat(len(sequences)).input_ids.to(sequences.device)
        return torch.cat([prompt, sequences[:, self.reduced:]], 1)

    def repeat(self, rows: int) -> PromptMap:
        """The map of a batch in which every prompt stands rows / B times in a row."""
        times = rows // len(self.input_ids)
        if times == 1:
            return self
        return PromptMap(self.input_ids.repeat_interleave(times, 0), self.column.repeat_interleave(times, 0))

    def then(self, later: PromptMap) -> PromptMap:
        """This prompt, continued by the columns of a later turn."""
        column = torch.where(later.column < 0, -1, later.column + self.full)
        return PromptMap(torch.cat([self.input_ids, later.input_ids], 1), torch.cat([self.column, column], 1))


def whole(input_ids: Tensor) -> PromptMap:
    """The map that keeps every column."""
    return PromptMap(input_ids, torch.arange(input_ids.shape[1]).expand(len(input_ids), -1))


def find_placeholders(input_ids: Tensor, image_token_id: int, counts: Sequence[int]) -> list[tuple[int, Tensor]]:
    """Where each picture's placeholders stand: (row, columns (N_i,)) per picture. input_ids (B, L) on the host."""
    spans: list[tuple[int, Tensor]] = []
    todo = list(counts)
    for row, ids in enumerate(input_ids):
        columns = (ids == image_token_id).nonzero()[:, 0]
        at = 0
        while at < len(columns) and todo and at + todo[0] <= len(columns):
            spans.append((row, columns[at:at + todo[0]]))
            at += todo.pop(0)
        if at < len(columns):
            wanted = f"the next picture takes {todo[0]}" if todo else "there is no picture left"
            raise ValueError(f"prompt {row} has {len(columns) - at} image placeholders too many: {wanted}; pass input_ids "
                             f"and pixel_values of one processor call, every picture in the order of its placeholders")
    if todo:
        raise ValueError(f"{len(todo)} of {len(counts)} pictures have no placeholders in input_ids; pass input_ids and "
                         f"pixel_values of one processor call")
    return spans


def plan(input_ids: Tensor, host_ids: Tensor, mask: Tensor | None, spans: Sequence[tuple[int, Tensor]], kept: Sequence[int],
         side: Literal["left", "right"]) -> PromptMap | None:
    """Drop all but the first `kept[i]` placeholders of picture i and all padding, then pad to one length on `side`.

    `host_ids` and `mask` (B, L) are `input_ids` and its mask on the host. Placeholders are alike, so which of them stay
    does not matter, and the plan needs no feature. None if nothing goes.
    """
    if all(k == len(columns) for k, (_, columns) in zip(kept, spans)):
        return None
    stays = torch.ones_like(host_ids, dtype=torch.bool) if mask is None else mask.bool().clone()
    for k, (row, columns) in zip(kept, spans):
        stays[row, columns[k:]] = False
    prompt = PromptMap(input_ids, close_up(stays, side))
    prompt._near                                                # noqa: B018
    return prompt


def close_up(stays: Tensor, side: Literal["left", "right"]) -> Tensor:
    """The columns that stay, moved together and padded to one length with -1 on `side`. (B, L) bool -> (B, L') int64."""
    lengths = stays.sum(1, keepdim=True)                                                    # (B, 1)
    length = int(lengths.max())
    column = torch.where(stays, torch.arange(stays.shape[1]), stays.shape[1]).sort(1).values[:, :length]
    column = column.masked_fill(column == stays.shape[1], -1)
    if side == "right":
        return column
    shifted = torch.arange(length) - (length - lengths)                                     # (B, L'), negative at padding
    return column.gather(1, shifted.clamp_min(0)).masked_fill(shifted < 0, -1)


def padding_side(mask: Tensor | None) -> Literal["left", "right"]:
    """The side a batch is padded on, as its mask (B, L) on the host shows: right if any row ends in padding."""
    return "right" if mask is not None and bool((mask[:, -1] == 0).any()) else "left"


def as_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """The caller's 2-D attention mask; raises on other forms."""
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise ValueError("attention_mask must be the processor's 2-D mask (prompts, length) where pictures are reduced; "
                         "a 4-D mask fits only the full prompt")
    return mask
