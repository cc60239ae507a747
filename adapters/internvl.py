"""InternVL: tiles of a picture in one run of placeholders, frames of a clip in runs with "Frame 1:" and so on between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmcompress.prompt import Found
from mmcompress.tokens import ImageLayout, VideoLayout

from .base import Adapter, Captures, Encoded, one_tensor, tile_tokens


class InternVLAdapter(Adapter):
    """`InternVLForConditionalGeneration`, whose processor hands over pictures and clips as one row of tiles.

    Which tiles are a clip's frames is read from the prompt: runs of one tile each, behind text that differs by the frame's
    number alone, as the processor writes it. The model is not told how a picture's tiles lie on it, so every tile is reduced
    as a picture of its own. Text between frames stays where it is, which costs one synchronisation when a clip is packed:
    which frame a kept token belongs to is known only with the data.
    """

    encoder_inputs = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy")
    reads_clips = True

    def has_videos(self, inputs: Mapping[str, Any]) -> bool:
        return self.has_images(inputs)                              # only the prompt tells which they are

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
        for row, prompt in enumerate(ids):
            runs = _runs(prompt, self.image_token_id, size, row)
            for run in _clips(prompt.tolist(), runs, size):
                places = torch.cat([torch.arange(start, end) for start, end in run])
                if len(run) > 1:
                    found.append(Found("video", row, places, VideoLayout(frames=len(run), grid=self.grid)))
                else:
                    found += [Found("image", row, part, ImageLayout(tile=self.grid)) for part in places.split(size)]
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
            raise ValueError(f"prompt {row} has a run of {end - start} image placeholders, which is no multiple of the {size} of "
                             f"one tile; pass input_ids as the processor wrote them")
    return [(start, end) for start, end in runs]


def _clips(prompt: list[int], runs: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """Runs grouped: the frames of one clip together, a picture alone.

    Frame 2 stands behind END, newline, HEAD.. 2 ..TAIL START, and frame 1 behind HEAD.. 1 ..TAIL START, where START and END
    enclose placeholders: the two differ in one token, and later gaps in the tokens of their number.
    """
    out: list[list[tuple[int, int]]] = []
    at = 0
    while at < len(runs):
        group = [runs[at]]
        rule = _numbering(prompt, runs[at], runs[at + 1], size) if at + 1 < len(runs) else None
        while rule is not None and at + len(group) < len(runs):
            here = runs[at + len(group)]
            if here[1] - here[0] != size or not rule(prompt[group[-1][1]:here[0]]):
                break
            group.append(here)
        out.append(group)
        at += len(group)
    return out


def _numbering(prompt: list[int], first: tuple[int, int], second: tuple[int, int], size: int) -> Any:
    """What tells the gap before a later frame of the clip that begins with these two runs; None if they begin none."""
    gap = prompt[first[1]:second[0]]
    label = len(gap) - 2                                            # without END and the newline
    if first[1] - first[0] != size or second[1] - second[0] != size or not 3 <= label <= first[0]:
        return None
    before, after = prompt[first[0] - label:first[0]], gap[2:]
    differ = [i for i, (a, b) in enumerate(zip(before, after)) if a != b]
    if len(differ) != 1 or differ[0] in (0, label - 1):
        return None
    start, one = differ[0], before[differ[0]]
    head, tail = gap[:2 + start], after[start + 1:]

    def follows(between: list[int]) -> bool:
        number = between[len(head):len(between) - len(tail)]
        return between[:len(head)] == head and between[-len(tail):] == tail and 1 <= len(number) <= 5 and number != [one]

    return follows
