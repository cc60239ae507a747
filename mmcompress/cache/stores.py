"""Keys and values in few bits, as a compressed cache holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops.kv_quant import Quantized, quantize


@dataclass(frozen=True, eq=False)
class InBits:
    """Keys or values (B, H_kv, N, d) in 8, 4 or 2 bits, on a grid a token.

    balance  (B, H_kv, 1, d) float32: they were multiplied by it before they were rounded (MiKV's balancer); None: were not
    """

    codes: Quantized
    balance: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def restore(self, dtype: torch.dtype) -> Tensor:
        x = self.codes.dequantize()
        return (x if self.balance is None else x / self.balance).to(dtype)

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.codes.codes, self.codes.scale, self.codes.zero)
        if self.balance is not None:
            yield self.balance

    def each(self, change: Callable[[Tensor], Tensor]) -> InBits:
        q = self.codes
        return InBits(replace(q, codes=change(q.codes), scale=change(q.scale), zero=change(q.zero)),
                      None if self.balance is None else change(self.balance))


def in_bits(x: Tensor, bits: int, group: int | None = None, balance: Tensor | None = None) -> InBits:
    """x (B, H_kv, N, d) rounded to `bits` bits, `group` channels of a token to a grid (default half of them)."""
    return InBits(quantize(x if balance is None else x.float() * balance, bits, "token", group), balance)
