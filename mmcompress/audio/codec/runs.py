"""Runs of one code as the code and how long it lasts, and back (as speech units are deduplicated in GSLM, 2102.01192)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .tokens import AudioTokens


@dataclass(frozen=True, eq=False)
class Runs:
    """Collapsed recordings.

    tokens     a frame per run. Its rate is that of the frames before collapsing, which `durations` count: its `seconds`, `kbps`
               and `tokens_per_second` do not hold, those of Runs do
    durations  (B, R) int64: frames that each run lasts, 0 behind a recording's runs
    """

    tokens: AudioTokens
    durations: Tensor

    @property
    def tokens_per_second(self) -> float:
        """Codes that are left per second of sound, over the batch; durations are not counted."""
        frames = int(self.durations.sum())
        return int(self.tokens.lengths.sum()) * self.tokens.n_q * self.tokens.rate / frames if frames else 0.0

    def expand(self) -> AudioTokens:
        """What was collapsed, exactly. Raises ValueError for durations of another shape, and a run of less than a frame."""
        tokens, durations = self.tokens, self.durations
        if durations.shape != tokens.mask.shape or durations.dtype != torch.int64:
            raise ValueError(f"durations {tuple(durations.shape)} {durations.dtype}: pass {tuple(tokens.mask.shape)} int64, a "
                             "duration per run")
        durations = durations.masked_fill(~tokens.mask, 0)
        if ((durations < 1) & tokens.mask).any():
            raise ValueError("durations: every run lasts at least a frame; those behind a recording's length are not looked at")
        lengths = durations.sum(1)
        most = int(lengths.max()) if len(lengths) else 0
        t = torch.arange(most, device=durations.device).expand(len(lengths), most).contiguous()
        run = torch.searchsorted(durations.cumsum(1), t, right=True)                    # (B, T), R behind the end
        codes = torch.nn.functional.pad(tokens.codes, (0, 1)).gather(2, run[:, None].expand(-1, tokens.n_q, -1))
        return replace(tokens, codes=codes, lengths=lengths)


def collapse(tokens: AudioTokens, longest: int | None = None) -> Runs:
    """Frames whose codes are those of the frame before join it, in all books at once; collapse `tokens.prefix(1)` for the
    semantic book alone. `longest`: a run of more frames is split into such of this many and the rest."""
    if longest is not None and longest < 1:
        raise ValueError(f"longest={longest}: pass frames, at least 1, or None")
    codes, mask = tokens.codes, tokens.mask
    new = torch.ones_like(mask)
    new[:, 1:] = (codes[:, :, 1:] != codes[:, :, :-1]).any(1)
    if longest is not None:
        t = torch.arange(mask.shape[1], device=codes.device).expand_as(mask)
        begun = torch.where(new, t, 0).cummax(1).values if mask.shape[1] else t         # where the frame's run begins
        new |= (t - begun) % longest == 0
    new &= mask
    lengths = new.sum(1)
    most = int(lengths.max()) if len(lengths) else 0
    run = torch.where(mask, new.cumsum(1) - 1, most)                                    # (B, T)
    durations = codes.new_zeros(len(codes), most + 1).scatter_add(1, run, mask.long())[:, :most]
    into = run[:, None].expand(codes.shape)
    kept = codes.new_zeros(*codes.shape[:2], most + 1).scatter(2, into, codes)[..., :most]  # equal within a run
    return Runs(replace(tokens, codes=kept, lengths=lengths), durations)
