"""Floating-point operations of a language model's prefill, from its configuration and the columns each layer sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def prefill_flops(config: Any, rows: int, columns: Sequence[int]) -> int:
    """Multiply-adds counted as two, of one forward pass over prompts.

    config   a model's configuration; its text part is read: gated MLP, grouped queries, as in Llama; an MLP without a width
             is taken for four times as wide as the model, as GPT-2's is
    rows     prompts
    columns  how many columns each decoder layer sees; padding counts, since it is computed

    Projections, attention (the causal half of it) and the MLP of every layer. Embeddings, norms, rotary positions and the
    vocabulary head (one column a row at prefill) are left out.
    """
    text = config.get_text_config()
    width, heads = text.hidden_size, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or width // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    inner = getattr(text, "intermediate_size", None) or 4 * width
    weights = 2 * width * head_dim * (heads + kv_heads) + 3 * width * inner
    return rows * sum(2 * n * weights + 2 * n * n * heads * head_dim for n in columns)
