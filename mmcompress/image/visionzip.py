"""VisionZip: dominant tokens kept, the rest merged into contextual ones (Yang et al., CVPR 2025).

The paper's: dominant tokens by the [CLS] attention of the penultimate vision layer, the same number in every tile; of
the rest, evenly strided anchors, to which each remaining token is assigned by the cosine of its keys; each group is
averaged into one contextual token. 10 of every 64 tokens are contextual. The code's (`merge="sum"`): anchor + mean of
its group, which doubles a token's scale. Ours: one exact total over the picture; transformers feeds the language model no
[CLS] tokens, so none are appended; newlines are dropped, as the authors' any-resolution code does, unless asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.canvas import crop_tokens
from ..ops.ranking import NewlinePolicy, apportion, check_newline_budget, check_newlines, keep_with_newlines
from ..tokens import ImageLayout, ImageReducer, Reduction, Tokens, select


@dataclass(frozen=True)
class VisionZip(ImageReducer):
    """Dominant and contextual tokens. Needs a vision tower with a [CLS] token.

    contextual   share of the kept tokens that are merged ones, in [0, 1); the paper's 10/64
    merge        "average" (the paper's) or "sum" (the authors' code: anchor + mean of the tokens assigned to it)
    newlines     "none" (default), "kept": the newline of each row that keeps a dominant token, "all"
    """

    contextual: float = 10 / 64
    merge: Literal["average", "sum"] = "average"
    newlines: NewlinePolicy = "none"

    captures: ClassVar[tuple[int, ...]] = (-2,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_newlines(self.newlines)
        if not 0 <= self.contextual < 1:
            raise ValueError(f"contextual={self.contextual}: lies in [0, 1)")
        if self.merge not in ("average", "sum"):
            raise ValueError(f"merge={self.merge!r}: 'average' or 'sum'")

    def count(self, layout: ImageLayout) -> int:
        k = super().count(layout)
        check_newline_budget(layout, k, self.newlines)
        return k

    def reduce(self, x: Tokens, k: int) -> Reduction:
        layout, places = x.layout, x.places
        paid = layout.newline_tokens if self.newlines == "all" else 0
        merged = min(int(k * self.contextual), k - 1 - paid) if k <= layout.patches else 0
        weight = torch.cat([torch.full((1,), layout.thumbnail_tokens), crop_tokens(layout, torch.device("cpu"))])
        ranking = apportion(x.cls_attention(-2), places.tile, weight.to(x.features)[None].expand(len(x.features), -1))
        dominant = keep_with_newlines(ranking, places, k - merged, self.newlines)                    # (B, K - C)
        return self._with_contextual(x, dominant, merged) if merged else select(x, dominant)

    def _with_contextual(self, x: Tokens, dominant: Tensor, merged: int) -> Reduction:
        """Merge all patches that are not dominant into `merged` contextual tokens."""
        (batch, n), device = x.features.shape[:2], x.features.device
        chosen = torch.zeros(batch, n, dtype=torch.bool, device=device).scatter(1, dominant, True)
        rest = ~chosen & x.places.is_patch                                                           # (B, N)
        number = torch.arange(merged, device=device)
        stride = number * rest.sum(1, keepdim=True) // merged                                        # (B, C), evenly
        place = torch.arange(n, device=device)
        anchor = torch.where(rest, place, n).sort(1).values.gather(1, stride)                        # (B, C)
        keys = F.normalize(x.keys(-2), dim=-1)
        group = (keys @ _pick(keys, anchor).transpose(1, 2)).argmax(2)                               # (B, N)
        group = group.scatter(1, anchor, number.expand(batch, -1))              # an anchor stands for itself
        member = F.one_hot(group, merged).to(x.features.dtype) * rest[..., None]                     # (B, N, C)
        mass = member.sum(1)                                                                         # (B, C)
        if self.merge == "average":
            context = member.transpose(1, 2) @ x.features / mass[..., None]
        else:
            own = _pick(x.features, anchor)
            context = own + (member.transpose(1, 2) @ x.features - own) / (mass - 1).clamp_min(1)[..., None]
        index, order = torch.cat([dominant, anchor], 1).sort(1)
        tokens = _pick(torch.cat([_pick(x.features, dominant), context], 1), order)
        mass = torch.cat([mass.new_ones(dominant.shape), mass], 1).gather(1, order)
        slot = torch.full((batch, n), -1, dtype=torch.int64, device=device)
        slot = slot.scatter(1, index, torch.arange(index.shape[1], device=device).expand(batch, -1))
        source = torch.where(rest, slot.gather(1, anchor).gather(1, group), slot)
        return Reduction(tokens=tokens, index=index, source=source, mass=mass.float())


def _pick(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
