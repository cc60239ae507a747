"""StreamingReducer: frames as they come, a fixed number of tokens, those that the whole clip would be reduced to (ours)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import VideoLayout
from ..ops.forest import roots_of


class StreamingReducer:
    """Reduce a clip that has not ended to the tokens that its reducer would leave of the frames seen so far.

    reducer   one whose judgement looks back only: SpatioTemporalMerge, EVS, Random. Others compare with the whole clip (its
              mean, its length, its segments); for them this raises ValueError, since no stream can equal them
    grid      token rows and columns of a frame; lead: tokens before each frame's grid

    The budget is the reducer's `keep`, a count. Memory is that of the budget and one frame, whatever the stream's length. What
    equals the whole clip: which tokens stay and their mass, exactly; merged features to rounding, since sums are added up in
    another order. What does not: `source` of the frames gone by is not held, `SpatioTemporalMerge(tolerance=...)` is refused,
    and EVS protects its first frame with the budget of a whole frame, as offline.

        stream = StreamingReducer(SpatioTemporalMerge(keep=512), grid=(14, 14))
        for features in camera:                     # (B, P, D), or (B, F, P, D) several frames at a time
            stream.push(features)
        stream.tokens, stream.index, stream.mass    # (B, K, D), (B, K) cells t * P + p ascending, (B, K)
    """

    def __init__(self, reducer: Any, grid: tuple[int, int], lead: int = 0) -> None:
        if isinstance(reducer.keep, bool) or not isinstance(reducer.keep, int):
            raise ValueError(f"keep={reducer.keep!r}: a stream has no length to take a share of; pass a count, like keep=512")
        if getattr(reducer, "count_is_bound", False):
            raise ValueError("tolerance: a stream holds its budget; leave tolerance out")
        self.reducer, self.layout = reducer, VideoLayout(1, grid, lead)
        self.budget = max(reducer.keep, reducer.count(self.layout))             # EVS never holds less than a frame
        self.seen = 0                                           # frames
        self._before: Tensor | None = None                      # (B, P, D) the last frame
        self._slot = torch.empty(0)                             # (B, P) where each of its cells went
        self._held: dict[str, Tensor] = {}

    def push(self, frames: Tensor) -> None:
        """Take one frame (B, P, D) or several (B, F, P, D)."""
        several = frames if frames.ndim == 4 else frames[:, None]
        if several.ndim != 4 or several.shape[2] != self.layout.cells:
            raise ValueError(f"frames of shape {tuple(frames.shape)}: (batch, {self.layout.cells}, D), or (batch, frames, "
                             f"{self.layout.cells}, D)")
        for frame in several.unbind(1):
            self._take(frame)

    @property
    def tokens(self) -> Tensor:
        """What is held, (B, K, D) in the features' dtype; K is the budget, or all that came if that is less."""
        self._check()
        n = self._used
        return (self._held["sums"][:, :n] / self._held["mass"][:, :n, None]).to(self._dtype)

    @property
    def index(self) -> Tensor:
        """The cell each token stands for, t * P + p counted from the stream's beginning. (B, K) int64 ascending"""
        self._check()
        return self._held["index"][:, :self._used]

    @property
    def mass(self) -> Tensor:
        """How many cells each token stands for. (B, K) float32"""
        self._check()
        return self._held["mass"][:, :self._used]

    @property
    def _used(self) -> int:
        return min(self.budget, self.seen * self.layout.cells)

    def _check(self) -> None:
        if not self.seen:
            raise ValueError("no frame was pushed yet")

    def _take(self, frame: Tensor) -> None:
        """Hold the K best of the tokens held and the new frame's cells; what falls out joins what it points to."""
        (batch, p, width), k, device = frame.shape, self.budget, frame.device
        if not self.seen:
            self._begin(batch, width, device)
            self._dtype = frame.dtype
        start = self.seen * p
        worth, parent = self.reducer.causal(frame[:, None], self.layout, self._before, start)
        merges = parent is not None
        cells = torch.arange(p, device=device).expand(batch, p)
        if parent is None:
            up = k + cells
        else:
            one = parent[:, 0]                                                                       # (B, P)
            if self._before is None:
                up = k + one
            else:
                up = torch.where(one >= 0, k + one, self._slot.gather(1, (one + p).clamp(0, p - 1)))
        held = self._held
        together = lambda a, b: torch.cat([a, b.to(a.dtype)], 1)  # noqa: E731
        value = together(held["worth"], worth[:, 0])                                                 # (B, K + P)
        index = together(held["index"], start + cells)
        pointer = together(held["up"], up)
        best = value.argsort(dim=1, descending=True, stable=True)[:, :k]
        is_root = torch.zeros_like(value, dtype=torch.bool).scatter(1, best, True)
        key = torch.where(is_root, index, torch.iinfo(torch.int64).max)
        kept = key.argsort(dim=1, stable=True)[:, :k]                                                   # (B, K) ascending cells
        slots = torch.arange(k, device=device).expand(batch, k)
        slot_of = torch.zeros_like(index).scatter(1, kept, slots)
        root = roots_of(pointer, is_root) if merges else torch.arange(k + p, device=device).expand(batch, -1)
        source = slot_of.gather(1, root)
        counts = is_root if not merges else torch.ones_like(is_root)                # what is dropped counts for nothing
        mass = together(held["mass"], torch.ones(batch, p, device=device)) * counts
        sums = torch.cat([held["sums"], frame.float()], 1) * counts[..., None]
        self._held = {
            "worth": value.gather(1, kept), "index": index.gather(1, kept),
            "up": source.gather(1, pointer.gather(1, kept)) if merges else slots,
            "mass": torch.zeros_like(held["mass"]).scatter_add(1, source, mass),
            "sums": torch.zeros_like(held["sums"]).scatter_add(1, source[..., None].expand(-1, -1, width), sums)}
        self._slot, self._before, self.seen = source[:, k:], frame, self.seen + 1

    def _begin(self, batch: int, width: int, device: torch.device) -> None:
        """Empty slots: worth less than anything, and behind every cell."""
        k = self.budget
        numbers = torch.arange(k, device=device).expand(batch, k)
        self._held = {"worth": torch.full((batch, k), -torch.inf, dtype=torch.float64, device=device),
                      "index": torch.iinfo(torch.int64).max // 2 + numbers, "up": torch.zeros_like(numbers),
                      "mass": torch.zeros(batch, k, device=device), "sums": torch.zeros(batch, k, width, device=device)}
