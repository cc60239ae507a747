"""Prompts in chunks, compressing while decoding, and what budgets count, against loops (`cache_loop`) and closed forms."""

import pytest
import torch
from cache_loop import age, check, chosen, count, drop, norm, paid, run, same_slots, talk, unlike, votes, when
from test_cache_dense import NEAR, kept_columns, prompt, tiny_model, turns, words

from mmcompress import SignalError
from mmcompress.cache import EMS, H2O, Chain, KeyDiff, KNorm, KVMerger, MiKV, RazorAttention, SnapKV, StreamingLLM, attach


def both(window):
    """EMS: what one query pays on average, of all so far or of the last ones."""
    def score(head, at):
        last = at.maps[:, -window:].mean((0, 1)) if at.maps.shape[1] else torch.zeros(len(head.column))
        return torch.maximum(head.paid / max(1, at.so_far), last)
    return score


def heavy(keep, recent=0.34, share=0.24):
    """KVMerger where no keys are alike: recent tokens and heavy hitters, then sets of one by what they were paid."""
    return drop(paid, keep, 0, recent)


PLANS = {"h2o": (H2O, {}, lambda keep: drop(paid, keep, 0, 0.5)),
         "h2o, sinks": (H2O, dict(sinks=2, recent=3), lambda keep: drop(paid, keep, 2, 3)),
         "ems": (EMS, dict(recent=3, tau=1.0), lambda keep: drop(both(3), keep, 0, 3)),
         "kvmerger": (KVMerger, dict(eps=1.0), heavy),
         "snapkv": (SnapKV, dict(recent=3, kernel=1), lambda keep: drop(votes(3, 1), keep, 0, 3)),
         "snapkv, pooled": (SnapKV, dict(recent=3), lambda keep: drop(votes(3), keep, 0, 3)),
         "knorm": (KNorm, {}, lambda keep: drop(norm, keep)),
         "keydiff": (KeyDiff, dict(recent=2), lambda keep: drop(unlike, keep, 0, 2)),
         "streaming_llm": (StreamingLLM, dict(sinks=2), lambda keep: drop(age, keep, 2))}


def chunks(ids, mask, size):
    """A prompt in chunks, as `generate(prefill_chunk_size=)` feeds it."""
    places = (mask.cumsum(1) - 1).clamp_min(0)
    return [dict(input_ids=ids[:, i:i + size], attention_mask=mask[:, :i + size], position_ids=places[:, i:i + size])
            for i in range(0, ids.shape[1], size)]


# chunks ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PLANS)
def test_chunk_by_chunk_a_count_is_what_the_loops_keep(name):
    """Accumulate over what is left, evict, go on; the last turn is decoding."""
    plan, options, rule = PLANS[name]
    ids, mask = prompt((29, 29))
    calls = [*chunks(ids, mask, 8), dict(input_ids=words(2, 1, 1), attention_mask=torch.ones(2, 30).long(),
                                         position_ids=torch.full((2, 1), 29))]
    check(plan(10, again=True, **options), [when(rule(10), again=True)], calls)


@pytest.mark.parametrize("size, lengths", [(7, (24, 15)), (7, (24, 8)), (9, (28, 20))])
@pytest.mark.parametrize("name", PLANS)
def test_generate_counts_the_announced_prompt(name, size, lengths):
    """Shares are of the whole prompt from the first chunk on, row by row; chunks that are all padding, and of one token."""
    plan, options, rule = PLANS[name]
    model, (ids, mask) = tiny_model(), prompt(lengths)
    with attach(model, plan(0.4, again=True, **options)):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, prefill_chunk_size=size,
                             output_logits=True, return_dict_in_generate=True)
    calls, new, forced = chunks(ids, mask, size), out.sequences[:, len(ids[0]):], {"h2o, sinks": 5}
    for i in range(3):
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        calls.append(dict(input_ids=new[:, i:i + 1], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1))
    want, loop = run(model, [when(rule(0.4), again=True)], calls, totals=lengths, prompt=max(lengths))
    for a, b in zip(out.logits, want[-4:]):
        torch.testing.assert_close(a, b[:, -1], **NEAR)
    same_slots(out.past_key_values, loop, NEAR)
    assert {len(head.column) - 3 for head in loop.heads.values()} == {max(count(n, 0.4), forced.get(name, 0)) for n in lengths}


@pytest.mark.parametrize("name", ["h2o", "ems", "knorm", "streaming_llm"])
def test_padding_that_is_announced_does_not_count(name):
    """On the right, where it comes after a row's tokens; the last chunk of the shorter row is padding alone."""
    plan, options, rule = PLANS[name]
    model, (ids, mask) = tiny_model(), prompt((24, 15), "right")
    calls = chunks(ids, mask, 7)
    with attach(model, plan(0.4, again=True, **options)) as attached:
        cache = attached.cache()
        cache.announce(mask)
        turns(model, cache, calls)
    same_slots(cache, run(model, [when(rule(0.4), again=True)], calls, totals=(24, 15))[1], NEAR)


ALONE = {name: plan(0.4, again=True, **options) for name, (plan, options, _) in PLANS.items()} | {
    "ems, merging": EMS(0.4, recent=3, tau=0.2, again=True),
    "kvmerger, merging": KVMerger(0.4, eps=-1.0, mass=True, again=True),
    "razor": RazorAttention(0.4, sinks=1, recent=2, retrieval=((1, 0),), again=True), "mikv": MiKV(0.5, bits=8, again=True)}


@pytest.mark.parametrize("name", ALONE)
def test_a_padded_row_in_chunks_is_as_alone(name):
    """Its first chunk is all padding, and a part of its second: what is left of its chunks is fed to the row alone."""
    model, (ids, mask) = tiny_model(), prompt((24, 15), seed=2)
    calls = chunks(ids, mask, 7)
    with attach(model, ALONE[name]) as attached:
        caches = [attached.cache() for _ in range(2)]
        caches[0].announce(mask)
        caches[1].announce(mask[1:, 9:])
        batch = turns(model, caches[0], calls)
        parts = [dict(input_ids=part) for part in ids[1:, 9:].split([5, 7, 3], 1)]
        alone = turns(model, caches[1], parts)
    for a, b in zip(batch[1:], alone):
        torch.testing.assert_close(a[1, -b.shape[1]:], b[0], **NEAR)
    for here, there in zip(caches[0].layers, caches[1].layers):
        for h in range(2):
            a, b = here.slots, there.slots
            assert (a.column[1, h][a.valid[1, h]] - 9).tolist() == b.column[0, h][b.valid[0, h]].tolist()
            torch.testing.assert_close(a.keys[1, h][a.valid[1, h]], b.keys[0, h][b.valid[0, h]], **NEAR)


@pytest.mark.parametrize("side", ["left", "right"])
def test_evidence_of_chunks_is_the_column_sums_of_the_whole_prompt(side):
    """Nothing is dropped before the last chunk; the maps are the stock eager model's."""
    model, (ids, mask) = tiny_model(attention="eager"), prompt((24, 15), side)
    calls, places = chunks(ids, mask, 7), (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        maps = model(ids, attention_mask=mask, position_ids=places, output_attentions=True).attentions
    with attach(model, H2O(24, again=True)) as attached:
        cache = attached.cache()
        turns(model, cache, calls)
    real = mask.bool()
    for layer, each in zip(cache.layers, maps):
        sums = (each * mask[:, None, :, None]).sum(2).unflatten(1, (2, 2)).mean(2)                  # (B, H_kv, N)
        for b in range(2):
            torch.testing.assert_close(layer.slots.evidence[b][:, real[b]], sums[b][:, real[b]], **NEAR)


class Watched(H2O):
    """Notes how many slots a layer held when it was asked."""

    def scores(self, x):
        vars(self).setdefault("most", []).append(x.slots.count)
        return super().scores(x)


def test_no_layer_ever_holds_more_than_its_budget_and_a_chunk():
    model, plan, rows, heads, depth = tiny_model(), Watched(10, again=True), 2, 2, 3
    with attach(model, plan) as attached:
        cache = attached.cache()
        turns(model, cache, chunks(*prompt((64, 64)), 8))
    assert max(vars(plan)["most"]) == 18 and cache.lengths == [10] * depth and cache.get_seq_length() == 64
    slot = 2 * 8 * 4 + 4 + 1 + 4                            # key, value, column, validity, evidence
    assert cache.tally.peak == rows * heads * slot * (18 + 10 * (depth - 1))
    assert cache.tally.held == {i: rows * heads * slot * 10 for i in range(depth)}


def test_a_chunk_of_padding_and_chunks_of_one_token():
    model, (ids, mask) = tiny_model(), prompt((12, 3))
    for size in (1, 4):
        with attach(model, KNorm(0.5, again=True)):
            out = model.generate(ids, attention_mask=mask, max_new_tokens=3, prefill_chunk_size=size, do_sample=False,
                                 return_dict_in_generate=True)
        kept = kept_columns(out.past_key_values)
        assert all((k.sum(-1) - 2).tolist() == [[6, 6], [1, 1]] for k in kept.values())


# while decoding -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("name", ["h2o", "h2o, sinks", "knorm", "streaming_llm", "kvmerger", "keydiff"])
def test_compressing_while_decoding_equals_the_loops(name, every):
    """Evidence goes on adding; every so many tokens the least go, and take their scores with them."""
    plan, options, rule = PLANS[name]
    sizes = (1,) * 9
    check(plan(9, every=every, **options), [when(rule(9), every=every)], talk(lengths=(20, 12), sizes=sizes))
    check(plan(0.4, every=every, **options), [when(rule(0.4), every=every)], talk(lengths=(20, 12, 2), sizes=(*sizes[:5], 3)))


@pytest.mark.parametrize("every", [1, 4])
def test_compressing_while_decoding_under_beams(every):
    """Evidence follows its beam: a token's log-probability along a beam is that of the loops, fed with the beam's tokens."""
    model, (ids, mask) = tiny_model("qwen2"), prompt((20, 12))
    with attach(model, H2O(9, every=every)):
        out = model.generate(ids, attention_mask=mask, num_beams=3, num_return_sequences=3, max_new_tokens=8,
                             return_dict_in_generate=True, output_scores=True)
    assert out.past_key_values.lengths == [9 + 7 % every] * 3 and out.beam_indices.diff(dim=1).any()
    paths = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    ids, mask, new = ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0), out.sequences[:, 20:]
    calls = chunks(ids, mask, 20)
    for i in range(7):
        mask = torch.cat([mask, mask.new_ones(6, 1)], 1)
        calls.append(dict(input_ids=new[:, i:i + 1], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1))
    want, _ = run(model, [when(drop(paid, 9, 0, 0.5), every=every)], calls)
    for i, logits in enumerate(want):
        torch.testing.assert_close(paths[:, i], logits[:, -1].log_softmax(-1).gather(1, new[:, i:i + 1])[:, 0], **NEAR)


# budgets --------------------------------------------------------------------------------------------------------------
def test_budgets_count_what_reducers_dropped():
    """A share is of what the stock prompt would have been; a second turn adds its own."""
    model, (ids, mask) = tiny_model(), prompt((24, 15))
    more = torch.cat([mask, mask.new_ones(2, 6)], 1)
    with attach(model, KNorm(0.25, again=True)) as attached:
        cache = attached.cache()
        cache.miss(torch.tensor([[0, 20, 0, 0], [1, 2, 3, 4]]))
        turns(model, cache, [dict(input_ids=ids, attention_mask=mask)])
        assert all(k.sum(-1).tolist() == [[11, 11], [6, 6]] for k in kept_columns(cache).values())
        cache.miss(torch.tensor([[0, 0, 6, 0], [9, 0, 0, 0]]))
        turns(model, cache, [dict(input_ids=words(2, 6, 1), attention_mask=more)])
    assert cache.timeline.missing.tolist() == [[0, 20, 6, 0], [10, 2, 3, 4]]
    assert all(k.sum(-1).tolist() == [[14, 14], [10, 10]] for k in kept_columns(cache).values())     # of 56 and of 40


@pytest.mark.parametrize("keep, want", [(0.25, [11, 6]), (7, [7, 7]), (0.7, [24, 15]), (0.9, None), (1.0, None), (40, None)])
def test_shares_count_missing_tokens_and_counts_do_not(keep, want):
    """Told to `generate`, with and without beams. None: the layer stays whole, since no row can lose anything."""
    model, (ids, mask) = tiny_model(), prompt((24, 15))
    with attach(model, H2O(keep)) as attached:
        attached.missing = torch.tensor([[0, 20, 0, 0], [1, 2, 3, 4]])
        for beams in (1, 2):
            cache = model.generate(ids, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True,
                                   num_beams=beams).past_key_values
            assert all(layer.whole == (want is None) for layer in cache.slot_layers)
            for kept in kept_columns(cache).values() if want else ():
                assert kept[..., :24].sum(-1).tolist() == [[n, n] for n in want for _ in range(beams)]


def test_missing_tokens_of_a_conversation_with_beams():
    """The cache has a row for each beam when the second turn's are told by prompt."""
    model, ids = tiny_model(), words(2, 12)
    with attach(model, KNorm(0.5, again=True)) as attached:
        cache = attached.cache()
        cache.miss(torch.tensor([[0, 4, 0, 0], [0, 8, 0, 0]]))
        cache.batch_repeat_interleave(3)
        turns(model, cache, [dict(input_ids=ids.repeat_interleave(3, 0))])
        cache.reorder_cache(torch.tensor([1, 0, 2, 4, 3, 5]))
        cache.miss(torch.tensor([[2, 0, 0, 0], [4, 0, 0, 0]]))
        turns(model, cache, [dict(input_ids=words(6, 4, 1))])
    assert cache.timeline.missing.tolist() == [[2, 4, 0, 0]] * 3 + [[4, 8, 0, 0]] * 3
    assert kept_columns(cache)[0].sum(-1).tolist() == [[11, 11]] * 3 + [[14, 14]] * 3                # of 22 and of 28


@pytest.mark.parametrize("counts", [torch.ones(2, 3).long(), torch.ones(4).long(), torch.ones(2, 4), -torch.ones(2, 4).long()])
def test_missing_tokens_that_cannot_be(counts):
    with attach(tiny_model(), H2O(0.5)) as attached, pytest.raises(ValueError, match="in the order text, image, video, audio"):
        attached.cache().miss(counts)


TAGS = torch.tensor([0, 1, 1, 1, 1, 1, 1, 0, 0, 3, 3, 3, 3, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0])


def by_tag(score, keep, extra=(0, 0, 0, 0), last=0):
    """A budget for each modality: of tokens of this kind in the whole prompt and those missing."""
    def rule(head, at):
        tags = TAGS[head.column]
        stay = []
        for tag, name in enumerate(("text", "image", "video", "audio")):
            own = (tags == tag).nonzero()[:, 0].tolist()
            total = int((TAGS[24 - at.total:] == tag).sum()) + extra[tag]
            k = min(len(own), count(total, keep.get(name, 1.0)) if total else 0)
            late = [i for i in own if i >= len(head.column) - last]
            rest = sorted((i for i in own if i not in late), key=lambda i: (-float(score(head, at)[i]), i))
            stay += late + rest[:max(0, k - len(late))]
        head.stay(sorted(stay))
    return rule


@pytest.mark.parametrize("size", [7, 24])
@pytest.mark.parametrize("keep, extra", [({"image": 0.25}, (0, 0, 0, 0)), ({"image": 3, "audio": 0.5}, (0, 0, 0, 0)),
                                         ({"image": 0.25, "text": 0.5}, (2, 12, 0, 5))])
def test_budgets_by_modality_in_chunks_and_with_missing_tokens(keep, extra, size):
    model, (ids, mask) = tiny_model(), prompt((24, 18))
    calls = chunks(ids, mask, size)
    with attach(model, H2O(keep, again=True, recent=2)) as attached:
        cache = attached.cache()
        cache.miss(torch.tensor([extra]).expand(2, -1))
        cache.announce(mask)
        cache.tag(TAGS.expand(2, -1))
        turns(model, cache, calls)
    _, loop = run(model, [when(by_tag(paid, keep, extra, 2), again=True)], calls, totals=(24, 18))
    same_slots(cache, loop, NEAR)


@pytest.mark.parametrize("name", ["h2o, sinks", "knorm", "keydiff", "streaming_llm", "snapkv, pooled", "ems"])
def test_text_comes_before_everything_else(name):
    """LOOK-M's order, whatever the sign of the scores: forced tokens, then text by score, then the others by score."""
    plan, options, _ = PLANS[name]
    score, first, last = {"h2o, sinks": (paid, 2, 3), "knorm": (norm, 0, 0), "keydiff": (unlike, 0, 2), "ems": (both(3), 0, 3),
                          "streaming_llm": (age, 2, 0), "snapkv, pooled": (votes(3), 0, 3)}[name]

    def rule(head, at):
        scores, text = score(head, at), (TAGS[head.column] == 0).tolist()
        order = sorted(range(len(scores)), key=lambda i: (not text[i], -float(scores[i]), i))
        rank = [-order.index(i) for i in range(len(scores))]
        head.stay(chosen(rank, at.keep, first, last))

    model, (ids, mask) = tiny_model(), prompt((24, 15))
    for keep in (9, 13):
        def of(head, at, keep=keep):
            at.keep = keep
            rule(head, at)
        with attach(model, plan(keep, text_prior=True, **options)) as attached:
            cache = attached.cache()
            with pytest.raises(SignalError, match=r"cache\.tag"):
                turns(model, attached.cache(), [dict(input_ids=ids)])
            cache.tag(TAGS.expand(2, -1))
            calls = chunks(ids, mask, 24)
            turns(model, cache, calls)
        same_slots(cache, run(model, [when(of)], calls)[1], NEAR)


# the tally ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("plan, slots, slot", [
    (KNorm(0.5), [12] * 3, 64 + 5), (KNorm((1.0, 0.25, 7)), [24, 6, 7], 64 + 5),
    (Chain((SnapKV(0.5, recent=3), KNorm(0.25))), [6] * 3, 64 + 5)])
def test_the_tally_is_what_layers_hold(plan, slots, slot):
    """Bytes when a layer was compressed; the peak is one layer in full beside those that were compressed before it."""
    model, rows, heads = tiny_model(), 2, 2
    with attach(model, plan) as attached:
        assert attached.tally is None
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=words(rows, 24))])
        tally = attached.tally
        turns(model, cache, [dict(input_ids=words(rows, 1))])
    held = [rows * heads * n * (64 if n == 24 else slot) for n in slots]
    assert [tally.layers[i].nbytes for i in range(3)] == held == [tally.held[i] for i in range(3)]
    assert [(t.seen, t.slots, t.stock_nbytes, t.dtype) for _, t in sorted(tally.layers.items())] == \
        [(24, n, rows * heads * 24 * 64, torch.float32) for n in slots]
    assert tally.peak == max(sum(held[:i]) + rows * heads * 24 * 64 for i in range(3))
    assert set(tally.stopwatch.milliseconds()) >= {"score", "select", "gather", "store"} and tally is cache.tally
