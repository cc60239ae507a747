"""Residual vector quantisation that learns (SoundStream, arXiv 2107.03312; VQ-VAE's moving averages, arXiv 1711.00937).

The codebooks are the buffers of a stock `XcodecModel`: embed (K, D), embed_avg (K, D), cluster_size (K), inited (1). They
have no gradient: vectors follow the moving average of what is assigned to them, in float32.

X-Codec's released code (core_vq_lsx_version.py): k-means on the first batch, 50 rounds on at most 10 000 vectors; decay
0.99, Laplace 1e-5; a code whose average count falls below 2 becomes a random vector of the batch; all of it over all
processes' vectors. Ours differs in this:
- r_{i+1} = r_i - sg(q_i), and the output is x + sg(sum q - x). There r_{i+1} = r_i - (r_i + sg(q_i - r_i)), which has no
  gradient: only the first book's commitment reaches the encoder (facebookresearch/encodec issue 25).
- After k-means and revival a code's averages restart with it: embed_avg = count * embed. There embed_avg = embed after
  k-means, so the first step shrinks a centre by its count, and a revived code is pulled back to where it died.
- Randomness comes from (seed, step, book), not from the global state: processes agree and a run can be resumed.
- Revival by splitting (LBG's; Linde, Buzo, Gray 1980) is ours, and off by default. In many dimensions a vector of the batch is
  a poor place: the residuals that late books see are nearly orthogonal, so that a code near 0 is nearer to each of them than
  another one's place is, and codes that are put there die again.

The threshold counts vectors a step, all processes together: with fewer than about `dead` * K of them the mean code is
"dead" and codebooks never settle. X-Codec's 8 GPUs x 8 clips x 150 frames bring 9 600 to 1 024 codes; one GPU of these 1 200.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

STEP = 0.1                      # of a split


@dataclass(frozen=True)
class RVQ:
    """How codebooks learn. The defaults are X-Codec's.

    decay       of the moving averages, in [0, 1)
    epsilon     Laplace smoothing of counts
    dead        codes with an average count below it are revived; 0: never
    revival     where to: "vector", a random vector of the batch, as X-Codec does; "split", beside a code that has much to do
    iterations, frames    of k-means: rounds, and vectors it looks at
    books       how many books a step uses, drawn from these; None: the books of each of the config's bandwidths
    seed        of everything drawn here
    """

    decay: float = 0.99
    epsilon: float = 1e-5
    dead: float = 2.0
    revival: str = "vector"
    iterations: int = 50
    frames: int = 10_000
    books: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay}: a moving average needs one in [0, 1)")
        if self.epsilon <= 0 or self.dead < 0:
            raise ValueError(f"epsilon={self.epsilon}, dead={self.dead}: must be positive, and not negative")
        if self.revival not in ("vector", "split"):
            raise ValueError(f"revival={self.revival!r}: 'vector' or 'split'")
        if self.iterations < 1 or self.frames < 1:
            raise ValueError(f"iterations={self.iterations}, frames={self.frames}: k-means needs one of each at least")
        if self.books is not None and (not self.books or min(self.books) < 1):
            raise ValueError(f"books={self.books}: give numbers of books of at least 1, or None for the bandwidths'")

    def draw(self, step: int, books: Sequence[int]) -> int:
        """One of `books` for a step (quantiser dropout), the same in all processes."""
        return random.Random(f"{self.seed}/{step}/books").choice(list(books))

    def generator(self, step: int, book: int) -> torch.Generator:
        """Random numbers of one book at one step, on the CPU."""
        return torch.Generator().manual_seed(random.Random(f"{self.seed}/{step}/{book}").getrandbits(63))


@dataclass(frozen=True, eq=False)
class Quantized:
    """What books make of embeddings (B, D, N)."""

    values: Tensor          # (B, D, N) float32, sum of the books' vectors; its gradient goes to the embeddings unchanged
    codes: Tensor           # (B, n_q, N) int64
    commit: Tensor          # (n_q) float32, mean squared distance of each book's input to its vector, towards the input


def residual_quantize(books: Iterable[Any], x: Tensor, rvq: RVQ | None = None, step: int = 0) -> Quantized:
    """Each book quantises what the ones before it left.

    books   stock XcodecVectorQuantization, the ones to use
    x       (B, D, N)
    rvq     books learn from x by it; None: they stay. `step` seeds what is drawn.

    In float32 under autocast too: distances in bfloat16 would choose other codes than `encode` does.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _residual_quantize(books, x.float(), rvq, step)


def _residual_quantize(books: Iterable[Any], x: Tensor, rvq: RVQ | None, step: int) -> Quantized:
    residual, total = x, torch.zeros_like(x)
    codes, commit = [], []
    for i, book in enumerate(books):
        seen = residual.detach().transpose(1, 2)                                # (B, N, D)
        flat = seen.flatten(0, 1)
        if rvq is not None and not book.codebook.inited:
            start(book.codebook, flat, rvq, rvq.generator(step, i))
        with torch.no_grad():
            code = book.codebook.encode(seen)                                   # (B, N)
            q = book.codebook.decode(code).transpose(1, 2)                      # (B, D, N)
        if rvq is not None:
            follow(book.codebook, flat, code.flatten(), rvq)
            revive(book.codebook, flat, rvq, rvq.generator(step, i))
        commit.append(F.mse_loss(residual, q))
        codes.append(code)
        residual, total = residual - q, total + q
    return Quantized(x + (total - x).detach(), torch.stack(codes, 1), torch.stack(commit))


@torch.no_grad()
def start(codebook: Any, x: Tensor, rvq: RVQ, generator: torch.Generator) -> None:
    """Put a codebook where k-means of the first batch says. x (M, D)"""
    means, counts = kmeans(_gathered(x), codebook.codebook_size, rvq, generator)
    counts = counts.clamp_min(1)
    codebook.embed.copy_(means)
    codebook.embed_avg.copy_(means * counts[:, None])
    codebook.cluster_size.copy_(counts)
    codebook.inited.fill_(1)
    _agree(codebook)


def kmeans(x: Tensor, size: int, rvq: RVQ, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random vectors. x (M, D) -> centres (size, D), vectors of each (size); empty ones stay put."""
    if len(x) > rvq.frames:
        x = x[_indices(len(x), rvq.frames, generator).to(x.device)]
    means = x[_indices(len(x), size, generator).to(x.device)]
    counts = means.new_zeros(size)
    for _ in range(rvq.iterations):
        nearest = (means.pow(2).sum(1) - 2 * x @ means.T).argmin(1)             # (M), of |x - m|^2 less |x|^2
        sums, counts = _tally(x, nearest, size)
        means = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], means)
    return means, counts


@torch.no_grad()
def follow(codebook: Any, x: Tensor, codes: Tensor, rvq: RVQ) -> None:
    """One step of the moving averages. x (M, D), codes (M) the nearest vector of each."""
    sums, counts = _tally(x, codes, codebook.codebook_size)
    if _ranks() > 1:
        dist.all_reduce(sums)
        dist.all_reduce(counts)
    codebook.cluster_size.lerp_(counts, 1 - rvq.decay)
    codebook.embed_avg.lerp_(sums, 1 - rvq.decay)
    size, n = codebook.cluster_size, codebook.cluster_size.sum()
    smooth = (size + rvq.epsilon) / (n + len(size) * rvq.epsilon) * n
    codebook.embed.copy_(codebook.embed_avg / smooth[:, None])


@torch.no_grad()
def revive(codebook: Any, x: Tensor, rvq: RVQ, generator: torch.Generator) -> None:
    """Move codes that are hardly used to where vectors are. x (M, D)"""
    dead = codebook.cluster_size < rvq.dead                                     # the same in all processes
    if not dead.any():
        return
    x = _gathered(x)
    fresh = x[_indices(len(x), len(dead), generator).to(x.device)]
    if rvq.revival == "split":
        _split(codebook, dead, fresh, rvq)
    else:
        codebook.embed.copy_(torch.where(dead[:, None], fresh, codebook.embed))
        codebook.embed_avg.copy_(torch.where(dead[:, None], fresh * rvq.dead, codebook.embed_avg))
        codebook.cluster_size.clamp_min_(rvq.dead)
    _agree(codebook)


def _split(codebook: Any, dead: Tensor, x: Tensor, rvq: RVQ) -> None:
    """The busiest codes, those with twice `dead` at least, each give a dead one half of their count and a place beside theirs,
    STEP of the way to a random vector. dead (K) bool, x (K, D)"""
    size, embed = codebook.cluster_size, codebook.embed
    count = min(int(dead.sum()), int((size >= 2 * rvq.dead).sum()))
    busy, idle = size.argsort(descending=True)[:count], dead.nonzero()[:count, 0]
    size[busy] /= 2
    size[idle] = size[busy]
    embed[idle] = embed[busy].lerp(x[idle], STEP)
    both = torch.cat([busy, idle])
    codebook.embed_avg[both] = embed[both] * size[both, None]


def _tally(x: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sum (size, D) and number (size) of the vectors x (M, D) of each code (M)."""
    sums = x.new_zeros(size, x.shape[1]).index_add_(0, codes, x)
    return sums, torch.bincount(codes, minlength=size).to(x)


def _indices(total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` of range(total), without repetition if there are enough."""
    if total >= count:
        return torch.randperm(total, generator=generator)[:count]
    return torch.randint(total, (count,), generator=generator)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gathered(x: Tensor) -> Tensor:
    """The vectors of all processes, which bring equally many. (M, D) -> (ranks * M, D)"""
    if _ranks() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(_ranks())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _agree(codebook: Any) -> None:
    """Take the first process's codebook, so that rounding cannot part them."""
    if _ranks() > 1:
        for buffer in (codebook.embed, codebook.embed_avg, codebook.cluster_size, codebook.inited):
            dist.broadcast(buffer, 0)
