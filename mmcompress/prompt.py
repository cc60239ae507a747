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

NOUNS = {"image": ("picture", "pixel_values"), "video": ("video", "pixel_values_videos"),
         "audio": ("recording", "input_features")}      # what a modality's item is called, and the input that holds it


@dataclass(frozen=True, eq=False)
class Found:
    """A picture, clip or recording of a call: where its placeholders stand, and how its tokens lie."""

    modality: str               # "image", "video" or "audio"
    row: int                    # its prompt in the batch
    columns: Tensor             # (N,) int64 on the host, ascending; text may stand between them
    layout: Any

    @property
    def together(self) -> bool:
        """Whether no text stands between its placeholders."""
        return int(self.columns[-1]) - int(self.columns[0]) + 1 == len(self.columns)


@dataclass(frozen=True, eq=False)
class PromptMap:
    """How the columns of a full prompt lie in the reduced one.

    `column` (B, L') int64, on the host, gives the full prompt's column of each reduced column, -1 for padding; a picture's
    are those of its first placeholders, which are all alike (`Wrapped.last` says which tokens stand there). Columns that
    follow the prompt (generated tokens, later turns) map to themselves, shifted. With it a caller lays anything of the full
    prompt's shape beside the reduced logits: `w.prompt.select(labels, -100)`. `rope_deltas` (B, 1), for models with
    multi-dimensional rotary positions (M-RoPE), is how far a later text token's position is ahead of its number in the prompt.
    """

    input_ids: Tensor           # (B, L), as the caller passed them, where the caller keeps them
    column: Tensor              # (B, L')
    rope_deltas: Tensor | None = None

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
        deltas = None if self.rope_deltas is None else self.rope_deltas.repeat_interleave(times, 0)
        return PromptMap(self.input_ids.repeat_interleave(times, 0), self.column.repeat_interleave(times, 0), deltas)

    def then(self, later: PromptMap) -> PromptMap:
        """This prompt, continued by the columns of a later turn."""
        column = torch.where(later.column < 0, -1, later.column + self.full)
        deltas = self.rope_deltas if later.rope_deltas is None else later.rope_deltas
        return PromptMap(torch.cat([self.input_ids, later.input_ids], 1), torch.cat([self.column, column], 1), deltas)


def whole(input_ids: Tensor, rope_deltas: Tensor | None = None) -> PromptMap:
    """The map that keeps every column."""
    return PromptMap(input_ids, torch.arange(input_ids.shape[1]).expand(len(input_ids), -1), rope_deltas)


def find_placeholders(input_ids: Tensor, token_id: int, counts: Sequence[int], modality: str = "image"
                      ) -> list[tuple[int, Tensor]]:
    """Where each item's placeholders stand: (row, columns (N_i,)) per item. input_ids (B, L) on the host."""
    noun, pixels = NOUNS[modality]
    spans: list[tuple[int, Tensor]] = []
    todo = list(counts)
    for row, ids in enumerate(input_ids):
        columns = (ids == token_id).nonzero()[:, 0]
        at = 0
        while at < len(columns) and todo and at + todo[0] <= len(columns):
            spans.append((row, columns[at:at + todo[0]]))
            at += todo.pop(0)
        if at < len(columns):
            wanted = f"the next {noun} takes {todo[0]}" if todo else f"there is no {noun} left"
            raise ValueError(f"prompt {row} has {len(columns) - at} {modality} placeholders too many: {wanted}; pass input_ids "
                             f"and {pixels} of one processor call, every {noun} in the order of its placeholders")
    if todo:
        raise ValueError(f"{len(todo)} of {len(counts)} {noun}s have no placeholders in input_ids; pass input_ids and "
                         f"{pixels} of one processor call")
    return spans


def plan(input_ids: Tensor, host_ids: Tensor, mask: Tensor | None, found: Sequence[Found], kept: Sequence[int | Tensor],
         side: Literal["left", "right"]) -> PromptMap | None:
    """Drop the placeholders of what was reduced and all padding, then pad to one length on `side`.

    `host_ids` and `mask` (B, L) are `input_ids` and its mask on the host. `kept[i]` says how many of item i's placeholders
    stay: the first ones, since placeholders are alike and which of them stay does not matter; so the plan needs no feature.
    Where text stands between an item's placeholders it says which, (K,) int64. None if nothing goes.
    """
    if all((k if isinstance(k, int) else len(k)) == len(item.columns) for k, item in zip(kept, found)):
        return None
    stays = torch.ones_like(host_ids, dtype=torch.bool) if mask is None else mask.bool().clone()
    for k, item in zip(kept, found):
        stays[item.row, item.columns] = False
        stays[item.row, item.columns[:k] if isinstance(k, int) else item.columns[k]] = True
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
