"""The picture of a compressed cache: states of every token of every head."""

import numpy as np
import pytest
import torch
from test_cache_dense import kept_columns, prompt, tiny_model, turns, words
from transformers import DynamicCache

from mmcompress.cache import KNorm, KVMerger, MiKV, RazorAttention, SnapKV, attach, chain
from mmcompress.viz import plot_slots, slot_maps
from mmcompress.viz.slots import DROPPED, EXACT, FOLDED, ROUNDED


def filled(plan, lengths=(24, 15)):
    model, (ids, mask) = tiny_model(), prompt(lengths)
    with attach(model, plan) as attached:
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=ids, attention_mask=mask)])
    return cache


def test_states_are_what_is_held():
    cache = filled(chain([SnapKV(0.5, recent=4), MiKV(high=0.25)]))
    for row in range(2):
        maps = slot_maps(cache, row)
        for layer, state in maps.items():
            held = kept_columns(cache)[layer][row].numpy()
            assert state.shape == (2, 24) and np.array_equal(state != DROPPED, held)
            exact = cache.layers[layer].parts[1]
            for head in range(2):
                columns = exact.column[row, head][exact.valid[row, head]].tolist()
                assert sorted(np.flatnonzero(state[head] == EXACT).tolist()) == sorted(columns) and columns
                assert (state[head] == ROUNDED).sum() == held[head].sum() - len(columns)


def test_slots_that_stand_for_several_and_heads_of_unlike_length():
    cache = filled(RazorAttention(0.3, sinks=2, recent=3, retrieval=((0, 1),)), (24, 24))
    maps = slot_maps(cache)
    assert (maps[0][1] == EXACT).all()
    assert [(state == FOLDED).sum() for state in maps.values()] == [1, 2, 2]
    cache = filled(KVMerger(0.5, mass=True, eps=-1.0), (24, 24))
    for layer, state in slot_maps(cache).items():
        slots = cache.layers[layer].slots
        assert (state == FOLDED).sum() == int((slots.mass[0] > 1.5).sum()) > 0


def test_the_figure_says_what_it_shows():
    figure = plot_slots(filled(KNorm(0.5)), tokens=[f"w{i}" for i in range(24)])
    said = " ".join(text.get_text() for text in figure.texts)
    assert "KNorm(keep=0.5)" in said and "24 tokens" in said and "exact" in said and "in few bits" not in said
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == [f"w{i}" for i in range(24)]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_what_cannot_be_shown():
    model = tiny_model()
    with attach(model, KNorm(0.5)) as attached, pytest.raises(ValueError, match="the cache is empty"):
        plot_slots(attached.cache())
    with pytest.raises(ValueError, match="3 tokens for 24 columns"):
        plot_slots(filled(KNorm(0.5)), tokens=["a", "b", "c"])
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        model(words(1, 4), past_key_values=stock)
    assert slot_maps(stock) == {}
