"""A compressed cache: exact against the stock model and a dense reference, layer by layer and head by head."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache_dense import FAMILIES, NEAR, Given, dense, kept_columns, prompt, tiny_model, turns, words
from transformers import DynamicCache

from mmcompress import UnsupportedModelError
from mmcompress.budget import keep_count
from mmcompress.cache import (
    H2O,
    CompressedCache,
    KeyDiff,
    KNorm,
    Random,
    RazorAttention,
    Recent,
    Slots,
    SnapKV,
    StreamingLLM,
    attach,
    fold_into,
)
from mmcompress.cache.attention import attend_explicit, attend_sdpa
from mmcompress.cache.plan import admit, budget
from mmcompress.cache.view import Sight

PLANS = {"streaming_llm": StreamingLLM(0.5, sinks=2), "recent": Recent(0.4), "random": Random(0.5), "knorm": KNorm(0.5),
         "keydiff": KeyDiff(0.4), "h2o": H2O(0.5), "snapkv": SnapKV(0.5, recent=4), "h2o_count": H2O(9),
         "razor": RazorAttention(0.4, sinks=2, recent=3, retrieval=((0, 1), (2, 0)))}


def some(layers, heads, n, seed=0, keep=0.5):
    """Random masks, unlike in every layer and head. -> {layer: (heads, n) bool}"""
    g = torch.Generator().manual_seed(seed)
    return {i: torch.rand(heads, n, generator=g) < keep for i in range(layers)}


# nothing dropped ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keep_one_equals_stock_to_the_bit(family, attention):
    model = tiny_model(family, attention)
    (ids, mask), more = prompt(), words(2, 5, 1)
    longer = torch.cat([mask, torch.ones_like(more)], 1)
    calls = [dict(input_ids=ids, attention_mask=mask), dict(input_ids=more, attention_mask=longer)]
    want = turns(model, DynamicCache(config=model.config), calls)
    text = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    with attach(model, H2O(1.0)) as attached:
        cache = attached.cache()
        got = turns(model, cache, calls)
        made = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    for a, b in zip(got, want):
        assert torch.equal(a, b)
    assert torch.equal(made.sequences, text)
    assert isinstance(made.past_key_values, CompressedCache) and all(layer.whole for layer in cache.slot_layers)


# dropped, against a full cache with masks -----------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_a_second_turn_equals_a_full_cache_with_an_explicit_mask(family, attention):
    """Alike in all layers and heads, so the reference is the stock model itself."""
    model = tiny_model(family, attention)
    ids, more = words(1, 20), words(1, 7, 1)
    kept = torch.ones(20, dtype=torch.bool).index_fill(0, torch.tensor([3, 4, 9, 15]), False)
    stock, rows = DynamicCache(config=model.config), []
    model(ids, past_key_values=stock)
    for queries, at in ((7, 0), (1, 7)):
        allowed = torch.cat([kept.expand(queries, -1), torch.ones(queries, at, dtype=torch.bool),
                             torch.ones(queries, queries, dtype=torch.bool).tril()], 1)[None, None]
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        rows.append(model(more[:, :queries], past_key_values=stock, attention_mask=bias).logits)
    with attach(model, Given([kept] * 3)) as attached:
        cache = attached.cache()
        got = turns(model, cache, [dict(input_ids=ids), dict(input_ids=more), dict(input_ids=more[:, :1])])
    assert cache.lengths == [24] * 3 and cache.get_seq_length() == 28
    for a, b in zip(got[1:], rows):
        torch.testing.assert_close(a, b, **NEAR)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_heads_that_keep_unlike_equal_a_dense_reference(family, attention):
    """Padded rows, unlike budgets in every layer and head; a second turn, then decoding."""
    model = tiny_model(family, attention)
    (ids, mask), more = prompt((24, 15)), words(2, 6, 1)
    masks = some(3, 2, 24)
    masks[1][0] = True                                      # one head keeps everything
    masks[2][1] = torch.arange(24) == 20                    # one keeps a single token
    ones = lambda n: torch.cat([mask, mask.new_ones(2, n)], 1)  # noqa: E731
    calls = [dict(input_ids=ids, attention_mask=mask), dict(input_ids=more, attention_mask=ones(6)),
             dict(input_ids=more[:, :1], attention_mask=ones(7)), dict(input_ids=more[:, 1:2], attention_mask=ones(8))]
    with attach(model, Given(masks)) as attached:
        cache = attached.cache()
        got = turns(model, cache, calls)
    kept = kept_columns(cache)
    assert {int(k[0, h, :24].sum()) for k in kept.values() for h in range(2)} == \
        {int(masks[i][h].sum()) for i in kept for h in range(2)}
    with dense(model, {i: k[..., :24] for i, k in kept.items()}, 24):
        want = turns(model, DynamicCache(config=model.config), calls)
    for a, b in zip(got[1:], want[1:]):
        torch.testing.assert_close(a, b, **NEAR)
    if family == "gemma3":
        assert not hasattr(cache.layers[0], "slots") and cache.layers[0].keys.shape[2] == 8


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PLANS)
def test_a_padded_batch_equals_its_rows_alone(name, side):
    model = tiny_model()
    ids, mask = prompt((24, 15, 7), side)
    more = words(3, 5, 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    after = mask.sum(1, keepdim=True) + torch.arange(5)
    ones = lambda n: torch.cat([mask, mask.new_ones(3, n)], 1)  # noqa: E731
    calls = [dict(input_ids=ids, attention_mask=mask, position_ids=positions),
             dict(input_ids=more, attention_mask=ones(5), position_ids=after),
             dict(input_ids=more[:, :1], attention_mask=ones(6), position_ids=after[:, -1:] + 1)]
    with attach(model, PLANS[name]) as attached:
        cache = attached.cache()
        batch = turns(model, cache, calls)
        for row in range(3):
            own = mask[row].bool()
            alone = attached.cache()
            single = turns(model, alone, [dict(input_ids=ids[row][own][None]), dict(input_ids=more[row:row + 1]),
                                          dict(input_ids=more[row:row + 1, :1])])
            torch.testing.assert_close(batch[1][row], single[1][0], **NEAR)
            torch.testing.assert_close(batch[2][row], single[2][0], **NEAR)
            there, here = kept_columns(alone), kept_columns(cache)
            for layer, kept in there.items():
                both = torch.cat([here[layer][row, :, :ids.shape[1]][:, own], here[layer][row, :, ids.shape[1]:]], 1)
                assert torch.equal(both, kept[0])
    assert not any(layer.whole for layer in cache.slot_layers)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision_decodes_as_the_dense_reference(attention):
    model = tiny_model(attention=attention).bfloat16()
    calls = [dict(input_ids=words(2, 24)), dict(input_ids=words(2, 6, 1)), dict(input_ids=words(2, 1, 2))]
    stock = turns(model, DynamicCache(config=model.config), calls)
    with attach(model, SnapKV(0.4, recent=4)) as attached:
        cache, whole = attached.cache(), CompressedCache(model.config)
        got = turns(model, cache, calls)
        assert all(torch.equal(a, b) for a, b in zip(turns(model, whole, calls), stock))
    with dense(model, {i: k[..., :24] for i, k in kept_columns(cache).items()}, 24):
        want = turns(model, DynamicCache(config=model.config), calls)
    for a, b, c in zip(got[1:], want[1:], stock[1:]):
        error, effect = (a - b).float().norm(), (b - c).float().norm()
        assert a.dtype == torch.bfloat16 and error < 0.1 * effect


# masses ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attend", [attend_sdpa, attend_explicit])
def test_a_merged_slot_is_attention_over_the_copies_it_stands_for(attend):
    """Equal keys, unlike values; folded twice, so masses add up; a dropped slot takes no part."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    keys = draw(2, 2, 5, 8)[:, :, torch.tensor([0, 1, 1, 1, 2, 3, 3, 4])]
    copies = Slots(keys, draw(2, 2, 8, 8), torch.arange(8).expand(2, 2, -1), torch.ones(2, 2, 8, dtype=torch.bool))
    query, sight = draw(2, 4, 3, 8), Sight(None, 7)
    without = copies.take(torch.arange(7).expand(2, 2, -1), torch.ones(2, 2, 7, dtype=torch.bool))
    want = attend(query, without, sight, 0.3)[0]
    index = torch.tensor([0, 2, 3, 4, 5]).expand(2, 2, -1)
    yes = torch.ones(2, 2, 5, dtype=torch.bool)
    once = fold_into(copies, index, yes, torch.tensor([0, 1, 1, 2, 3, 4, 4, -1]).expand(2, 2, -1))
    assert torch.allclose(once.mass, torch.tensor([1.0, 2, 1, 1, 2]))
    torch.testing.assert_close(attend(query, once, sight, 0.3)[0], want, **NEAR)
    index, target = torch.tensor([0, 1, 3, 4]), torch.tensor([0, 1, 1, 2, 3])
    again = fold_into(once, index.expand(2, 2, -1), yes[..., :4], target.expand(2, 2, -1))
    assert torch.allclose(again.mass, torch.tensor([1.0, 3, 1, 2]))
    torch.testing.assert_close(attend(query, again, sight, 0.3)[0], want, **NEAR)
    plain = attend(query, replace(again, bias=None), sight, 0.3)[0]
    assert not torch.allclose(plain, want, atol=1e-3)       # the mass is what makes it equal


class FoldCopies(Given):
    """Folds the tokens that the test says into the slot that stays before them."""

    def fold(self, x, kept):
        index, valid = kept.index()
        return fold_into(x.slots, index, valid, kept.mask.long().cumsum(-1) - 1)


def test_a_model_cannot_tell_a_merged_slot_from_tokens_at_one_position():
    """In one layer equal tokens at equal positions have equal keys: the folded cache answers as the full one does."""
    model = tiny_model(depth=1)
    ids, more = words(1, 12), words(1, 4, 1)
    ids[:, 5:8] = ids[:, 4:5]
    positions = torch.tensor([[0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 8]])
    calls = [dict(input_ids=ids, position_ids=positions), dict(input_ids=more, position_ids=torch.arange(9, 13)[None])]
    want = turns(model, DynamicCache(config=model.config), calls)[1]
    stays = torch.ones(2, 12, dtype=torch.bool).index_fill(1, torch.tensor([5, 6, 7]), False)
    with attach(model, FoldCopies([stays])) as attached:
        cache = attached.cache()
        got = turns(model, cache, calls)[1]
    assert cache.lengths == [13] and float(cache.layers[0].slots.mass[0, 0, 4]) == pytest.approx(4)
    torch.testing.assert_close(got, want, **NEAR)


# budgets --------------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.one_of(st.integers(1, 50), st.floats(0.01, 1.0)), st.integers(0, 5), st.integers(0, 9),
       st.integers(0, 39))
def test_the_budget_is_exact_and_sinks_and_recent_tokens_stay(n, keep, sinks, recent, padding):
    padding = min(padding, n - 1)
    valid = torch.ones(2, 3, n, dtype=torch.bool)
    valid[1, :, :padding] = False
    plan = Random(keep, sinks=sinks, recent=recent)
    count = budget(valid[:, 0].sum(1), keep)
    assert count.tolist() == [keep_count(n, keep), keep_count(n - padding, keep)]
    forced = plan.forced(valid, count[:, None, None])
    mask = admit(torch.randn(2, 3, n), valid, forced, count[:, None, None])
    for row, real in enumerate((n, n - padding)):
        must = set(range(n - real, min(n, n - real + sinks))) | set(range(max(n - real, n - recent), n))
        for head in range(3):
            assert must <= set(mask[row, head].nonzero()[:, 0].tolist())
            assert int(mask[row, head].sum()) == max(len(must), int(count[row]))
    assert not (mask & ~valid).any()


def test_a_recent_share_and_sinks_beyond_the_budget_all_stay():
    model = tiny_model()
    with attach(model, H2O(0.125, sinks=3, recent=0.34)) as attached:              # 3 of 24 tokens, and a recent one
        cache = attached.cache()
        model(words(2, 24), past_key_values=cache)
    for layer in cache.slot_layers:
        assert all(set(row.tolist()) == {0, 1, 2, 23} for row in layer.slots.column.flatten(0, 1))


def test_a_budget_for_each_layer_and_a_count():
    model = tiny_model()
    with attach(model, KNorm((1.0, 0.5, 7))) as attached:
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=words(1, 21))])
    assert cache.lengths == [21, 10, 7] and [layer.whole for layer in cache.slot_layers] == [True, False, False]


def test_bytes_are_those_of_the_tensors_held():
    model = tiny_model()
    with attach(model, SnapKV(0.25, recent=4)) as attached:
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=words(2, 64))])
    kv, noted = 2 * 2 * 16 * 8 * 2 * 4, 2 * 2 * 16 * (4 + 1)
    assert cache.nbytes == 3 * (kv + noted) + 2 * 64 * 8
    assert cache.stock_nbytes == 3 * 4 * kv
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for layer in cache.layers
                for t in (layer.slots.keys, layer.slots.values)}
    assert sum(storages.values()) == 3 * kv                 # no view keeps the full prompt alive


# the other things that a cache is asked for ---------------------------------------------------------------------------
def test_crop_takes_generated_tokens_back():
    model = tiny_model()
    ids, more, other = words(2, 20), words(2, 5, 1), words(2, 3, 2)
    with attach(model, Given(some(3, 2, 20))) as attached:
        cache, straight = attached.cache(), attached.cache()
        turns(model, cache, [dict(input_ids=ids), dict(input_ids=more)])
        cache.crop(-3)
        assert cache.get_seq_length() == cache.timeline.length == 22
        got = turns(model, cache, [dict(input_ids=other)])[0]
        want = turns(model, straight, [dict(input_ids=ids), dict(input_ids=more[:, :2]), dict(input_ids=other)])[2]
        torch.testing.assert_close(got, want, **NEAR)
        assert cache.timeline.positions.tolist() == straight.timeline.positions.tolist()
        with pytest.raises(ValueError, match="take back 5 at most"):
            cache.crop(-6)


def test_crop_after_merging_and_before_anything_was_dropped():
    model = tiny_model()
    ids, more = words(2, 20), words(2, 5, 1)
    with attach(model, RazorAttention(0.4, sinks=2, recent=3)) as attached:
        cache = attached.cache()
        want = turns(model, cache, [dict(input_ids=ids), dict(input_ids=more)])[1]
        cache.crop(-5)
        torch.testing.assert_close(turns(model, cache, [dict(input_ids=more)])[0], want, **NEAR)
    with attach(model, KNorm(6, every=4)) as attached:
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=ids[:, :6])])
        cache.crop(-3)
        turns(model, cache, [dict(input_ids=more[:, i:i + 1]) for i in range(4)])
    assert cache.lengths == [6] * 3 and cache.get_seq_length() == 7


def test_padding_in_a_second_turn_does_not_count():
    """Rows of turns of unlike length, compressed again: each as alone."""
    model = tiny_model()
    (ids, mask), (more, new) = prompt((24, 15)), prompt((4, 9), seed=1)
    both, last = torch.cat([mask, new], 1), words(2, 1, 2)
    places = (both.cumsum(1) - 1).clamp_min(0)
    ones = torch.cat([both, both.new_ones(2, 1)], 1)
    calls = [dict(input_ids=ids, attention_mask=mask, position_ids=places[:, :24]),
             dict(input_ids=more, attention_mask=both, position_ids=places[:, 24:]),
             dict(input_ids=last, attention_mask=ones, position_ids=places[:, -1:] + 1)]
    with attach(model, KNorm(0.5, again=True, sinks=2, recent=2)) as attached:
        cache = attached.cache()
        batch = turns(model, cache, calls)[2]
        for row in range(2):
            alone = attached.cache()
            first, second = ids[row][mask[row].bool()][None], more[row][new[row].bool()][None]
            single = turns(model, alone, [dict(input_ids=x) for x in (first, second, last[row:row + 1])])[2]
            torch.testing.assert_close(batch[row], single[0], **NEAR)
            assert kept_columns(alone)[1].sum() == kept_columns(cache)[1][row].sum()


def test_a_cache_is_freed_with_its_last_reference():
    """No cycle holds its memory until the garbage collector runs."""
    model = tiny_model()
    gc.disable()
    try:
        with attach(model, KNorm(0.5)) as attached:
            cache = attached.cache()
            turns(model, cache, [dict(input_ids=words(1, 12)), dict(input_ids=words(1, 1))])
        keys = weakref.ref(cache.layers[0].slots.keys)
        del cache
        assert keys() is None
    finally:
        gc.enable()


def test_a_copied_cache_goes_its_own_way():
    model = tiny_model()
    ids, more, other = prompt((20, 12))[0], words(2, 4, 1), words(2, 4, 2)
    with attach(model, SnapKV(0.4, recent=3)) as attached:
        cache, straight = attached.cache(), attached.cache()
        turns(model, cache, [dict(input_ids=ids)])
        twin = copy.deepcopy(cache)
        turns(model, cache, [dict(input_ids=more)])
        got = turns(model, twin, [dict(input_ids=other)])[0]
        want = turns(model, straight, [dict(input_ids=ids), dict(input_ids=other)])[1]
    assert torch.equal(got, want) and twin.timeline.length == 24
    assert all(layer.timeline is twin.timeline for layer in twin.layers)


@pytest.mark.parametrize("whole", [True, False])
def test_rows_are_repeated_chosen_and_reordered(whole):
    model = tiny_model()
    ids, mask = prompt((20, 12, 17))
    more, order = words(4, 1, 1), torch.tensor([2, 0, 0, 1])
    ones = torch.cat([mask, mask.new_ones(3, 1)], 1)
    with attach(model, H2O(1.0) if whole else H2O(0.4)) as attached:
        caches = [attached.cache() for _ in range(4)]
        for cache in caches:
            turns(model, cache, [dict(input_ids=ids, attention_mask=mask)])
        caches[0].batch_repeat_interleave(2)
        caches[0].reorder_cache(order * 2)
        caches[1].batch_select_indices(order)
        got = [turns(model, cache, [dict(input_ids=more, attention_mask=ones[order])])[0] for cache in caches[:2]]
        for row, prompt_row in enumerate(order.tolist()):
            tokens = more[row].expand(3, 1)
            rewound = caches[2 + row % 2]
            want = turns(model, rewound, [dict(input_ids=tokens, attention_mask=ones)])[0][prompt_row]
            rewound.crop(-1)
            for logits in got:
                torch.testing.assert_close(logits[row], want, **NEAR)
    assert len(caches[0].timeline.positions) == len(caches[1].timeline.positions) == 4


def test_a_reset_cache_is_a_new_one():
    model = tiny_model()
    with attach(model, H2O(0.4)) as attached:
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=words(2, 20))])
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.nbytes == 0
        got, want = (turns(model, c, [dict(input_ids=words(1, 9)), dict(input_ids=words(1, 1, 1))])[1]
                     for c in (cache, attached.cache()))
    assert torch.equal(got, want) and cache.lengths == [4, 4, 4]


def test_decoding_within_a_fixed_window():
    """StreamingLLM holds its budget at every step: each token sees the sinks and the last ones only."""
    model = tiny_model(depth=1)                             # with more layers, dropped tokens live on in what later ones saw
    ids, more = words(1, 12), words(1, 6, 1)
    with attach(model, StreamingLLM(8, sinks=2, every=1)) as attached:
        cache = attached.cache()
        got = turns(model, cache, [dict(input_ids=ids), *(dict(input_ids=more[:, i:i + 1]) for i in range(6))])[1:]
    assert cache.lengths == [8] and cache.get_seq_length() == 18
    stock = DynamicCache(config=model.config)
    model(ids, past_key_values=stock)
    for step, logits in enumerate(got):
        column = torch.arange(13 + step)
        sees = (column < 2) | (column >= 12 + step - 6)     # what was kept after the step before, and itself
        bias = torch.zeros(1, 1, 1, 13 + step).masked_fill(~sees, torch.finfo(torch.float32).min)
        want = model(more[:, step:step + 1], past_key_values=stock, attention_mask=bias).logits
        torch.testing.assert_close(logits, want, **NEAR)


def test_a_prompt_in_chunks_keeps_what_a_whole_one_keeps():
    """By recency exactly; by a count of the smallest keys too, in layer 0, whose keys do not depend on what was dropped."""
    model, ids = tiny_model(), words(1, 40)
    for plan, exact in ((StreamingLLM(0.25, sinks=3, again=True), 3), (KNorm(10, again=True), 1)):
        with attach(model, plan) as attached:
            cache, whole = attached.cache(), attached.cache()
            turns(model, cache, [dict(input_ids=part) for part in ids.split(10, 1)])
            turns(model, whole, [dict(input_ids=ids)])
        assert cache.lengths == whole.lengths == [10] * 3
        for layer in range(exact):
            assert torch.equal(kept_columns(cache)[layer], kept_columns(whole)[layer])


def test_a_cache_without_its_attention_says_so():
    model = tiny_model()
    with pytest.raises(UnsupportedModelError, match="attach"):
        model(words(1, 8), past_key_values=CompressedCache(model.config, H2O(0.5)))
    with attach(model, H2O(0.5)) as attached:
        cache, fresh = attached.cache(), attached.cache()
        turns(model, cache, [dict(input_ids=words(1, 8))])
        fresh.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)       # and attention of another kind reads it
        with pytest.raises(UnsupportedModelError, match="does not look"):
            fresh.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
    with pytest.raises(UnsupportedModelError, match="stay attached"):
        model(words(1, 1), past_key_values=cache)


@pytest.mark.parametrize("make, says", [
    (lambda: H2O(0.0), "keep=0.0"), (lambda: KNorm((0.5, 2.0)), r"keep\[1\]=2.0"), (lambda: H2O(sinks=-1), "sinks=-1"),
    (lambda: H2O(recent=1.0), "recent=1.0"), (lambda: SnapKV(recent=0), "recent=0"), (lambda: SnapKV(kernel=4), "kernel=4"),
    (lambda: SnapKV(every=4), "every=4"), (lambda: StreamingLLM(every=0), "every=0"),
    (lambda: KNorm({"picture": 0.5}), "known: text, image, video, audio"), (lambda: KNorm({"image": 7.5}), "keep"),
])
def test_plans_say_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_mask_of_what_is_left_is_refused():
    model = tiny_model()
    with attach(model, KNorm(0.5)) as attached:
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=words(1, 10))])
        with pytest.raises(ValueError, match="12 columns"):
            model(words(1, 2), past_key_values=cache, attention_mask=torch.ones(1, 1, 2, 7, dtype=torch.bool))
        with pytest.raises(ValueError, match="3 layers"):
            KNorm((0.5, 0.5)).at(0, 3)
