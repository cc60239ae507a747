"""FastV: from layer K on, only the image tokens that the last prompt token attends to (Chen et al., ECCV 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from ..budget import check_keep, keep_count
from ..ops.ranking import topk_in_order
from ..tokens import Layout, Reduction, Tokens, select
from .base import LayerReducer, Positions, Step, check_layer, check_positions


@dataclass(frozen=True)
class FastV(LayerReducer):
    """Rank a picture's tokens by the attention that the last prompt token pays them in layer K-1, head mean; keep the top.

    layer      K, counted from 0: the first decoder layer that no longer sees the dropped tokens (2 in the paper's best
               setting, 3 in the authors' public lmms-eval code)
    keep       share of the picture's tokens that reach layer K, newline tokens included, or a count; the paper's R is 1 - keep
    positions  the paper and its code keep original rotary positions ("original")

    The attention is recomputed for this one query, so SDPA and FlashAttention stay on; the code materialises the whole
    map of layer K-1 and runs that layer twice. The code ranks row 0 of the batch only; here every picture of every row is
    ranked by itself. Where labels are given (training), the queries are the tokens before each answer, as PyramidDrop
    trains; the paper has no training.
    """

    layer: int = 2
    keep: float | int = 0.5
    positions: Positions = "original"

    def __post_init__(self) -> None:
        check_layer("FastV", self.layer)
        check_keep(self.keep)
        check_positions(self.positions)

    def steps(self) -> tuple[Step, ...]:
        return (Step(self.layer, self, reads=self.layer - 1, positions=self.positions),)

    def count(self, layout: Layout) -> int:
        """Tokens kept of a picture of which this many reach layer K."""
        return keep_count(layout.tokens, self.keep)

    def __call__(self, x: Tokens) -> Reduction:
        return select(x, topk_in_order(x.text_attention(), self.count(x.layout)))
