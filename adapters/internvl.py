"""InternVL: tiles of a picture in one run of placeholders, frames of a clip in runs with "Frame 1:" and so on between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmcompress.prompt import Found
from mmcompress.tokens import ImageLayout, VideoLayout

from .base import Adapter, Encoded, one_tensor, tile_tokens
from .vision import Captures


class InternVLAdapter(Adapter):
    """`InternVLForConditionalGeneration`, whose processor hands over pictures and clips as one row of tiles.

    Which tiles are a clip's frames is read from the prompt: runs of one tile each, behind text that differs by the frame's
    number alone, as the processor writes it. Pictures of one tile that are numbered alike ("Image-1: ") look the same in it:
    pass `num_frames=[]` with the call then (or the frames of each clip, `num_frames=[8, 8]`). The model is not told how a
    picture's tiles lie on it, so every tile is reduced as a picture of its own. Text between frames stays where it is, which
    costs one synchronisation when a clip is packed: which frame a kept token belongs to is known only with the data.
    """

    encoder_inputs = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy")
    reads_clips = True

    def has_videos(self, inputs: Mapping[str, Any]) -> bool:
        return self.has_images(inputs)                              # only the prompt tells which they are

    @property
    def dropped(self) -> tuple[str, ...]:
        return (*super().dropped, "num_frames")

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns of one tile, after pixel shuffling."""
        rows, columns = tile_tokens(self.config)
        return int(rows * self.config.downsample_ratio), int(columns * self.config.downsample_ratio)

    def layouts(self, inputs: Mapping[str, Any]) -> list[ImageLayout]:
        """One layout a tile, as if the call held no clips; `find` tells them apart."""
        return [ImageLayout(tile=self.grid)] * len(inputs["pixel_values"])

    def vision_grid(self, modality: str) -> tuple[int, int] | None:
        return tile_tokens(self.config)

    def stream(self, modality: str) -> str:
        return "image"

    def find(self, inputs: Mapping[str, Any], ids: Tensor) -> list[Found]:
        """Every tile of a picture and every clip, in the order of their tiles."""
        rows, columns = self.grid
        size, found, left = rows * columns, [], len(inputs["pixel_values"])
        told = inputs.get("num_frames")
        told = None if told is None else [int(n) for n in told]
        for row, prompt in enumerate(ids):
            runs = _runs(prompt, self.image_token_id, size, row)
            for run in _clips(prompt.tolist(), runs, size, told):
                places = torch.cat([torch.arange(start, end) for start, end in run])
                if len(run) > 1:
                    found.append(Found("video", row, places, VideoLayout(frames=len(run), grid=self.grid)))
                else:
                    found += [Found("image", row, part, ImageLayout(tile=self.grid)) for part in places.split(size)]
        if told:
            raise ValueError(f"num_frames: no clips of {told} frames stand in the prompts, one run of {size} placeholders a "
                             f"frame behind text that differs by its number; list the clips in the order of the prompts")
        tiles = sum(item.layout.tiles for item in found)
        if tiles != left:
            raise ValueError(f"pixel_values hold {left} tiles where the prompts have placeholders for {tiles}; pass input_ids "
                             f"and pixel_values of one processor call")
        return found

    def encode_all(self, inputs: Mapping[str, Any], found: Sequence[Found], captures: Mapping[str, Captures]
                   ) -> dict[str, Encoded]:
        """One run of the tower; its tiles then go to pictures and clips."""
        union = lambda name: tuple(dict.fromkeys(x for c in captures.values() for x in getattr(c, name)))  # noqa: E731
        encoded = self.encode(inputs, union("layers"), union("receives"))
        starts = [0]
        for item in found:
            starts.append(starts[-1] + item.layout.tiles)
        out = {}
        for modality in dict.fromkeys(item.modality for item in found):
            tiles = [list(range(a, b)) for (a, b), item in zip(pairwise(starts), found) if item.modality == modality]
            flat = torch.tensor([i for some in tiles for i in some])
            vision = {layer: None if held is None else held.at(flat.to(held.keys.device))
                      for layer, held in encoded.vision.items()}
            features = [torch.cat([encoded.features[i] for i in some]) for some in tiles]
            out[modality] = Encoded(features, vision, encoded.grid)
        return out

    def finish(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        return one_tensor(outputs, ("image",))


def _runs(prompt: Tensor, token_id: int, size: int, row: int) -> list[tuple[int, int]]:
    """Where placeholders follow each other: [start, end) columns."""
    places = (prompt == token_id).nonzero()[:, 0].tolist()
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1][1] += 1
        else:
            runs.append([place, place + 1])
    for start, end in runs:
        if (end - start) % size:
            raise ValueError(f"prompt {row} has a run of {end - start} image placeholders, which is no multiple of the {size} "
                             f"of one tile; pass input_ids as the processor wrote them")
    return [(start, end) for start, end in runs]


def _clips(prompt: list[int], runs: list[tuple[int, int]], size: int, told: list[int] | None = None
           ) -> list[list[tuple[int, int]]]:
    """Runs grouped: the frames of one clip together, a picture alone. `told`: frames of the next clips, taken off as found."""
    out: list[list[tuple[int, int]]] = []
    at = 0
    while at < len(runs):
        n = 1
        if told is None or told:
            n = _frames(prompt, runs[at:], size, None if told is None else told[0])
        if told and n > 1:
            told.pop(0)
        out.append(runs[at:at + n])
        at += n
    return out


def _frames(prompt: list[int], runs: list[tuple[int, int]], size: int, wanted: int | None) -> int:
    """How many of the first runs are the frames of one clip; 1 if they begin none.

    Between two frames stands END newline HEAD number TAIL START, and before the first HEAD' 1 TAIL START, where HEAD' may be
    another token for the same letters (a word after a blank). So the number is what stands before the longest common end of
    the two. Two runs are a clip if HEAD' is HEAD; three if the second gap has the head of the first.
    """
    if len(runs) < 2 or any(end - start != size for start, end in runs[:2]):
        return 1
    before, gap = prompt[:runs[0][0]], prompt[runs[0][1]:runs[1][0]]
    tail = 0
    while tail < min(len(before), len(gap)) and before[-tail - 1] == gap[-tail - 1]:
        tail += 1
    head = len(gap) - tail - 1                                      # END newline HEAD, in front of one number
    if tail < 2 or head < 3 or len(before) < tail + 2:
        return 1
    one, n = before[-tail - 1], 2
    while n < len(runs) and n != wanted and runs[n][1] - runs[n][0] == size:
        between = prompt[runs[n - 1][1]:runs[n][0]]
        number = between[head:len(between) - tail]
        if between[:head] != gap[:head] or between[-tail:] != gap[-tail:] or not 1 <= len(number) <= 5 or number == [one]:
            break
        n += 1
    if wanted is not None:
        return n if n == wanted else 1
    return n if n > 2 or before[-tail - 2] == gap[head - 1] else 1
