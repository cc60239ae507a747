"""PyramidDrop: fewer image tokens at every stage of layers, ranked by the instruction (Xing et al., CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from ..budget import check_keep, keep_count
from ..ops.ranking import topk_in_order
from ..tokens import Layout, Reduction, Tokens, select
from .base import LayerReducer, Positions, Step, check_layer, check_positions

Stages = tuple[tuple[int, "float | int"], ...]


@dataclass(frozen=True)
class PyramidDrop(LayerReducer):
    """At the input of some layers, keep the tokens that the last instruction token attends to most.

    stages     (layer, keep) pairs: from this decoder layer on, counted from 0, this share of the tokens that entered the
               language model (or a count). The paper's, for 32 layers: a half at 8, a quarter at 16, an eighth at 24
    positions  "closed": positions are numbered anew at every stage, as the authors' code does (the paper is silent);
               "original": kept tokens keep theirs

    The ranking is the attention of layer K itself over the tokens that reach it, head mean, recomputed for the querying
    tokens only. They are the last token of the prompt, or in training (labels given) the tokens before each answer, mean.
    A row without an answer is ranked by its last token (the code leaves it whole, so its length would depend on data).
    """

    stages: Stages = ((8, 0.5), (16, 0.25), (24, 0.125))
    positions: Positions = "closed"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple((layer, keep) for layer, keep in self.stages))
        check_positions(self.positions)
        if not self.stages:
            raise ValueError("stages=(): at least one (layer, keep) pair, such as ((8, 0.5), (16, 0.25))")
        for layer, keep in self.stages:
            check_layer("PyramidDrop", layer)
            check_keep(keep)
        layers = [layer for layer, _ in self.stages]
        if sorted(set(layers)) != layers:
            raise ValueError(f"stages={self.stages}: layers must rise")

    @classmethod
    def for_depth(cls, depth: int, ratio: float = 0.5, positions: Positions = "closed") -> PyramidDrop:
        """The paper's stages for a language model of `depth` layers: `ratio`, `ratio`^2, `ratio`^3 at its quarters."""
        if depth < 4:
            raise ValueError(f"depth={depth}: PyramidDrop's four stages need at least 4 layers")
        return cls(tuple((depth * i // 4, ratio**i) for i in (1, 2, 3)), positions)

    def steps(self) -> tuple[Step, ...]:
        return tuple(Step(layer, _Ranked(keep), reads=layer, positions=self.positions) for layer, keep in self.stages)


@dataclass(frozen=True)
class _Ranked:
    """One stage: `keep` of the tokens that entered the language model, by attention."""

    keep: float | int

    def count(self, layout: Layout) -> int:
        return min(layout.tokens, keep_count(layout.entered, self.keep))

    def __call__(self, x: Tokens) -> Reduction:
        return select(x, topk_in_order(x.text_attention(), self.count(x.layout)))
