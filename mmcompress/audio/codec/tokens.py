"""Recordings as codes: what a neural codec hears, frame by frame, a code from each of its books."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "mmcompress.audio_tokens.1"


@dataclass(frozen=True, eq=False)
class AudioTokens:
    """B recordings as codes, right-padded.

    codes        (B, n_q, T) int64. Book 0 is the coarsest: each further one refines what those before it left (RVQ), so that
                 any prefix of books decodes. Behind a recording's length it is set to 0
    lengths      (B,) int64: frames of each recording, 0 ... T
    rate         frames per second
    vocab        how many codes each of the n_q books has
    codec        model_type of the transformers model that made them, or any name
    sample_rate  Hz of the sound that it heard

    Everything lies on the device of `codes`. Raises ValueError for other shapes, dtypes, and codes that a book does not have.
    """

    codes: Tensor
    lengths: Tensor
    rate: float
    vocab: tuple[int, ...]
    codec: str
    sample_rate: int

    def __post_init__(self) -> None:
        codes, lengths = self.codes, self.lengths
        if codes.ndim != 3 or not codes.shape[1]:
            raise ValueError(f"codes of shape {tuple(codes.shape)}: pass (B, n_q, T) with at least one book; codes[None] makes "
                             "a batch of one recording")
        for name, x in (("codes", codes), ("lengths", lengths)):
            if x.dtype != torch.int64:
                raise ValueError(f"{name} are {x.dtype}: pass int64 ({name}.long())")
        if lengths.shape != codes.shape[:1]:
            raise ValueError(f"lengths of shape {tuple(lengths.shape)} for {codes.shape[0]} recordings: pass (B,), in frames")
        if len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= codes.shape[2]:
            raise ValueError(f"lengths={lengths.tolist()}: frames of a recording lie in 0 ... {codes.shape[2]}, the T of codes")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"rate={self.rate}: pass frames per second, above 0")
        object.__setattr__(self, "vocab", tuple(int(k) for k in self.vocab))
        if len(self.vocab) != codes.shape[1] or min(self.vocab) < 1:
            raise ValueError(f"vocab={self.vocab} for {codes.shape[1]} books: pass how many codes each book has, ({1024}, ...)")
        if self.sample_rate < 1:
            raise ValueError(f"sample_rate={self.sample_rate}: pass Hz")
        object.__setattr__(self, "codes", codes.masked_fill(~self.mask[:, None], 0))
        self._check_range()

    def _check_range(self) -> None:
        size = torch.tensor(self.vocab, device=self.codes.device)[:, None]
        bad = (self.codes < 0) | (self.codes >= size)
        if bad.any():
            b, book, t = bad.nonzero()[0].tolist()
            raise ValueError(f"code {int(self.codes[b, book, t])} in book {book} of recording {b}, frame {t}: its codes are "
                             f"0 ... {self.vocab[book] - 1}")

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def n_q(self) -> int:
        """Books, tokens of one frame."""
        return self.codes.shape[1]

    @property
    def mask(self) -> Tensor:
        """Which frames are real. (B, T) bool"""
        return torch.arange(self.codes.shape[2], device=self.codes.device) < self.lengths[:, None]

    @property
    def bits(self) -> tuple[float, ...]:
        """Bits of one code of each book, log2 of its size."""
        return tuple(math.log2(k) for k in self.vocab)

    @property
    def kbps(self) -> float:
        """Nominal kilobits per second, every code at its `bits`; worth.entropy_kbps says what an entropy coder would need."""
        return self.rate * sum(self.bits) / 1000

    @property
    def tokens_per_second(self) -> float:
        return self.rate * self.n_q

    @property
    def seconds(self) -> Tensor:
        """Duration of each recording, its last frame counted whole. (B,) float64"""
        return self.lengths.double() / self.rate

    def prefix(self, n_q: int) -> AudioTokens:
        """The first `n_q` books alone: what encoding with as many would have given."""
        if not 1 <= n_q <= self.n_q:
            raise ValueError(f"n_q={n_q}: these tokens have 1 ... {self.n_q} books")
        return replace(self, codes=self.codes[:, :n_q], vocab=self.vocab[:n_q])

    def frames(self, first: int = 0, stop: int | None = None) -> AudioTokens:
        """The frames from `first` until before `stop`; recordings that end before them have length 0."""
        most = self.codes.shape[2]
        stop = most if stop is None else min(stop, most)
        if not 0 <= first < stop:
            raise ValueError(f"frames({first}, {stop}): the recordings have frames 0 ... {most - 1}; pass first < stop")
        return replace(self, codes=self.codes[:, :, first:stop], lengths=(self.lengths - first).clamp(0, stop - first))

    def cut(self, start: float = 0.0, end: float | None = None) -> AudioTokens:
        """The stretch from `start` to `end` seconds, to the nearest frames."""
        return self.frames(round(start * self.rate), None if end is None else round(end * self.rate))

    def __getitem__(self, which: int | slice) -> AudioTokens:
        """One recording or a slice of them, still as a batch, cut to the longest."""
        if isinstance(which, int):
            if not -len(self) <= which < len(self):
                raise IndexError(f"recording {which} of {len(self)}")
            which = slice(which, which + 1 or None)
        lengths = self.lengths[which]
        most = int(lengths.max()) if len(lengths) else 0
        return replace(self, codes=self.codes[which, :, :most], lengths=lengths)

    def to(self, device: torch.device | str) -> AudioTokens:
        return replace(self, codes=self.codes.to(device), lengths=self.lengths.to(device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a .safetensors file; codes take 1, 2 or 4 bytes each, as many as the largest book needs."""
        from safetensors.torch import save_file
        sizes = (torch.uint8, torch.int16, torch.int32, torch.int64)
        small = next(size for size in sizes if max(self.vocab) - 1 <= torch.iinfo(size).max)
        about = {"rate": self.rate, "vocab": self.vocab, "codec": self.codec, "sample_rate": self.sample_rate}
        save_file({"codes": self.codes.to(small).cpu().contiguous(), "lengths": self.lengths.cpu().contiguous()},
                  _check_name(path), metadata={"format": FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AudioTokens:
        """What `save` wrote, on the CPU. Raises ValueError for another file."""
        from safetensors import SafetensorError, safe_open
        name = _check_name(path)
        if not name.is_file():
            raise ValueError(f"{name} is not a file")
        try:
            with safe_open(name, "pt") as file:
                about: Any = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise ValueError(f"{name} holds no audio tokens of this version (format {about.get('format')!r}, not "
                                     f"{FORMAT!r}); AudioTokens.save writes them")
                codes, lengths = (file.get_tensor(key).long() for key in ("codes", "lengths"))
        except SafetensorError as e:
            raise ValueError(f"{name} is damaged or no safetensors file ({e})") from e
        about = json.loads(about["about"])
        return cls(codes, lengths, about["rate"], tuple(about["vocab"]), about["codec"], about["sample_rate"])


def _check_name(path: str | os.PathLike[str]) -> Path:
    name = Path(path)
    if name.suffix != ".safetensors":
        raise ValueError(f"{name}: audio tokens are kept as safetensors; pass a name that ends in .safetensors")
    return name
