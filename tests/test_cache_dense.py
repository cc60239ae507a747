"""What a compressed cache has to equal: the stock model with its full cache and attention that hides what was dropped."""

from contextlib import contextmanager

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.masking_utils import eager_mask

from mmcompress.cache import CachePlan, CompressedCache, Kept

FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM, {}), "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
            "mistral": (MistralConfig, MistralForCausalLM, dict(sliding_window=None)),
            "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM,
                       dict(sliding_window=9, head_dim=8, query_pre_attn_scalar=8,
                            layer_types=["sliding_attention", "full_attention", "full_attention"]))}
NEAR = dict(atol=2e-5, rtol=1e-5)


def tiny_model(family="llama", attention="sdpa", depth=3, seed=0):
    """Four query heads on two key heads."""
    config, cls, more = FAMILIES[family]
    torch.manual_seed(seed)
    made = config(hidden_size=32, intermediate_size=48, num_hidden_layers=depth, num_attention_heads=4, num_key_value_heads=2,
                  vocab_size=100, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                  initializer_range=0.2, **more)
    model = cls._from_config(made, attn_implementation=attention).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def words(batch, n, seed=0):
    return torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(seed))


def prompt(lengths=(24, 15), side="left", seed=0):
    """-> ids and mask of rows of these lengths, padded on one side"""
    width = max(lengths)
    ids, mask = words(len(lengths), width, seed), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, width - n:] = 1
    ids = ids * mask
    return (ids, mask) if side == "left" else (ids.flip(1), mask.flip(1))


class Given(CachePlan):
    """Keeps what the test says: masks[layer] (H_kv, N) or (B, H_kv, N) bool."""

    def __init__(self, masks, **options):
        super().__init__(**options)
        object.__setattr__(self, "masks", masks)

    def scores(self, x):
        return x.slots.column.float()

    def evict(self, x, scores):
        return Kept(self.masks[x.layer].expand_as(x.valid) & x.valid)


def kept_columns(cache):
    """What each layer of a cache kept of the columns it has seen. -> {layer: (B, H_kv, L) bool}"""
    out = {}
    for i, layer in enumerate(cache.layers):
        if hasattr(layer, "slots"):
            s = layer.slots
            seen = torch.zeros(*s.column.shape[:2], layer.seen, dtype=torch.bool)
            out[i] = torch.stack([torch.stack([seen[b, h].index_fill(0, s.column[b, h][s.valid[b, h]].long(), True)
                                               for h in range(seen.shape[1])]) for b in range(len(seen))])
    return out


@contextmanager
def dense(model, kept, after):
    """The model over a full cache; queries from column `after` on see the kept ones of kept[layer] (B, H_kv, N), and all later.

    Rows of a prompt (beams) share its row of `kept`. A layer that `kept` does not name hides nothing.
    """
    def attention(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
        groups = query.shape[1] // key.shape[1]
        logits = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(groups, 1)) * scaling
        if mask is not None:
            logits = logits + mask
        if module.layer_idx in kept:
            length, queries = key.shape[2], query.shape[2]
            hide = torch.nn.functional.pad(~kept[module.layer_idx], (0, length))[..., :length]      # (B, H_kv, L)
            hide = hide.repeat_interleave(len(query) // len(hide), 0).repeat_interleave(groups, 1)
            late = torch.arange(length - queries, length) >= after
            logits = logits.masked_fill(hide[:, :, None] & late[:, None], -torch.inf)
        paid = logits.softmax(-1)
        return torch.einsum("bhqk,bhkd->bqhd", paid, value.repeat_interleave(groups, 1)), None

    AttentionInterface.register("dense_reference", attention)
    AttentionMaskInterface.register("dense_reference", eager_mask)
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = "dense_reference"
    try:
        yield model
    finally:
        config._attn_implementation = before


@torch.no_grad()
def turns(model, cache, calls):
    """Logits of several forwards over one cache. calls: dicts of arguments"""
    return [model(**call, past_key_values=cache).logits for call in calls]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_hides_nothing_where_nothing_was_dropped(family):
    model = tiny_model(family)
    ids, mask = prompt()
    stock = model(ids, attention_mask=mask).logits
    with dense(model, {}, 0):
        logits = model(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config)).logits
    torch.testing.assert_close(logits[mask.bool()], stock[mask.bool()], **NEAR)


def test_the_reference_equals_a_stock_model_with_an_explicit_mask():
    model = tiny_model()
    ids, more = words(1, 12), words(1, 4, 1)
    kept = torch.ones(1, 1, 12, dtype=torch.bool).index_fill(2, torch.tensor([2, 5, 6]), False)
    stock = DynamicCache(config=model.config)
    model(ids, past_key_values=stock)
    sees = torch.cat([kept[0].expand(4, -1), torch.ones(4, 4, dtype=torch.bool).tril()], 1)[None, None]
    want = model(more, past_key_values=stock, attention_mask=sees).logits
    with dense(model, {i: kept.expand(1, 2, -1) for i in range(3)}, 12):
        got = turns(model, DynamicCache(config=model.config), [dict(input_ids=ids), dict(input_ids=more)])[1]
    torch.testing.assert_close(got, want, **NEAR)
    assert not isinstance(stock, CompressedCache)
