"""Tiers, split heads and chains, against loops over rows and heads (`cache_loop`)."""

from dataclasses import replace

import pytest
import torch
from cache_loop import age, check, drop, grid, mikv, norm, paid, razor, talk, votes, when
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache_dense import NEAR, kept_columns, prompt, tiny_model, turns, words
from test_cache_learned import Learned
from transformers import DynamicCache

from mmcompress.cache import (
    CachePlan,
    Chain,
    InBits,
    KNorm,
    MiKV,
    RazorAttention,
    Slots,
    SnapKV,
    StreamingLLM,
    attach,
    chain,
)
from mmcompress.cache.parts import in_one, split


def tiers(cache, layer):
    """Columns in few bits of each row and head of a layer."""
    low = [part for part in cache.layers[layer].parts if isinstance(part.keys, InBits)]
    return {(b, h): sorted(c for part in low for c in part.column[b, h][part.valid[b, h]].tolist())
            for b in range(len(low[0].column)) for h in range(low[0].column.shape[1])}


# MiKV -----------------------------------------------------------------------------------------------------------------
CASES = {"paper": {}, "count": dict(high=6, bits=4), "sinks": dict(high=0.4, sinks=2, recent=3, bits=8),
         "none": dict(high=0.0), "high_bits": dict(high=0.3, bits=2, high_bits=8), "plain": dict(balance=False, bits=4),
         "more sinks": dict(high=1, sinks=3)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_mikv_equals_its_equations_in_loops(name, side):
    """Rows of unlike length; the tiers, a second turn through torch and decoding through the tiered attention."""
    cache, loop = check(MiKV(**CASES[name]), [when(mikv(**CASES[name]))], talk(side))
    if "high_bits" not in CASES[name]:
        for (layer, b, h), head in loop.heads.items():
            assert tiers(cache, layer)[b, h] == head.column[head.low].tolist()


@pytest.mark.parametrize("family, attention", [("llama", "eager"), ("qwen2", "sdpa"), ("mistral", "eager")])
def test_mikv_in_other_models(family, attention):
    check(MiKV(bits=4), [when(mikv(bits=4))], talk(), tiny_model(family, attention))


def test_mikv_codes_are_those_of_the_grid():
    model, ids = tiny_model(), words(2, 24)
    stock = DynamicCache(config=model.config)
    turns(model, stock, [dict(input_ids=ids)])
    with attach(model, MiKV(high=0.25)) as attached:
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=ids)])
    for layer in range(3):
        low = cache.layers[layer].parts[0]
        assert low.column.shape[2] == 18
        for b in range(2):
            for h in range(2):
                columns = low.column[b, h].long()
                for held, x in ((low.keys, stock.layers[layer].keys), (low.values, stock.layers[layer].values)):
                    scaled = x[b, h, columns] * (1 if held.balance is None else held.balance[b, h])
                    packed = held.codes.codes[b, h].long()
                    codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)
                    assert torch.equal(codes, grid(scaled, 2, 4)[1])
        assert low.values.balance is None and low.keys.balance.shape == (2, 2, 1, 8)


@pytest.mark.parametrize("bits, high", [(2, 0.25), (4, 0.5), (8, 0.0)])
def test_mikv_holds_the_bytes_of_the_closed_form(bits, high):
    model, rows, heads, n, d = tiny_model(), 2, 2, 24, 8
    with attach(model, MiKV(high=high, bits=bits)) as attached:
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=words(rows, n))])
    top = int(n * high)
    low = n - top
    exact = max(top, 1)                                     # an empty tier has one missing slot, for tokens that follow
    a_head = 2 * low * (d * bits // 8 + 2 * (2 + 2)) + 4 * d + 2 * exact * d * 4 + (low + exact) * (4 + 1)
    assert cache.nbytes == 3 * rows * heads * a_head + rows * n * 8
    assert cache.stock_nbytes == 3 * rows * heads * n * 2 * d * 4 and cache.lengths == [low + exact] * 3
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for layer in cache.layers for x in layer.tensors()}
    assert sum(storages.values()) == 3 * rows * heads * a_head          # nothing exact is kept alive


def test_more_bits_are_nearer():
    model, calls = tiny_model(), talk()
    stock, apart = turns(model, DynamicCache(config=model.config), calls), {}
    for bits in (2, 4, 8):
        with attach(model, MiKV(bits=bits)) as attached:
            got = turns(model, attached.cache(), calls)
        apart[bits] = float(torch.stack([(a - b).norm() for a, b in zip(got[2:], stock[2:])]).norm())
    assert 0 < apart[8] < apart[4] / 4 and apart[4] < apart[2] / 2


def test_a_high_tier_of_all_is_stock_to_the_bit():
    model, calls = tiny_model(), talk()
    want = turns(model, DynamicCache(config=model.config), calls)
    options = dict(attention_mask=calls[0]["attention_mask"], max_new_tokens=6, do_sample=False)
    text = model.generate(calls[0]["input_ids"], **options)
    for plan in (MiKV(high=1.0), MiKV(high=24), MiKV(high=1.0, again=True, every=2)):
        with attach(model, plan) as attached:
            cache = attached.cache()
            assert all(torch.equal(a, b) for a, b in zip(turns(model, cache, calls[:2]), want))
            assert torch.equal(model.generate(calls[0]["input_ids"], **options), text)
        assert all(layer.whole for layer in cache.slot_layers)


class Restored(CachePlan):
    """MiKV by the loops' grid, its low tier written back as tensors; what a cache of those does is proved elsewhere."""

    def scores(self, x):
        return x.slots.column

    def reduce(self, x):
        keys, values = x.keys.clone(), x.values.clone()
        for b, h in [(b, h) for b in range(len(keys)) for h in range(keys.shape[1])]:
            own = self.low[x.layer][b // (len(keys) // self.rows), h]
            low = torch.tensor([c in own for c in x.slots.column[b, h].tolist()])
            asked, there = x.queries[b, h][:, x.real[b]].float(), x.valid[b, h]
            balance = (asked.abs().amax((0, 1)) / keys[b, h][there].float().abs().amax(0)).sqrt()
            keys[b, h, low] = (grid(keys[b, h, low].float() * balance, 2, 4)[0] / balance).to(keys.dtype)
            values[b, h, low] = grid(values[b, h, low].float(), 2, 4)[0].to(values.dtype)
        return replace(x.slots, keys=keys, values=values)


def both(model, ids, mask):
    """MiKV, and `Restored` with its choice."""
    with attach(model, MiKV()) as attached:
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=ids, attention_mask=mask)])
    other = Restored()
    vars(other).update(low={i: tiers(cache, i) for i in range(3)}, rows=len(ids))
    return MiKV(), other


@pytest.mark.parametrize("way", [dict(num_beams=3), dict(num_beams=4, num_return_sequences=2),
                                 dict(do_sample=True, top_k=0, num_return_sequences=3)])
def test_tiers_follow_beams_and_samples(way):
    model, (ids, mask) = tiny_model("qwen2"), prompt((24, 15))
    made = []
    for plan in both(model, ids, mask):
        with attach(model, plan):
            torch.manual_seed(3)
            made.append(model.generate(ids, attention_mask=mask, max_new_tokens=7, output_scores=True,
                                       return_dict_in_generate=True, **way))
    assert torch.equal(made[0].sequences, made[1].sequences)
    for a, b in zip(made[0].scores, made[1].scores):
        torch.testing.assert_close(a, b, **NEAR)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tiers_in_half_precision(attention):
    model, calls = tiny_model(attention=attention).bfloat16(), talk(lengths=(24, 15))
    made = [turns(model, DynamicCache(config=model.config), calls)]
    for plan in both(model, calls[0]["input_ids"], calls[0]["attention_mask"]):
        with attach(model, plan) as attached:
            made.append(turns(model, attached.cache(), calls))
    for stock, got, want in zip(*(m[1:] for m in made)):
        assert got.dtype == torch.bfloat16 and (got - want).float().norm() < 0.1 * (want - stock).float().norm()


@pytest.mark.parametrize("options", [dict(again=True), dict(every=2), dict(again=True, every=3)])
def test_tiers_are_chosen_anew_and_what_was_rounded_stays_as_coarse(options):
    """As the loops do; and to the code: float32 keeps rounded entries on their grid."""
    calls, how = talk(sizes=(4, 1, 1, 1, 1)), dict(high=0.3, bits=2)
    model, held = tiny_model(), []
    with attach(model, MiKV(**how, **options)) as attached:
        cache = attached.cache()
        for call in calls:
            turns(model, cache, [call])
            held.append([layer.parts[0] for layer in cache.layers])
    moved = 0
    for old, new in zip(held[0], held[-1]):
        for b in range(3):
            for h in range(2):
                was, now = ({int(c): i for i, c in enumerate(p.column[b, h]) if p.valid[b, h, i]} for p in (old, new))
                moved += len(set(now) - set(was))
                for column in set(was) & set(now):
                    for a, z in ((old.keys, new.keys), (old.values, new.values)):
                        for name in ("codes", "scale", "zero"):
                            x, y = getattr(a.codes, name), getattr(z.codes, name)
                            assert torch.equal(x[b, h, was[column]], y[b, h, now[column]])
    assert moved
    check(MiKV(**how, **options), [when(mikv(**how), **options)], calls, near=dict(atol=5e-3, rtol=2e-3))     # a float16 grid


@pytest.mark.parametrize("make, says", [
    (lambda: MiKV(bits=3), "bits=3"), (lambda: MiKV(bits=8, high_bits=4), "no fewer"),
    (lambda: MiKV(high_bits=32), "high_bits=32"), (lambda: MiKV(high=1.5), r"high=1\.5"),
    (lambda: MiKV(high=-1), "high=-1"), (lambda: MiKV(high=True), "high=True")])
def test_mikv_says_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# chains ---------------------------------------------------------------------------------------------------------------
NEARBY = dict(keep=0.4, sinks=2, recent=3)
CHAINS = {
    "mikv that drops": ((MiKV(0.5, high=0.4),), (drop(paid, 0.5, 0, 0.5), mikv(0.4))),
    "snapkv, mikv": ((SnapKV(0.5, recent=4), MiKV(high=0.4)), (drop(votes(4), 0.5, 0, 4), mikv(0.4))),
    "three": ((StreamingLLM(0.8, sinks=1), KNorm(0.6), MiKV(high=0.4)), (drop(age, 0.8, 1), drop(norm, 0.6), mikv(0.4))),
    "knorm, streaming": ((KNorm(0.6), StreamingLLM(0.3, sinks=1)), (drop(norm, 0.6), drop(age, 0.3, 1))),
    "streaming, knorm": ((StreamingLLM(0.6, sinks=1), KNorm(0.3)), (drop(age, 0.6, 1), drop(norm, 0.3))),
    "razor, mikv": ((RazorAttention(**NEARBY, retrieval=((0, 1), (2, 0))), MiKV(high=0.3, bits=4)),
                    (razor(0.4, 2, 3, ((0, 1), (2, 0))), mikv(0.3, 4)))}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_plans_of_a_chain_follow_one_another(name, again):
    """Evidence is of all that asked, whatever was dropped in between."""
    plans, rules = CHAINS[name]
    one = Chain(tuple(replace(plan, again=again) for plan in plans))
    together = when(lambda head, at: [rule(head, at) for rule in rules], again=again)
    cache, _ = check(one, [together], talk())
    if name == "snapkv, mikv" and not again:
        with attach(tiny_model(), plans[0]) as attached:
            alone = attached.cache()
            turns(attached.model, alone, talk())
        here, there = kept_columns(cache), kept_columns(alone)
        assert all(torch.equal(here[i], there[i]) for i in range(3))


def test_order_matters():
    a, b = (check(Chain(CHAINS[name][0]), [when(lambda head, at, name=name: [r(head, at) for r in CHAINS[name][1]])], talk())[0]
            for name in ("knorm, streaming", "streaming, knorm"))
    assert any(not torch.equal(kept_columns(a)[i], kept_columns(b)[i]) for i in range(3))


def test_a_chain_of_one_and_chains_that_cannot_be():
    plan = KNorm(0.5)
    assert chain(plan) is plan and chain([plan]) is plan and chain(chain([plan, MiKV()])).plans == (plan, MiKV())
    for make, says in ((lambda: chain([]), "one or more plans"), (lambda: chain([plan, "mikv"]), "one or more plans"),
                       (lambda: chain([KNorm(again=True), MiKV()]), "again= differs"),
                       (lambda: chain([KNorm(every=2), MiKV(every=3)]), "every= differs"),
                       (lambda: chain([MiKV(), SnapKV()]), "MiKV says how slots are held, so it comes last")):
        with pytest.raises(ValueError, match=says):
            make()


# RazorAttention -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("again", [False, True])
def test_split_heads_equal_the_papers_formula_in_loops(again, attention):
    """One layer with a retrieval head, one of nothing else, one with none; turns and decoding."""
    whole = ((0, 1), (2, 0), (2, 1))
    for sizes in ((4, 1, 1), (9, 6, 1)):
        check(RazorAttention(**NEARBY, retrieval=whole, again=again), [when(razor(0.4, 2, 3, whole), again=again)],
              talk(sizes=sizes), tiny_model(attention=attention))


def test_what_split_heads_drop_is_freed():
    """Bytes by heads: a retrieval head has all slots, another its budget and the compensation."""
    model, rows, n, wide = tiny_model(), 2, 40, 2 * 8 * 4 + 4 + 1 + 4      # key, value, column, validity, log-mass
    with attach(model, RazorAttention(0.25, sinks=2, recent=3, retrieval=((1, 0),))) as attached:
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=words(rows, n))])
        assert [layer.nbytes for layer in cache.layers] == [rows * 2 * 11 * wide, rows * (n + 11) * wide, rows * 2 * 11 * wide]
        turns(model, cache, [dict(input_ids=words(rows, 3))])
    assert cache.layers[1].nbytes == rows * (n + 11 + 2 * 3) * wide and cache.lengths == [14, 43, 14]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in cache.layers[1].tensors()}
    assert sum(storages.values()) == cache.layers[1].nbytes


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 12), st.integers(0, 10**6), st.booleans())
def test_slots_split_and_joined_are_the_same(rows, heads, n, seed, noted):
    """By heads into groups, and along the slots into tiers in any order; those that are missing stay missing."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=g)  # noqa: E731
    column = draw(rows, heads, 3 * n).argsort(-1)[..., :n].sort(-1).values.int()
    flat = lambda: draw(rows, heads, n) if noted else None  # noqa: E731
    slots = Slots(draw(rows, heads, n, 4), draw(rows, heads, n, 2), column, draw(rows, heads, n) < 0.6, flat(), flat())
    label = (draw(heads) * 3).long().tolist()
    groups = [tuple(h for h in range(heads) if label[h] == k) for k in set(label)]
    parts = split(slots, tuple((own, max(1, int(slots.valid[:, list(own)].sum(-1).max()))) for own in groups))
    assert [part.heads for part in parts] == groups
    assert all(part.count == max(1, int(slots.valid[:, list(own)].sum(-1).max())) for part, own in zip(parts, groups))
    low = draw(rows, heads, n) < 0.5
    order = draw(rows, heads, n).argsort(-1).sort(-1).values
    by_tier = tuple(slots.take(order, tier) for tier in (low, ~low))
    for joined in (in_one(parts, torch.float32), in_one(by_tier, torch.float32)):
        for b in range(rows):
            for h in range(heads):
                old, new = slots.valid[b, h], joined.valid[b, h]
                for name in ("column", "keys", "values", *(("bias", "evidence") if noted else ())):
                    assert torch.equal(getattr(joined, name)[b, h, new], getattr(slots, name)[b, h, old])


# the other things that a cache is asked for ---------------------------------------------------------------------------
TIERED = {"mikv": MiKV(high=0.3), "mikv, all in bits": MiKV(high=0.3, high_bits=8), "none exact": MiKV(high=0.0),
          "razor": RazorAttention(**NEARBY, retrieval=((0, 1), (2, 0))), "learned": Learned(0.5),
          "chain": Chain(CHAINS["razor, mikv"][0])}


@pytest.mark.parametrize("name", TIERED)
def test_tiers_give_back_what_came_after_them(name):
    model, other = tiny_model(), words(3, 3, 9)
    first, second, *_ = talk(sizes=(5,))
    mask, places = second["attention_mask"], second["position_ids"]
    kept = lambda n: dict(input_ids=second["input_ids"][:, :n], attention_mask=mask[:, :24 + n], position_ids=places[:, :n])  # noqa: E731
    then = lambda n: dict(input_ids=other, attention_mask=torch.cat([mask[:, :24 + n], mask.new_ones(3, 3)], 1),  # noqa: E731
                          position_ids=places[:, :1] + torch.arange(n, n + 3))
    with attach(model, TIERED[name]) as attached:
        cache, straight = attached.cache(), attached.cache()
        turns(model, cache, [first, second])
        cache.crop(-3)
        want = turns(model, straight, [first, kept(2), then(2)])[2]
        torch.testing.assert_close(turns(model, cache, [then(2)])[0], want, **NEAR)
        cache.crop(-5)
        assert cache.get_seq_length() == cache.timeline.length == 24
        straight.reset()
        assert straight.nbytes == 0 and straight.get_seq_length() == 0
        want = turns(model, straight, [first, then(0)])[1]
        torch.testing.assert_close(turns(model, cache, [then(0)])[0], want, **NEAR)
        with pytest.raises(ValueError, match="take back 3 at most"):
            cache.crop(-4)


@pytest.mark.parametrize("name", TIERED)
def test_rows_of_tiers_are_repeated_chosen_and_reordered(name):
    model, order = tiny_model(), torch.tensor([2, 0, 0, 1])
    first, one = talk(sizes=(1,))
    with attach(model, TIERED[name]) as attached:
        caches = [attached.cache() for _ in range(3)]
        for cache in caches:
            turns(model, cache, [first])
        caches[0].batch_repeat_interleave(2)
        caches[0].reorder_cache(order * 2)
        caches[1].batch_select_indices(order)
        want = turns(model, caches[2], [one])[0][order]
        for cache in caches[:2]:
            got = turns(model, cache, [{key: x[order] for key, x in one.items()}])[0]
            torch.testing.assert_close(got, want, **NEAR)
            assert {len(x) for layer in cache.layers for x in layer.tensors()} == {4}
