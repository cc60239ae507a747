"""FasterVLM: keep the tokens of highest [CLS] attention (Zhang et al., "[CLS] Attention is All You Need", 2024).

The paper's: rank a picture's visual tokens by the last layer's [CLS] attention, averaged over heads, and keep the top.
Ours: one ranking over thumbnail and crops of a high-resolution picture, and newlines paid from the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ops.ranking import NewlinePolicy, check_newline_budget, check_newlines, keep_with_newlines
from ..tokens import ImageLayout, ImageReducer, Reduction, Tokens, select


@dataclass(frozen=True)
class ClsTopK(ImageReducer):
    """Top [CLS] attention over every tile of the picture. Needs a vision tower with a [CLS] token.

    newlines     "kept": the newline of each row that keeps a token, "all", "none"; paid from the budget
    """

    newlines: NewlinePolicy = "kept"

    captures: ClassVar[tuple[int, ...]] = (-1,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_newlines(self.newlines)

    def count(self, layout: ImageLayout) -> int:
        k = super().count(layout)
        check_newline_budget(layout, k, self.newlines)
        return k

    def reduce(self, x: Tokens, k: int) -> Reduction:
        return select(x, keep_with_newlines(x.cls_attention(-1), x.places, k, self.newlines))
