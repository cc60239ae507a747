"""Plans that merge: against loops over tokens, closed forms, budgets and rows alone."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache_dense import NEAR, kept_columns, prompt, tiny_model, turns, words

from mmcompress.budget import keep_count
from mmcompress.cache import EMS, CacheView, KVMerger, Slots, attach
from mmcompress.cache.attention import attend_explicit, attend_sdpa
from mmcompress.cache.ems import nearest
from mmcompress.cache.scores import column_sums
from mmcompress.cache.view import Sight


def view_of(n=30, pad=0, seed=0, spread=0.6, batch=2, scale=1.0):
    """A layer after a prompt whose neighbours have similar keys; row 0 starts with padding."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    real = torch.ones(batch, n, dtype=torch.bool)
    real[0, :pad] = False
    steps = draw(batch, 2, n, 8) * torch.where(draw(batch, 2, n, 1) > 0.5, 2.0, spread)
    keys = steps[:, :, :1] + sum(0.8 ** i * steps.roll(i, 2) for i in range(8))
    slots = Slots(keys * scale, draw(batch, 2, n, 8), torch.arange(n).expand(batch, 2, -1), real[:, None].expand(-1, 2, -1))
    mask = torch.ones(n, n, dtype=torch.bool).tril() & real[:, None, None]
    return CacheView(slots, draw(batch, 2, 3, n, 8), Sight(mask, 0), real, torch.arange(n).expand(batch, -1), 0.35, 0, 1)


def attended(x):
    """Accumulated attention by its definition. (B, H_kv, N)"""
    maps = torch.einsum("bhgqd,bhnd->bhgqn", x.queries, x.keys) * x.scaling
    maps = maps.masked_fill(~x.sight.mask[:, :, None], -torch.inf).softmax(-1).nan_to_num(0)
    return (maps * x.real[:, None, None, :, None]).mean(2).sum(2)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def rows_of(slots, b, h):
    """The valid slots of one head, each a tuple: column, key, value, mass."""
    there = slots.valid[b, h]
    return list(zip(*(x[b, h][there] for x in (slots.column, slots.keys, slots.values, slots.mass))))


# KVMerger -------------------------------------------------------------------------------------------------------------
def sets_by_scan(keys, free, tokens, eps):
    """The paper's scan: from the last token backwards, a set goes on while the next neighbour is similar."""
    sets, at = [], len(tokens) - 1
    while at >= 0:
        members = [tokens[at]]
        while at > 0 and {tokens[at], tokens[at - 1]} <= free and cosine(keys[tokens[at]], keys[tokens[at - 1]]) >= eps:
            at -= 1
            members.append(tokens[at])
        sets.append(sorted(members))
        at -= 1
    return sets


def kvmerger(plan, x, b, h, count):
    """One head of KVMerger, token by token. -> [(column, key, value, size)] by column"""
    paid, keys, values = attended(x)[b, h], x.keys[b, h], x.values[b, h]
    tokens = x.real[b].nonzero().flatten().tolist()
    recent = plan.recent if isinstance(plan.recent, int) else math.floor(count * plan.recent + 1e-9)
    heavy = plan.heavy if isinstance(plan.heavy, int) else math.floor(count * plan.heavy + 1e-9)
    apart = set(tokens[:plan.sinks]) | set(tokens[len(tokens) - recent:])
    rest = sorted(set(tokens) - apart, key=lambda i: -float(paid[i]))
    apart |= set(rest[:max(0, min(heavy, count - len(apart)))])
    free = set(tokens) - apart
    near = sorted(cosine(keys[i], keys[j]) for i, j in pairwise(tokens))
    for eps in [plan.eps, *(c for c in near if c > plan.eps), 2.0]:     # the least threshold that leaves enough sets
        sets = sets_by_scan(keys, free, tokens, eps)
        if len(sets) >= count:
            break
    mine = [s for s in sets if not set(s) & apart]
    mine.sort(key=lambda s: -float(paid[s].sum()))
    out = [(i, keys[i], values[i], 1) for i in apart]
    for s in mine[:max(0, count - len(apart))]:
        p = max(s, key=lambda i: float(paid[i]))
        distance = [float((keys[p] - keys[i]).norm()) for i in s]
        sigma = plan.sigma
        if isinstance(sigma, str) and len(s) > 1:
            sigma = sum(distance) / (len(s) - 1)
            if plan.sigma == "paper":
                sigma = sum(math.exp(-d * d / (2 * sigma ** 2)) for d in distance) / (math.sqrt(2) * len(s))
        g = [1.0 if i == p else math.exp(-d * d / (2 * sigma ** 2)) for i, d in zip(s, distance)]
        mean = lambda of: sum(w * of[i] for w, i in zip(g, s)) / sum(g)  # noqa: E731, B023
        out.append((p, mean(keys), mean(values), len(s)))
    return sorted(out, key=lambda slot: slot[0])


MERGERS = {"default": KVMerger(0.5), "distance": KVMerger(0.5, sigma="distance"), "a number": KVMerger(14, sigma=1.5),
           "mass": KVMerger(0.5, sigma="distance", mass=True), "loose": KVMerger(0.3, eps=-1.0, recent=2, heavy=1),
           "strict": KVMerger(0.3, eps=0.97, sigma="distance"), "sinks": KVMerger(0.5, sinks=4, recent=5, heavy=0.2, mass=True),
           "no room": KVMerger(0.3, recent=12, heavy=3)}


@pytest.mark.parametrize("pad", [0, 7])
@pytest.mark.parametrize("name", MERGERS)
def test_kvmerger_is_the_papers_scan_and_kernel(name, pad):
    plan, x = MERGERS[name], view_of(pad=pad, scale=0.3)
    new = plan(x)
    merged = 0
    for b in range(2):
        count = keep_count(int(x.real[b].sum()), plan.keep)
        for h in range(2):
            want, got = kvmerger(plan, x, b, h, count), rows_of(new, b, h)
            assert len(got) == max(count, plan.recent if isinstance(plan.recent, int) else 0)
            for (column, key, value, mass), (p, k, v, size) in zip(got, want):
                assert column == p and mass == pytest.approx(size if plan.mass else 1)
                torch.testing.assert_close(key, k, **NEAR)
                torch.testing.assert_close(value, v, **NEAR)
                merged += size > 1
    assert (merged > 0) == (name != "no room")
    assert (new.bias is None) != plan.mass


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.floats(0.02, 0.99), st.floats(-1, 1), st.floats(0, 0.9), st.integers(0, 4), st.integers(0, 30),
       st.integers(0, 5))
def test_the_budget_holds_whatever_the_keys(n, keep, eps, heavy, sinks, pad, seed):
    pad = min(pad, n - 1)
    plan, x = KVMerger(keep, eps=eps, heavy=heavy, sinks=sinks, mass=True), view_of(n, pad, seed)
    if plan.keeps_all(x):
        return
    new = plan(x)
    for b, real in enumerate((n - pad, n)):
        count = keep_count(real, keep)
        count = max(count, min(real, sinks + math.floor(count * plan.recent + 1e-9)))
        assert new.valid[b].sum(-1).eq(count).all()
        assert new.mass[b].sum(-1).le(real + 1e-3).all()
    assert new.keys.isfinite().all() and new.values.isfinite().all()
    assert (new.column.diff() > 0)[new.valid[..., 1:] & new.valid[..., :-1]].all()


@pytest.mark.parametrize("sigma", ["paper", "distance", 0.5])
@pytest.mark.parametrize("attend", [attend_sdpa, attend_explicit])
def test_equal_keys_merge_without_change_in_attention(attend, sigma):
    """Runs of equal keys, unlike values; then once more, where slots stand for several."""
    x = view_of(n=12)
    runs = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 4, 5, 5])
    keys = x.keys[:, :, runs]
    x = replace(x, slots=replace(x.slots, keys=keys))
    plan = KVMerger(6, recent=0, heavy=0, eps=0.999, sigma=sigma, mass=True)
    query, sight = torch.randn(2, 6, 3, 8, generator=torch.Generator().manual_seed(9)), Sight(None, 12)
    want = attend(query, x.slots, sight, 0.3)[0]
    new = plan(x)
    assert new.count == 6 and torch.allclose(new.mass[0, 0], torch.tensor([3.0, 1, 2, 3, 1, 2]))
    torch.testing.assert_close(attend(query, new, sight, 0.3)[0], want, **NEAR)
    without = attend(query, replace(plan, mass=False)(x), sight, 0.3)[0]
    assert not torch.allclose(without, want, atol=1e-3)

    twice = new.append(Slots(keys[:, :, -1:], x.values[:, :, :1], torch.full((2, 2, 1), 12), torch.ones(2, 2, 1).bool()))
    want = attend(query, twice, Sight(None, 13), 0.3)[0]
    again = plan(view_after(x, twice))
    assert torch.allclose(again.mass[0, 0], torch.tensor([3.0, 1, 2, 3, 1, 3]))
    torch.testing.assert_close(attend(query, again, Sight(None, 13), 0.3)[0], want, **NEAR)


def view_after(x, slots):
    """The same layer with one token more, which asked."""
    n = x.real.shape[1]
    return replace(x, slots=slots, queries=x.queries[:, :, :, -1:], sight=Sight(None, n),
                   real=torch.ones(2, n + 1, dtype=torch.bool), positions=torch.arange(n + 1).expand(2, -1))


def test_the_papers_sigma_leaves_the_pivot_alone_where_keys_are_large():
    """What its docstring says: the width does not grow with the keys, that of the mean distance does."""
    x = view_of(scale=30.0)
    near, far = (KVMerger(0.4, sigma=s)(x) for s in ("paper", "distance"))
    assert torch.equal(near.column, far.column)
    assert torch.equal(near.keys, x.keys.gather(2, near.column[..., None].expand_as(near.keys)))
    small, large = (KVMerger(0.4, sigma="distance").fold(y, KVMerger(0.4).evict(y, column_sums(x))) for y in (view_of(), x))
    torch.testing.assert_close(small.keys * 30, large.keys, atol=1e-3, rtol=1e-4)


def test_sets_stay_within_a_modality():
    x = view_of(pad=4)
    tags = (torch.arange(30) % 7 < 5).long().expand(2, -1)
    x = replace(x, tags=tags)
    new = KVMerger({"image": 0.4}, recent=2, heavy=0, eps=-1.0, mass=True)(x)
    for b in range(2):
        image = tags[b].bool() & x.real[b]
        for h in range(2):
            got = rows_of(new, b, h)
            of = [bool(tags[b, c]) for c, *_ in got]
            assert sum(of) == int(int(image.sum()) * 0.4) and len(of) - sum(of) == int((x.real[b] & ~tags[b].bool()).sum())
            assert all(m == pytest.approx(1) for (*_, m), i in zip(got, of) if not i)
            assert any(m > 1.5 for *_, m in got)


@pytest.mark.parametrize("options, match", [
    (dict(eps=1.5), r"eps=1\.5"), (dict(heavy=-1), "heavy=-1"), (dict(heavy=1.0), r"heavy=1\.0"), (dict(sigma=0), "sigma=0"),
    (dict(sigma="mean"), "sigma='mean'"), (dict(sigma=float("nan")), "sigma=nan"),
    (dict(keep=0), "keep=0"), (dict(recent=-1), "recent=-1")])
def test_kvmerger_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        KVMerger(**options)


# EMS ------------------------------------------------------------------------------------------------------------------
def global_local(x, window):
    """The larger of the mean attention of all queries and of the last ones, padding not among them. (B, H_kv, N)"""
    maps = torch.einsum("bhgqd,bhnd->bhgqn", x.queries, x.keys) * x.scaling
    maps = maps.masked_fill(~x.sight.mask[:, :, None], -torch.inf).softmax(-1)
    rows = [maps[b][:, :, x.real[b]] for b in range(len(maps))]
    return torch.stack([torch.maximum(m.mean((1, 2)), m[:, :, -window:].mean((1, 2))) for m in rows])


def ems(plan, x, b, h, count):
    """One head of EMS, token by token. -> [(column, key, value, size)] by column, and how many went to the zero class"""
    score, keys, values = global_local(x, plan.recent)[b, h], x.keys[b, h], x.values[b, h]
    tokens = x.real[b].nonzero().flatten().tolist()
    always = {*tokens[:plan.sinks], *tokens[-plan.recent:]}
    rest = sorted(set(tokens) - always, key=lambda i: -float(score[i]))
    centres = sorted(always | set(rest[:max(0, count - len(always))]))
    classes, zeros = {c: [c] for c in centres}, 0
    for i in tokens:
        like = max(centres, key=lambda c: cosine(keys[i], keys[c]))
        if i in classes:
            continue
        if cosine(keys[i], keys[like]) >= plan.tau:
            classes[like].append(i)
        else:
            zeros += 1
    out = []
    for c, members in classes.items():
        total = sum(score[i] for i in members)
        mean, value, norm = (sum(score[i] * of(i) for i in members) / total
                             for of in (lambda i: keys[i], lambda i: values[i], lambda i: keys[i].norm()))
        out.append((c, mean / mean.norm() * norm, value, len(members)))
    return out, zeros


CENTRES = {"default": EMS(0.5, recent=4), "mass": EMS(0.4, recent=3, sinks=2, mass=True), "loose": EMS(8, recent=4, tau=-1.0),
           "strict": EMS(0.3, recent=2, tau=0.9)}


@pytest.mark.parametrize("pad", [0, 7])
@pytest.mark.parametrize("name", CENTRES)
def test_ems_merges_into_the_nearest_centre_or_drops(name, pad):
    plan, x = CENTRES[name], view_of(pad=pad)
    torch.testing.assert_close(plan.scores(x)[x.valid], global_local(x, plan.recent)[x.valid], **NEAR)
    new, merged, dropped = plan(x), 0, 0
    for b in range(2):
        count = keep_count(int(x.real[b].sum()), plan.keep)
        for h in range(2):
            (want, zeros), got = ems(plan, x, b, h, count), rows_of(new, b, h)
            assert len(got) == count
            for (column, key, value, mass), (c, k, v, size) in zip(got, want):
                assert column == c and mass == pytest.approx(size if plan.mass else 1)
                torch.testing.assert_close(key, k, **NEAR)
                torch.testing.assert_close(value, v, **NEAR)
                if size == 1:                               # what took nothing in is what it was, to the bit
                    assert torch.equal(key, x.keys[b, h, c]) and torch.equal(value, x.values[b, h, c])
                merged += size - 1
            dropped += zeros
    assert merged > 0 and (dropped > 0) == (name != "loose")


def test_norms_of_merged_keys_are_those_of_their_members():
    """All of one norm: so is what they become, while their plain mean would be shorter."""
    x = view_of()
    x = replace(x, slots=replace(x.slots, keys=3 * torch.nn.functional.normalize(x.keys, dim=-1)))
    new = EMS(8, recent=2, tau=-1.0, mass=True)(x)
    assert (new.mass > 1.5).any() and torch.allclose(new.keys.norm(dim=-1), torch.tensor(3.0))
    assert torch.allclose(new.mass.sum(-1), torch.tensor(30.0))


def test_copies_merge_without_change_in_attention():
    """Equal keys and equal values; then once more."""
    x = view_of(n=12)
    copies = torch.tensor([0, 1, 2, 1, 0, 2, 2, 0, 1, 0, 1, 2])
    keys, values = x.keys[:, :, copies], x.values[:, :, copies]
    x = replace(x, slots=replace(x.slots, keys=keys, values=values))
    plan = EMS(3, recent=3, tau=0.99999, mass=True)
    query, sight = torch.randn(2, 6, 3, 8, generator=torch.Generator().manual_seed(9)), Sight(None, 12)
    want = attend_sdpa(query, x.slots, sight, 0.3)[0]
    new = plan(x)
    assert torch.allclose(new.mass, torch.tensor(4.0))
    torch.testing.assert_close(attend_sdpa(query, new, sight, 0.3)[0], want, **NEAR)
    assert replace(plan, mass=False)(x).bias is None
    twice = new.append(Slots(keys[:, :, :1], values[:, :, :1], torch.full((2, 2, 1), 12), torch.ones(2, 2, 1).bool()))
    want = attend_sdpa(query, twice, Sight(None, 13), 0.3)[0]
    again = plan(view_after(x, twice))
    assert again.count == 3 and torch.allclose(again.mass.sum(-1), torch.tensor(13.0))
    torch.testing.assert_close(attend_sdpa(query, again, Sight(None, 13), 0.3)[0], want, **NEAR)


@pytest.mark.parametrize("room", [1, 100, 2**24])
def test_the_nearest_centre_is_found_in_blocks_of_any_size(room):
    x = view_of(pad=5)
    index, valid = torch.tensor([3, 9, 11, 25]).expand(2, 2, -1), torch.tensor([True, True, True, False]).expand(2, 2, -1)
    like, which = nearest(x.keys, index, valid, room)
    for b, h, i in [(0, 0, 4), (1, 1, 25), (1, 0, 11)]:
        cosines = [cosine(x.keys[b, h, i], x.keys[b, h, c]) for c in (3, 9, 11)]
        assert like[b, h, i] == pytest.approx(max(cosines), abs=1e-5) and which[b, h, i] == cosines.index(max(cosines))


@pytest.mark.parametrize("options, match", [(dict(tau=2.0), r"tau=2\.0"), (dict(recent=0), "recent=0"),
                                            (dict(recent=0.5), r"recent=0\.5"), (dict(every=2), "every=2")])
def test_ems_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        EMS(**options)


# in models ------------------------------------------------------------------------------------------------------------
PLANS = {"kvmerger": KVMerger(0.4, eps=0.2, sigma="distance"), "kvmerger mass": KVMerger(0.4, eps=-1.0, mass=True),
         "ems": EMS(0.4, recent=2, tau=0.3), "ems mass": EMS(0.4, recent=2, tau=0.3, mass=True)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PLANS)
def test_a_padded_batch_equals_its_rows_alone(name, side):
    model = tiny_model()
    ids, mask = prompt((24, 15, 7), side)
    more = words(3, 5, 1)
    positions, after = (mask.cumsum(1) - 1).clamp_min(0), mask.sum(1, keepdim=True) + torch.arange(5)
    longer = torch.cat([mask, mask.new_ones(3, 5)], 1)
    calls = [dict(input_ids=ids, attention_mask=mask, position_ids=positions),
             dict(input_ids=more, attention_mask=longer, position_ids=after)]
    with attach(model, PLANS[name]) as attached:
        cache = attached.cache()
        batch = turns(model, cache, calls)
        for row in range(3):
            own, alone = mask[row].bool(), attached.cache()
            single = turns(model, alone, [dict(input_ids=ids[row][own][None]), dict(input_ids=more[row:row + 1])])
            torch.testing.assert_close(batch[1][row], single[1][0], **NEAR)
            there, here = kept_columns(alone), kept_columns(cache)
            for layer, kept in there.items():
                both = torch.cat([here[layer][row, :, :24][:, own], here[layer][row, :, 24:]], 1)
                assert torch.equal(both, kept[0])


@pytest.mark.parametrize("way", [dict(do_sample=False), dict(num_beams=3, num_return_sequences=2)])
@pytest.mark.parametrize("name", PLANS)
def test_generate_goes_on_with_merged_slots(name, way):
    """Chunked prefill merges what was merged, and the sizes are the budget's."""
    model = tiny_model("qwen2")
    ids, mask = prompt((24, 15))
    with attach(model, replace(PLANS[name], again=True)) as attached:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=5, prefill_chunk_size=9, return_dict_in_generate=True,
                             **way)
        assert out.past_key_values.lengths == [9 + 4] * 3 and out.sequences.shape[1] == 29
        cache = attached.cache()
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=1, do_sample=False)
        assert cache.lengths == [9] * 3 and cache.nbytes < 0.7 * cache.stock_nbytes
        assert all(layer.slots.valid[1].sum(-1).eq(6).all() for layer in cache.layers)


@pytest.mark.parametrize("name", PLANS)
def test_half_precision_stays_half(name):
    model = tiny_model().bfloat16()
    with attach(model, PLANS[name]) as attached:
        cache = attached.cache()
        logits = turns(model, cache, [dict(input_ids=words(2, 24)), dict(input_ids=words(2, 5, 1))])[1]
    assert cache.layers[0].slots.keys.dtype == torch.bfloat16 and logits.isfinite().all()
