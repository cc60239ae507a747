"""Each method's choice against an independent reading of its formula, and scorers with parameters."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from test_cache_dense import NEAR, dense, kept_columns, tiny_model, turns, words
from torch import nn
from transformers import DynamicCache

from mmcompress import SignalError
from mmcompress.cache import (
    H2O,
    CachePlan,
    CacheView,
    KeyDiff,
    KNorm,
    Random,
    RazorAttention,
    Recent,
    Slots,
    SnapKV,
    StreamingLLM,
    attach,
    find_retrieval_heads,
)
from mmcompress.cache.attention import attend_explicit, attend_sdpa
from mmcompress.cache.retrieval_heads import _Probe as Probe
from mmcompress.cache.scores import column_sums, window_attention
from mmcompress.cache.view import Sight

N = 26


@pytest.fixture(scope="module")
def seen():
    """What the stock eager model attends to and caches: maps (B, H, N, N), keys and values (B, H_kv, N, d), by layer."""
    model = tiny_model(attention="eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        out = model(words(2, N), past_key_values=cache, output_attentions=True)
    return model, out.attentions, [(layer.keys, layer.values) for layer in cache.layers]


def kept_by(model, plan):
    with attach(model, plan) as attached:
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=words(2, N))])
    return kept_columns(cache), cache


def best(scores, k, always):
    """Sets of the k best columns a head, the `always` ones among them. scores (B, H_kv, N) -> bool"""
    out = torch.zeros(scores.shape, dtype=torch.bool)
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            rest = sorted((c for c in range(N) if c not in always), key=lambda c: -float(scores[b, h, c]))
            out[b, h, sorted(always) + rest[:k - len(always)]] = True
    return out


def snapkv(attention, keys, window=4, kernel=5):
    votes = attention[:, :, -window:, :-window].mean(2).unflatten(1, (2, 2)).mean(2)                # (B, H_kv, N - w)
    padded = F.pad(votes, (kernel // 2, kernel // 2)).unfold(-1, kernel, 1).mean(-1)
    return F.pad(padded, (0, window), value=torch.inf)


def keydiff(attention, keys):
    unit = keys / keys.norm(dim=-1, keepdim=True)
    mean = unit.mean(2)
    return -torch.einsum("bhnd,bhd->bhn", unit, mean / mean.norm(dim=-1, keepdim=True))


FORMULAS = {
    "snapkv": (SnapKV(0.5, recent=4), snapkv, 13, set(range(N - 4, N))),
    "h2o": (H2O(10), lambda a, k: a.sum(2).unflatten(1, (2, 2)).sum(2), 10, set(range(N - 5, N))),
    "h2o with sinks": (H2O(12, sinks=4), lambda a, k: a.sum(2).unflatten(1, (2, 2)).sum(2), 12, {0, 1, 2, 3, *range(N - 6, N)}),
    "knorm": (KNorm(0.3), lambda a, k: -(k * k).sum(-1), 7, set()),
    "keydiff": (KeyDiff(0.4, sinks=1, recent=2), keydiff, 10, {0, N - 2, N - 1}),
    "streaming_llm": (StreamingLLM(0.5, sinks=3), lambda a, k: torch.arange(N).expand(2, 2, -1), 13, {0, 1, 2}),
    "recent": (Recent(9), lambda a, k: torch.arange(N).expand(2, 2, -1), 9, set()),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_choice_is_that_of_the_formula(name, seen):
    model, attentions, cached = seen
    plan, scores, k, always = FORMULAS[name]
    kept, cache = kept_by(model, plan)
    assert cache.lengths == [k] * 3
    for layer in range(3):
        keys, values = cached[layer]
        want = best(scores(attentions[layer], keys), k, always)
        assert torch.equal(kept[layer], want)
        slots = cache.layers[layer].slots
        for b in range(2):
            for h in range(2):
                assert torch.equal(slots.keys[b, h], keys[b, h][want[b, h]])
                assert torch.equal(slots.values[b, h], values[b, h][want[b, h]])


def view_of(seed=0, batch=2, n=23, queries=9, pad=0, bias=False):
    """A layer's view with random tensors: `queries` new tokens after others."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    real = torch.ones(batch, n, dtype=torch.bool)
    real[0, :pad] = False
    slots = Slots(draw(batch, 2, n, 8), draw(batch, 2, n, 8), torch.arange(n).expand(batch, 2, -1),
                  real[:, None].expand(-1, 2, -1), draw(batch, 2, n).abs() if bias else None)
    causal = torch.ones(n, n, dtype=torch.bool).tril()[n - queries:]
    mask = causal & real[:, None, None]
    positions = torch.arange(n).expand(batch, -1)
    return CacheView(slots, draw(batch, 2, 3, queries, 8), Sight(mask, n - queries), real, positions, 0.35, 0, 1)


@pytest.mark.parametrize("pad, bias", [(0, False), (20, False), (5, True)])
def test_scores_are_sums_over_attention_maps(pad, bias):
    """With padding among the queries, and with masses; in tiles of any size."""
    x = view_of(pad=pad, bias=bias)
    logits = torch.einsum("bhgqd,bhnd->bhgqn", x.queries, x.keys) * x.scaling
    logits = logits + (0 if x.slots.bias is None else x.slots.bias[:, :, None, None])
    maps = logits.masked_fill(~x.sight.mask[:, :, None], -torch.inf).softmax(-1).nan_to_num(0)
    maps = maps * x.real[:, None, None, -9:, None]
    for room in (1, 500, 2**24):
        torch.testing.assert_close(column_sums(x, room), maps.sum((2, 3)) / 3, **NEAR)
    want = torch.stack([maps[b][:, :, x.real[b, -9:]][:, :, -4:].mean((1, 2)) for b in range(2)])    # 4 queries, or 3
    torch.testing.assert_close(window_attention(x, 4), want, **NEAR)


def test_random_depends_on_the_seed_the_layer_and_the_head(seen):
    model = seen[0]
    kept, again, other = (kept_by(model, Random(0.5, seed=s))[0] for s in (0, 0, 1))
    for layer in range(3):
        assert torch.equal(kept[layer], again[layer]) and not torch.equal(kept[layer], other[layer])
        assert torch.equal(kept[layer][0], kept[layer][1]) and not torch.equal(kept[layer][0, 0], kept[layer][0, 1])
    assert not torch.equal(kept[0], kept[1])
    counts = torch.stack([kept_by(model, Random(0.5, seed=s))[0][0][0].float() for s in range(60)]).mean(0)
    assert (counts - 0.5).abs().max() < 0.3                 # no position is favoured


# RazorAttention -------------------------------------------------------------------------------------------------------
def razor(query, key, value, near, scale):
    """The paper's formula for one head: N_d e^(q k^) beside the kept ones. query (q, d), key and value (N, d)"""
    far = ~near
    count, k_hat, v_hat = far.sum(), key[far].mean(0), value[far].mean(0)
    kept = (query @ key[near].T * scale).exp()
    extra = count * (query @ k_hat * scale).exp()[:, None]
    return (kept @ value[near] + extra * v_hat) / (kept.sum(-1, keepdim=True) + extra)


def test_razor_attention_is_the_papers_formula(seen):
    """One token decoded against the cache, head by head; retrieval heads see everything."""
    model, _, cached = seen
    plan = RazorAttention(0.3, sinks=2, recent=3, retrieval=((1, 0),))
    _, cache = kept_by(model, plan)
    assert cache.lengths == [8, N, 8]
    near = torch.arange(N) < 2
    near |= torch.arange(N) >= N - 5
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 1, 8, generator=g)
    for layer in range(3):
        keys, values = cached[layer]
        slots = cache.layers[layer].slots
        outs = [attend(query, slots, Sight(None, N), 0.35)[0] for attend in (attend_explicit, attend_sdpa)]
        for b in range(2):
            for h in range(4):
                whole = (layer, h // 2) == (1, 0)
                want = (query[b, h] @ keys[b, h // 2].T * 0.35).softmax(-1) @ values[b, h // 2] if whole else \
                    razor(query[b, h], keys[b, h // 2], values[b, h // 2], near, 0.35)
                for out in outs:
                    torch.testing.assert_close(out[b, :, h], want, **NEAR)
        assert slots.mass.sum(-1).allclose(torch.tensor(float(N)))


def test_razor_attention_keeps_short_prompts_whole_and_can_go_without_compensation(seen):
    model = seen[0]
    kept, cache = kept_by(model, RazorAttention())
    assert all(k.all() for k in kept.values()) and not any((layer.slots.mass != 1).any() for layer in cache.layers)
    kept, cache = kept_by(model, RazorAttention(0.3, sinks=2, recent=3, compensation=False))
    assert cache.lengths == [7] * 3 and all(layer.slots.bias is None for layer in cache.layers)
    with dense(model, kept, N):
        want = turns(model, DynamicCache(config=model.config), [dict(input_ids=words(2, N)), dict(input_ids=words(2, 3, 1))])[1]
    with attach(model, RazorAttention(0.3, sinks=2, recent=3, compensation=False)) as attached:
        got = turns(model, attached.cache(), [dict(input_ids=words(2, N)), dict(input_ids=words(2, 3, 1))])[1]
    torch.testing.assert_close(got, want, **NEAR)


def test_the_probe_finds_heads_that_copy():
    """Against the maps of the stock eager model, counted one query at a time."""
    period, repeats = 10, 4
    model = tiny_model(attention="eager")
    ids = torch.randint(100, (1, period), generator=torch.Generator().manual_seed(3)).repeat(1, repeats)
    with torch.no_grad():
        maps = torch.stack(model(ids, output_attentions=True).attentions)[:, 0]                     # (layers, H, N, N)
    echo, induction = torch.zeros(3, 4), torch.zeros(3, 4)
    for q in range(period, period * repeats):
        for m in range(1, q // period + 1):
            echo += maps[:, :, q, q - m * period] / (period * repeats - period)
            induction += maps[:, :, q, q - m * period + 1] / (period * repeats - period)
    echo, induction = (x.unflatten(1, (2, 2)).amax(2).flatten() for x in (echo, induction))
    probe = Probe(period=period)
    with torch.no_grad(), attach(model, probe) as attached:
        model(ids, past_key_values=attached.cache())
    torch.testing.assert_close(torch.cat([probe.found[i] for i in range(3)], 1), torch.stack([echo, induction]))
    pairs = [(layer, head) for layer in range(3) for head in range(2)]
    options = dict(period=period, repeats=repeats, seed=3)
    for k in (1, 2, 5):
        found = find_retrieval_heads(model, induction=k / 6, echo=0.0, **options)
        assert found == tuple(sorted(pairs[i] for i in induction.topk(k).indices.tolist()))
        found = find_retrieval_heads(model, induction=0.0, echo=k / 6, **options)
        assert found == tuple(sorted(pairs[i] for i in echo.topk(k).indices.tolist()))
    both = find_retrieval_heads(model, **options)
    assert set(both) == {pairs[int(induction.argmax())], pairs[int(echo.argmax())]}
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"induction=1\.4"):
        find_retrieval_heads(model, induction=1.4)
    with pytest.raises(ValueError, match="repeats=1"):
        find_retrieval_heads(model, repeats=1)


# scorers with parameters ----------------------------------------------------------------------------------------------
class Scorer(nn.Module):
    """A trivial retaining head: key, value and the hidden state to a score a key head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.of_pair, self.of_hidden = nn.Linear(16, 1), nn.Linear(32, 2)

    def forward(self, keys, values, hidden):
        return self.of_pair(torch.cat([keys, values], -1))[..., 0] + self.of_hidden(hidden).transpose(1, 2)


@dataclass(frozen=True)
class Learned(CachePlan):
    """A scorer is a field; what it reads beyond the cache is declared."""

    scorer: nn.Module = field(default_factory=Scorer)
    recent: int = 2
    sinks: int = 1
    needs = ("hidden",)

    def scores(self, x):
        return self.scorer(x.keys, x.values, x.states())


@dataclass(frozen=True)
class Soft(Learned):
    """For training: nothing goes, each slot's mass is how much it would be missed."""

    def evict(self, x, scores):
        return scores

    def fold(self, x, scores):
        return Slots(x.keys, x.values, x.slots.column, x.valid, F.logsigmoid(scores))


def test_a_scorer_with_parameters_chooses(seen):
    model, _, cached = seen
    plan = Learned(0.5)
    kept, _ = kept_by(model, plan)
    with torch.no_grad():
        hidden = model(words(2, N), output_hidden_states=True).hidden_states
        for layer in range(3):
            entered = model.model.layers[layer].input_layernorm(hidden[layer])
            want = best(plan.scorer(*cached[layer], entered), 13, {0, N - 2, N - 1})
            assert torch.equal(kept[layer], want)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_scorer_learns_through_the_cache(seen):
    """The loss of the second turn reaches the scorer through the masses, and going down the gradient lowers it."""
    model = seen[0]
    ids, more = words(2, N), words(2, 6, 1)
    plan = Soft(0.5)

    def loss():
        with attach(model, plan) as attached:
            cache = attached.cache()
            model(ids, past_key_values=cache)
            return model(more, past_key_values=cache, labels=more).loss

    before = loss()
    gradient = torch.autograd.grad(before, list(plan.scorer.parameters()))
    assert all(g.abs().max() > 1e-6 for g in gradient)
    weight = plan.scorer.of_hidden.weight
    with torch.no_grad():
        step = 1e-2 * torch.ones_like(weight)
        weight += step
        up = loss()
        weight -= 2 * step
        down = loss()
        weight += step
    slope = float((gradient[2] * step).sum())
    assert float(up - down) / 2 == pytest.approx(slope, rel=0.05)


def test_a_scorer_learns_from_labels(seen):
    """Locret's way: scores against what the second turn really looked at."""
    model, attentions, cached = seen
    plan = Learned(0.5)
    label = [a[:, :, -4:].amax(2).unflatten(1, (2, 2)).amax(2) for a in attentions]
    with torch.no_grad():
        hidden = [model.model.layers[i].input_layernorm(h) for i, h in
                  enumerate(model(words(2, N), output_hidden_states=True).hidden_states[:3])]
    optimizer, losses = torch.optim.Adam(plan.scorer.parameters(), 1e-2), []
    for _ in range(20):
        scores = [plan.scores(view_with(cached[i], hidden[i])) for i in range(3)]
        losses.append(sum(F.smooth_l1_loss(s, y) for s, y in zip(scores, label)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def view_with(pair, hidden):
    x = view_of(n=N)
    slots = Slots(*pair, torch.arange(N).expand(2, 2, -1), torch.ones(2, 2, N, dtype=torch.bool))
    return CacheView(slots, x.queries, x.sight, x.real, x.positions, x.scaling, 0, 1, hidden=hidden)


def test_hidden_states_have_to_be_declared(seen):
    class Undeclared(Learned):
        needs = ()

    with attach(seen[0], Undeclared(0.5)) as attached, pytest.raises(SignalError, match="needs"):
        turns(seen[0], attached.cache(), [dict(input_ids=words(1, 9))])
