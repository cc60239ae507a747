"""The nouns everything speaks: `Layout`, `Tokens`, `Reduction`, and the verb, `Reducer`.

A picture reaches a reducer as the sequence the language model would read: the thumbnail's tokens row by row, then
each row of the canvas that the crops tile, unpadded, closed by a newline token. `ImageLayout` says where each of
these tokens lies, so a method needs no other geometry, and a budget counts what the language model really pays for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from .budget import check_keep, keep_count
from .errors import SignalError
from .layout import ImageLayout, Layout, Places


@dataclass(frozen=True, eq=False)
class LayerState:
    """One vision layer's projections for B pictures of T tiles, as its q_proj and k_proj gave them.

    `query` is the first token's, which is [CLS] where the tower has one; S counts every token of a tile.
    """

    query: Tensor           # (B, T, H, d)
    keys: Tensor            # (B, T, S, H, d)


@dataclass(frozen=True, eq=False)
class Tokens:
    """B pictures of one layout, ready to be reduced; signals are computed when read.

    `features` (B, N, D) are the projected tokens in the order of the language model. `vision` holds the layers that
    the reducer named in its `captures`. `question` (B, Q, D) are the input embeddings of the text that follows the
    picture in its prompt, right-padded, `question_mask` (B, Q) bool which of them are real. Inside the language model
    `features` are the hidden states that enter a decoder layer, and `attention` (B, N) float32 is what the prompt's
    querying tokens pay each token, softmaxed over all they see, averaged over heads and queries.
    """

    features: Tensor
    layout: Any
    vision: Mapping[int, LayerState] = field(default_factory=dict)
    question: Tensor | None = None
    question_mask: Tensor | None = None
    attention: Tensor | None = None

    @property
    def places(self) -> Places:
        return self.layout.places(self.features.device)

    def layer(self, layer: int) -> LayerState:
        """Queries and keys of one vision layer; raises SignalError if they were not captured."""
        if layer not in self.vision:
            raise SignalError(f"vision layer {layer} was not captured (captured: {sorted(self.vision) or 'none'}); "
                              f"name it in the reducer's `captures`")
        return self.vision[layer]

    def text_attention(self) -> Tensor:
        """Attention of the prompt's querying tokens (B, N) float32; raises SignalError outside the language model."""
        if self.attention is None:
            raise SignalError("the language model's attention to the picture exists inside it only; pass this reducer to "
                              "wrap(model, layers=[...]), not as image=...")
        return self.attention

    def has_cls(self, layer: int = -1) -> bool:
        """Whether the vision tower puts a [CLS] token before its patches."""
        return self.layer(layer).keys.shape[2] > self.layout.thumbnail_tokens

    def cls_logits(self, layer: int = -1) -> Tensor:
        """[CLS] row of a layer before the softmax, q k^T / sqrt(d), averaged over heads. (B, N) float32, 0 at newlines."""
        return self._spread(self._cls_row(layer).mean(2))

    def cls_attention(self, layer: int = -1) -> Tensor:
        """[CLS] row of a layer's attention, averaged over heads. (B, N) float32, 0 at newlines.

        Softmaxed over every token of the tile, [CLS] and padding included, as the tower itself does.
        """
        return self._spread(self._cls_row(layer).softmax(-1).mean(2))

    def keys(self, layer: int = -1) -> Tensor:
        """Keys of a layer averaged over heads. (B, N, d) float32, 0 at newlines."""
        return self._spread(self.layer(layer).keys.float().mean(3))

    def _cls_row(self, layer: int) -> Tensor:
        state = self.layer(layer)
        if not self.has_cls(layer):
            raise SignalError("this vision tower has no [CLS] token, so there is no [CLS] attention; use a reducer that "
                              "does without (GlobalCom2 and GlobalRank with scores='cosine' or 'auto', AveragePool, ...)")
        scale = state.query.shape[-1] ** -0.5
        return torch.einsum("bthd,btshd->bths", state.query.float(), state.keys.float()) * scale     # (B, T, H, S)

    def _spread(self, x: Tensor) -> Tensor:
        """(B, T, S, ...) of every tile -> (B, N, ...) in sequence order, zero at newlines."""
        x = x[:, :, x.shape[2] - self.layout.thumbnail_tokens:].flatten(1, 2)
        x = x.index_select(1, self.places.patch)
        keep = self.places.is_patch.view(1, -1, *[1] * (x.ndim - 2))
        return x.masked_fill(~keep, 0)


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
class ImageReducer(ABC):
    """Base of the built-in reducers: a frozen dataclass whose fields are its configuration.

    A subclass writes `reduce(x, k)`; the budget, the identity at `keep=1.0` and the checks are here. `captures` names
    the vision layers whose queries and keys it reads (-1 is the last), `reads_question` asks for the prompt's text,
    `positions` is where the language model sees the kept tokens unless the user says otherwise, and `count_is_bound` is
    for reproductions whose count depends on the data (see `Reduction.valid`).
    """

    keep: float | int = 0.25

    captures: ClassVar[tuple[int, ...]] = ()
    reads_question: ClassVar[bool] = False
    positions: ClassVar[Literal["closed", "original"]] = "closed"

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def count(self, layout: ImageLayout) -> int:
        """Tokens kept of a picture of this layout, newlines included."""
        return keep_count(layout.tokens, self.keep)

    def __call__(self, x: Tokens) -> Reduction:
        k = self.count(x.layout)
        return identity(x) if k == x.layout.tokens else self.reduce(x, k)

    @abstractmethod
    def reduce(self, x: Tokens, k: int) -> Reduction:
        """Reduce N tokens to k < N."""


def identity(x: Tokens) -> Reduction:
    """Everything is kept, untouched."""
    batch, n = x.features.shape[:2]
    index = torch.arange(n, device=x.features.device).expand(batch, n)
    return Reduction(tokens=x.features, index=index, source=index)


@dataclass(frozen=True)
class KeepAll:
    """The reducer that keeps everything, where pictures are reduced inside the language model only."""

    def count(self, layout: Layout) -> int:
        return layout.tokens

    def __call__(self, x: Tokens) -> Reduction:
        return identity(x)


def select(x: Tokens, index: Tensor) -> Reduction:
    """The reduction that keeps the tokens at `index` (B, K) int64 and drops the rest."""
    batch, k = index.shape
    tokens = x.features.gather(1, index[..., None].expand(-1, -1, x.features.shape[-1]))
    source = torch.full((batch, x.features.shape[1]), -1, dtype=torch.int64, device=index.device)
    source = source.scatter(1, index, torch.arange(k, device=index.device).expand(batch, k))
    return Reduction(tokens=tokens, index=index, source=source)
