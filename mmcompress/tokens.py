"""The nouns everything speaks: `Layout`, `Tokens`, `Reduction`, and the verb, `Reducer`.

A picture reaches a reducer as the sequence the language model would read: the thumbnail's tokens row by row, then each row of
the canvas that the crops tile, unpadded, closed by a newline token. A clip reaches it frame by frame, a recording in time.
`ImageLayout`, `VideoLayout` and `AudioLayout` say where each of these tokens lies, so a method needs no other geometry, and a
budget counts what the language model really pays for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from .budget import check_keep, keep_count
from .errors import SignalError
from .layout import ImageLayout as ImageLayout
from .layout import Layout, Places, VideoLayout


@dataclass(frozen=True, eq=False)
class LayerState:
    """One vision layer's projections for B pictures of T tiles (or clips of T frames), as its q_proj and k_proj gave them.

    `query` is the first token's, which is [CLS] where the tower has one; S counts every token of a tile. `grid` are the
    tower's patch rows and columns where they are not the language model's (pooled features); None: they are. `received`
    is the attention that each token receives, averaged over heads and querying tokens, where a reducer asked for it.
    """

    query: Tensor           # (B, T, H, d)
    keys: Tensor            # (B, T, S, H, d)
    grid: tuple[int, int] | None = None
    received: Tensor | None = None      # (B, T, S) float32


@dataclass(frozen=True, eq=False)
class Tokens:
    """B pictures, clips or recordings of one layout, ready to be reduced; signals are computed when read.

    `features` (B, N, D) are the projected tokens in the order of the language model. `vision` holds the layers that
    the reducer named in its `captures`; None stands for one that this tower cannot give. `question` (B, Q, D) are the input
    embeddings of the text that follows the picture in its prompt, right-padded, `question_mask` (B, Q) bool which of them are
    real. Inside the language model `features` are the hidden states that enter a decoder layer, and `attention` (B, N)
    float32 is what the prompt's querying tokens pay each token, softmaxed over all they see, averaged over heads and queries;
    `received` (B, N) float32 is what all tokens of the prompt pay it, summed over heads and queries; `decoder_keys`
    (B, N, H_kv, d) are a decoder layer's keys after rotation. Each is there where the step names it in its `signals`.
    `mel` (B, N, bins) float32 is a recording's log-mel spectrogram as the model heard it, averaged over each token's frames,
    for reducers that say `reads_spectrogram`.
    `weights` are the language model's query and key weights of its first layer, (H, d, D) and (H_kv, d, D), for reducers that
    say `reads_first_layer`.
    """

    features: Tensor
    layout: Any
    vision: Mapping[int, LayerState | None] = field(default_factory=dict)
    question: Tensor | None = None
    question_mask: Tensor | None = None
    attention: Tensor | None = None
    mel: Tensor | None = None
    weights: tuple[Tensor, Tensor] | None = None
    received: Tensor | None = None
    decoder_keys: Tensor | None = None

    @property
    def places(self) -> Places:
        return self.layout.places(self.features.device)

    @property
    def frames(self) -> Tensor:
        """A clip's features by frame and cell, without its tail. (B, T, P, D)"""
        t, p = self.layout.frames, self.layout.cells
        return self.features[:, :t * p].unflatten(1, (t, p))

    def spectrogram(self) -> Tensor:
        """Log-mel spectrogram by token (B, N, bins) float32; raises SignalError where no recording came with it."""
        if self.mel is None:
            raise SignalError("there is no spectrogram here: silence and energy are read from a recording's input_features; "
                              "use a reducer that says `reads_spectrogram`, as audio=... on a model that hears")
        return self.mel

    def first_layer(self) -> tuple[Tensor, Tensor]:
        """Query weights (H, d, D) and key weights (H_kv, d, D) of the language model's first layer."""
        if self.weights is None:
            raise SignalError("there are no weights of a first layer here: the model has no language model that reads sound "
                              "and question in one prompt (Whisper), or the reducer does not say `reads_first_layer`")
        return self.weights

    def cut(self, start: int, end: int, layout: Any) -> Tokens:
        """The tokens from `start` to `end` alone, as items of their own layout. For recordings: no vision layers."""
        part = lambda x: None if x is None else x[:, start:end]  # noqa: E731
        return replace(self, features=self.features[:, start:end], layout=layout, vision={}, attention=part(self.attention),
                       mel=part(self.mel), received=part(self.received), decoder_keys=part(self.decoder_keys))

    def layer(self, layer: int) -> LayerState:
        """Queries and keys of one vision layer; raises SignalError if they were not captured or cannot be."""
        if layer not in self.vision:
            raise SignalError(f"vision layer {layer} was not captured (captured: {sorted(self.vision) or 'none'}); "
                              f"name it in the reducer's `captures`")
        state = self.vision[layer]
        if state is None:
            raise SignalError("this vision tower's attention has no separate query and key projections to read, so there is "
                              "no [CLS] attention and no received attention; use a reducer that does without")
        return state

    def text_attention(self) -> Tensor:
        """Attention of the prompt's querying tokens (B, N) float32; raises SignalError outside the language model."""
        if self.attention is None:
            raise SignalError("the language model's attention to the picture exists inside it only; pass this reducer to "
                              "wrap(model, layers=[...]), not as image=...")
        return self.attention

    def received_attention(self) -> Tensor:
        """Attention of all tokens of the prompt (B, N) float32, a sum; raises SignalError where it was not read."""
        if self.received is None:
            raise SignalError("the attention that tokens receive exists inside the language model, where a step names "
                              "'received' in its signals; pass this reducer to wrap(model, layers=[...])")
        return self.received

    def layer_keys(self) -> Tensor:
        """A decoder layer's rotated keys (B, N, H_kv, d); raises SignalError where they were not read."""
        if self.decoder_keys is None:
            raise SignalError("a decoder layer's keys exist inside the language model, where a step names 'keys' in its "
                              "signals; pass this reducer to wrap(model, layers=[...])")
        return self.decoder_keys

    def has_cls(self, layer: int = -1) -> bool:
        """Whether the vision tower puts a [CLS] token before its patches."""
        if layer in self.vision and self.vision[layer] is None:
            return False
        state = self.layer(layer)
        rows, columns = state.grid or self.layout.tile
        return state.keys.shape[2] > rows * columns

    def cls_logits(self, layer: int = -1) -> Tensor:
        """[CLS] row of a layer before the softmax, q k^T / sqrt(d), averaged over heads. (B, N) float32, 0 at newlines."""
        return self._spread(self._cls_row(layer).mean(2), layer)

    def cls_attention(self, layer: int = -1) -> Tensor:
        """[CLS] row of a layer's attention, averaged over heads. (B, N) float32, 0 at newlines.

        Softmaxed over every token of the tile, [CLS] and padding included, as the tower itself does.
        """
        return self._spread(self._cls_row(layer).softmax(-1).mean(2), layer)

    def saliency(self, layer: int = -1) -> Tensor:
        """How much attention a layer pays each token: the [CLS] row, or without [CLS] the mean over all querying tokens.

        (B, N) float32, averaged over heads, 0 at newlines. Where the language model reads pooled patches, their mean.
        """
        if self.has_cls(layer):
            return self.cls_attention(layer)
        received = self.layer(layer).received
        if received is None:
            raise SignalError(f"the attention that tokens receive in vision layer {layer} was not computed; name the layer in "
                              f"the reducer's `receives`")
        return self._spread(received, layer)

    def keys(self, layer: int = -1) -> Tensor:
        """Keys of a layer averaged over heads. (B, N, d) float32, 0 at newlines."""
        return self._spread(self.layer(layer).keys.float().mean(3), layer)

    def _cls_row(self, layer: int) -> Tensor:
        if not self.has_cls(layer):
            self.layer(layer)
            raise SignalError("this vision tower has no [CLS] token, so there is no [CLS] attention; use a reducer that "
                              "does without (GlobalCom2 and GlobalRank with scores='cosine' or 'auto', AveragePool, ...)")
        state = self.layer(layer)
        scale = state.query.shape[-1] ** -0.5
        return torch.einsum("bthd,btshd->bths", state.query.float(), state.keys.float()) * scale     # (B, T, H, S)

    def _spread(self, x: Tensor, layer: int) -> Tensor:
        """(B, T, S, ...) of every tile -> (B, N, ...) in sequence order, zero at newlines."""
        rows, columns = self.layer(layer).grid or self.layout.tile
        x = x[:, :, x.shape[2] - rows * columns:]                                                    # without [CLS]
        if (rows, columns) != tuple(self.layout.tile):
            x = _pool(x, (rows, columns), self.layout.tile)
        if isinstance(self.layout, VideoLayout):
            lead = x.new_zeros(*x.shape[:2], self.layout.lead, *x.shape[3:])
            x = torch.cat([lead, x], 2).flatten(1, 2)
            return torch.cat([x, x.new_zeros(len(x), self.layout.tail, *x.shape[2:])], 1)
        x = x.flatten(1, 2).index_select(1, self.places.patch)
        keep = self.places.is_patch.view(1, -1, *[1] * (x.ndim - 2))
        return x.masked_fill(~keep, 0)


def _pool(x: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Means of the patches that each token covers. (B, T, rows * columns, ...) -> (B, T, tokens, ...)"""
    maps = x.flatten(3).transpose(2, 3) if x.ndim > 3 else x[:, :, None]                             # (B, T, C, S)
    batch, frames, channels, _ = maps.shape
    pooled = F.adaptive_avg_pool2d(maps.reshape(batch * frames, channels, *grid), to)
    pooled = pooled.view(batch, frames, channels, -1)
    return pooled.transpose(2, 3).reshape(batch, frames, -1, *x.shape[3:]) if x.ndim > 3 else pooled[:, :, 0]


@dataclass(frozen=True, eq=False)
class Reduction:
    """What every token reducer returns, batch first. Heat-map, positions, un-merging and the report follow from it."""

    tokens: Tensor                  # (B, K, D)
    index: Tensor                   # (B, K) int64: the input position each output stands for, in reading order
    source: Tensor                  # (B, N) int64: the output slot each input went to, -1 if dropped
    mass: Tensor | None = None      # (B, K) how many inputs each output stands for (merging); None: one each
    valid: Tensor | None = None     # (B, K) bool, for reproductions whose count depends on the data; None: all valid


@runtime_checkable
class Reducer(Protocol):
    """A token reducer: K from the layout alone, then features to a `Reduction` of K tokens."""

    def count(self, layout: Any) -> int: ...

    def __call__(self, x: Tokens) -> Reduction: ...


@dataclass(frozen=True)
class BaseReducer(ABC):
    """Base of the built-in reducers: a frozen dataclass whose fields are its configuration.

    A subclass writes `reduce(x, k)`; the budget, the identity at `keep=1.0` and the checks are here. `captures` names
    the vision layers whose queries and keys it reads (-1 is the last), `receives` those of which it reads the attention that
    each token receives (it costs one attention map a tile), `reads_question` asks for the prompt's text, `positions` is where
    the language model sees the kept tokens unless the user says otherwise, and `count_is_bound` is for reducers whose count
    depends on the data (see `Reduction.valid`).
    """

    keep: float | int = 0.25

    captures: ClassVar[tuple[int, ...]] = ()
    receives: ClassVar[tuple[int, ...]] = ()
    reads_question: ClassVar[bool] = False
    positions: ClassVar[Literal["closed", "original"]] = "closed"

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def count(self, layout: Any) -> int:
        """Tokens kept of an item of this layout, newlines included."""
        return keep_count(layout.tokens, self.keep)

    def __call__(self, x: Tokens) -> Reduction:
        k = self.count(x.layout)
        return identity(x) if k == x.layout.tokens else self.reduce(x, k)

    @abstractmethod
    def reduce(self, x: Tokens, k: int) -> Reduction:
        """Reduce N tokens to k < N."""


@dataclass(frozen=True)
class ImageReducer(BaseReducer):
    """Base of the reducers of pictures; `x.layout` is an `ImageLayout`."""


@dataclass(frozen=True)
class VideoReducer(BaseReducer):
    """Base of the reducers of clips; `x.layout` is a `VideoLayout`.

    A subclass writes `reduce_frames(x, k)` over the T * P cells of `x.frames`. The tail of a clip (LLaVA-OneVision's
    newline) is kept and paid from the budget, unless the budget has room for it alone.
    """

    positions: ClassVar[Literal["closed", "original"]] = "original"

    def reduce(self, x: Tokens, k: int) -> Reduction:
        tail = min(x.layout.tail, k - 1)
        return _with_tail(x, self.reduce_frames(x, k - tail), tail)

    @abstractmethod
    def reduce_frames(self, x: Tokens, k: int) -> Reduction:
        """Reduce the T * P cells of the frames to k < T * P; indices count cells."""

    def causal(self, frames: Tensor, layout: VideoLayout, before: Tensor | None = None, start: int = 0
               ) -> tuple[Tensor, Tensor | None]:
        """What a stream needs: how much each cell is worth, judged by what came before it alone.

        frames (B, T, P, D), before (B, P, D): the frame in front of them, None where the clip begins; start: cells before them
        -> worth (B, T, P), the k largest of a clip are kept, of equals the earlier; and for methods that merge the parent that
        a cell joins if it is not kept, (B, T, P) int64, cells numbered from the first of `frames`, those of `before` from -P
        """
        raise ValueError(f"{type(self).__name__} looks at the whole clip before it keeps a token, so a stream cannot equal it; "
                         f"use SpatioTemporalMerge, EVS or Random, or reduce windows of frames")


def _with_tail(x: Tokens, of_frames: Reduction, tail: int) -> Reduction:
    """A reduction of a clip's cells, followed by the first `tail` tokens of its tail."""
    if not x.layout.tail:
        return of_frames
    (batch, k), n = of_frames.index.shape, x.layout.tokens
    cells = x.layout.frames * x.layout.cells
    more = torch.arange(tail, device=of_frames.index.device).expand(batch, -1)
    gone = of_frames.source.new_full((batch, n - cells - tail), -1)
    together = lambda a, b: torch.cat([a, b], 1)  # noqa: E731
    return Reduction(
        tokens=together(of_frames.tokens, x.features[:, cells:cells + tail]), index=together(of_frames.index, cells + more),
        source=torch.cat([of_frames.source, k + more, gone], 1),
        mass=None if of_frames.mass is None else together(of_frames.mass, of_frames.mass.new_ones(batch, tail)),
        valid=None if of_frames.valid is None else together(of_frames.valid, of_frames.valid.new_ones(batch, tail)))


def identity(x: Tokens) -> Reduction:
    """Everything is kept, untouched."""
    batch, n = x.features.shape[:2]
    index = torch.arange(n, device=x.features.device).expand(batch, n)
    return Reduction(tokens=x.features, index=index, source=index)


@dataclass(frozen=True)
class KeepAll:
    """The reducer that keeps everything, for a modality that is not reduced before the language model."""

    def count(self, layout: Layout) -> int:
        return layout.tokens

    def __call__(self, x: Tokens) -> Reduction:
        return identity(x)


def select(x: Tokens, index: Tensor) -> Reduction:
    """The reduction that keeps the tokens at `index` (B, K) int64 and drops the rest."""
    return select_from(x.features, index)


def select_from(features: Tensor, index: Tensor) -> Reduction:
    """The same of features (B, N, D) alone."""
    batch, k = index.shape
    tokens = features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))
    source = torch.full((batch, features.shape[1]), -1, dtype=torch.int64, device=index.device)
    source = source.scatter(1, index, torch.arange(k, device=index.device).expand(batch, k))
    return Reduction(tokens=tokens, index=index, source=source)
