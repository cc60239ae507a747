"""MiniCache in the cache: pairs of layers, what each holds exactly, what they hold together, bytes counted once."""

import math

import pytest
import torch
from test_cache_dense import NEAR, kept_columns, prompt, tiny_model, turns, words
from transformers import DynamicCache

from mmcompress import UnsupportedModelError
from mmcompress.cache import KNorm, MiniCache, SnapKV, StreamingLLM, attach, chain

DEPTH = 4


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def stock_cache(model, ids, mask):
    cache = DynamicCache(config=model.config)
    turns(model, cache, [dict(input_ids=ids, attention_mask=mask)])
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def by_hand(low, high, real, t, gamma):
    """One head's vectors of two layers after sharing: (N, d) each, and which tokens stay exact."""
    tokens = [i for i in range(len(real)) if real[i]]
    unit = lambda x: x.double() / x.double().norm()  # noqa: E731
    angle = {i: math.acos(max(-1.0, min(1.0, float(unit(low[0][i]) @ unit(high[0][i]))))) for i in tokens}
    exact = sorted(tokens, key=lambda i: -angle[i])[:math.ceil(gamma * len(tokens) - 1e-9)]
    out = [[x.clone() for x in low], [x.clone() for x in high]]
    for part in (0, 1):                                     # keys, values
        for i in set(tokens) - set(exact):
            a, b = low[part][i].double(), high[part][i].double()
            u, v = a / a.norm(), b / b.norm()
            omega = math.acos(max(-1.0, min(1.0, float(u @ v))))
            e = (math.sin((1 - t) * omega) * u + math.sin(t * omega) * v) / math.sin(omega)
            out[0][part][i], out[1][part][i] = (a.norm() * e).float(), (b.norm() * e).float()
    return out, exact


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("plan", [MiniCache(), MiniCache(start=1, t=0.3, gamma=0.2)])
def test_two_layers_hold_one_direction_and_the_furthest_tokens_exactly(plan, side):
    model = tiny_model(depth=DEPTH)
    ids, mask = prompt((20, 13), side)
    stock = stock_cache(model, ids, mask)
    with attach(model, plan) as attached:
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=ids, attention_mask=mask)])
    first = 2 if plan.start == 0.5 else plan.start
    pairs = [(i, i + 1) for i in range(first, DEPTH - 1, 2)]
    assert [layer.whole for layer in cache.layers] == [all(i not in pair for pair in pairs) for i in range(DEPTH)]
    for below, above in pairs:
        for b in range(2):
            for h in range(2):
                low, high = ([x[b, h] for x in stock[i]] for i in (below, above))
                want, exact = by_hand(low, high, mask[b].bool(), plan.t, plan.gamma)
                for layer, both in ((below, want[0]), (above, want[1])):
                    slots = cache.layers[layer].slots
                    at = slots.column[b, h][slots.valid[b, h]].long()
                    assert at.tolist() == mask[b].nonzero().flatten().tolist()
                    torch.testing.assert_close(slots.keys[b, h][slots.valid[b, h]], both[0][at], atol=2e-5, rtol=1e-5)
                    torch.testing.assert_close(slots.values[b, h][slots.valid[b, h]], both[1][at], atol=2e-5, rtol=1e-5)
                    held = cache.layers[layer].parts[1]
                    assert sorted(held.column[b, h][held.valid[b, h]].tolist()) == sorted(exact)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("bits", [None, 8])
def test_decoding_and_a_second_turn_read_what_was_restored(attention, bits):
    """Against the stock model, whose cache is given the restored keys and values."""
    model = tiny_model(attention=attention, depth=DEPTH)
    (ids, mask), more = prompt((20, 13)), words(2, 5, 1)
    ones = lambda n: torch.cat([mask, mask.new_ones(2, n)], 1)  # noqa: E731
    calls = [dict(input_ids=more, attention_mask=ones(5)), dict(input_ids=more[:, :1], attention_mask=ones(6))]
    with attach(model, MiniCache(start=0, bits=bits)) as attached:
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=ids, attention_mask=mask)])
        restored = []
        for layer in cache.layers:
            s = layer.slots
            keys, values = torch.zeros(2, 2, 20, 8), torch.zeros(2, 2, 20, 8)
            at = s.column.long().masked_fill(~s.valid, 0)[..., None].expand_as(s.keys)
            restored.append((keys.scatter_add(2, at, s.keys * s.valid[..., None]),
                             values.scatter_add(2, at, s.values * s.valid[..., None])))
        got = turns(model, cache, calls)
    stock = DynamicCache(config=model.config)
    for i, (keys, values) in enumerate(restored):
        stock.update(keys, values, i)
    for a, b in zip(got, turns(model, stock, calls)):
        torch.testing.assert_close(a, b, **NEAR)


def test_what_two_layers_share_is_counted_once_and_stays_shared_through_beams():
    model = tiny_model(depth=DEPTH)
    n, d, heads, rows = 40, 8, 2, 1
    ids = words(rows, n)
    with attach(model, MiniCache(start=0)) as attached:
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=ids)])
        tally = attached.tally
    exact, head = 2, rows * heads                           # ceil(0.05 * 40)
    directions = 2 * head * (n - exact) * d * 4
    own = 2 * head * (n - exact) * 4 + 2 * head * exact * d * 4 + head * n * (4 + 1)
    assert cache.nbytes == 2 * (directions + 2 * own) + rows * n * 8
    assert [tally.layers[i].nbytes for i in range(DEPTH)] == [directions + own, own] * 2
    cache.batch_repeat_interleave(3)
    assert cache.nbytes == 3 * (2 * (directions + 2 * own) + rows * n * 8)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert cache.nbytes == 3 * (2 * (directions + 2 * own) + rows * n * 8)


def test_everything_retained_is_stock():
    model = tiny_model(depth=DEPTH)
    ids, more = words(2, 20), words(2, 4, 1)
    want = turns(model, DynamicCache(config=model.config), [dict(input_ids=ids), dict(input_ids=more)])
    with attach(model, MiniCache(start=0, gamma=1.0)) as attached:
        got = turns(model, attached.cache(), [dict(input_ids=ids), dict(input_ids=more)])
        made = model.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False)
    torch.testing.assert_close(got[1], want[1], **NEAR)
    assert torch.equal(made, model.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False))


def test_a_prompt_in_chunks_shares_again():
    model = tiny_model(depth=DEPTH)
    ids = words(1, 24)
    with attach(model, MiniCache(start=0, gamma=0.25, again=True)) as attached:
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=part) for part in ids.split(8, 1)])
        assert [[part.count for part in layer.parts] for layer in cache.layers] == [[18, 6]] * DEPTH
        assert all(layer.slots.valid.all() for layer in cache.layers) and cache.get_seq_length() == 24


def test_behind_a_plan_that_keeps_the_same_tokens_in_every_layer():
    model = tiny_model(depth=DEPTH)
    ids, mask = prompt((24, 16))
    with attach(model, chain([StreamingLLM(0.5, sinks=2), MiniCache(start=0)])) as attached:
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=ids, attention_mask=mask)])
    for kept in kept_columns(cache).values():
        for row, (start, count) in enumerate(((0, 12), (8, 8))):
            want = torch.zeros(24, dtype=torch.bool)
            want[start:start + 2] = want[24 - count + 2:] = True
            assert torch.equal(kept[row], want.expand(2, -1))
    assert all(sum(part.count for part in layer.parts) == 12 for layer in cache.layers)


@pytest.mark.parametrize("make, match", [
    (lambda: MiniCache(keep=0.5), r"keep=0\.5: MiniCache drops nothing"), (lambda: MiniCache(keep=1), "keep=1:"),
    (lambda: MiniCache(t=1.5), r"t=1\.5"), (lambda: MiniCache(gamma=-0.1), r"gamma=-0\.1"),
    (lambda: MiniCache(bits=3), "bits=3"),
    (lambda: MiniCache(start=1.5), r"start=1\.5"), (lambda: chain([SnapKV(0.5), MiniCache()]), "SnapKV keeps other tokens"),
    (lambda: chain([MiniCache(), KNorm(0.5)]), "MiniCache says how slots are held")])
def test_minicache_refuses(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_pair_with_a_sliding_layer_is_refused():
    model = tiny_model("gemma3")                            # sliding, full, full
    with attach(model, MiniCache(start=0)) as attached, pytest.raises(UnsupportedModelError, match="slides a window"):
        attached.cache()
