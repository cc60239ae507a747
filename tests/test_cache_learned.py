"""Scorers and stores with parameters: fields of a plan, through generate, padding and beams, and with gradients.

There is room here for Locret (a retaining head), LoCoCo (a fold with weights) and CSKV (a low-rank store).
"""

from dataclasses import dataclass, field, replace

import pytest
import torch
from test_cache_dense import NEAR, Given, kept_columns, prompt, tiny_model, turns, words
from torch import nn

from mmcompress.cache import CachePlan, attach


@dataclass(frozen=True, eq=False)
class LowRank:
    """Keys of all heads as one latent a token (B, 1, N, r), which a parameter (r, H d) restores."""

    latent: torch.Tensor
    up: torch.Tensor
    heads: int

    @property
    def shape(self):
        return len(self.latent), self.heads, self.latent.shape[2], self.up.shape[1] // self.heads

    def restore(self, dtype):
        return (self.latent[:, 0] @ self.up).unflatten(-1, (self.heads, -1)).transpose(1, 2).to(dtype)

    def tensors(self):
        yield self.latent

    def each(self, change):
        return replace(self, latent=change(self.latent))


class Net(nn.Module):
    def __init__(self, rank=5):
        super().__init__()
        torch.manual_seed(1)
        self.score, self.down = nn.Linear(32, 1), nn.Linear(16, rank, bias=False)
        self.up = nn.Parameter(torch.randn(rank, 16) / 3)


@dataclass(frozen=True)
class Learned(CachePlan):
    """One score for all heads, from what entered the layer, that also weighs what stays; keys that stay are held as latents."""

    net: nn.Module = field(default_factory=Net)
    sinks: int = 0
    recent: int = 2
    needs = ("hidden",)

    def scores(self, x):
        return self.net.score(x.states())[:, None, :, 0].expand_as(x.valid)

    def evict(self, x, scores):
        vars(self)["last"] = scores
        return super().evict(x, scores)

    def fold(self, x, kept):
        index, there = kept.index()
        weight = nn.functional.logsigmoid(vars(self).pop("last"))
        return replace(x.slots.take(index, there), bias=weight.gather(2, index))

    def store(self, x):
        return replace(x.slots, keys=LowRank(self.net.down(x.keys.transpose(1, 2).flatten(2))[:, None], self.net.up, 2))


class ByHand(Given):
    """The same with one matrix a token, of a choice that is given."""

    def fold(self, x, kept):
        keys, bias = x.keys.clone(), torch.zeros(x.valid.shape)
        for b, n in torch.ones(x.valid.shape)[:, 0].nonzero().tolist():
            keys[b, :, n] = (self.net.up.T @ (self.net.down.weight @ keys[b, :, n].flatten())).view(2, 8)
            bias[b, :, n] = torch.sigmoid(x.states()[b, n] @ self.net.score.weight[0] + self.net.score.bias[0]).log()
        index, there = kept.index()
        return replace(x.slots, keys=keys, bias=bias).take(index, there)

    needs = ("hidden",)


@torch.no_grad()
def chosen_by(net, model, ids, mask, keep):
    """What the scorer keeps, from the hidden states of the stock model. -> {layer: (B, 1, L) bool}"""
    hidden, out = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states, {}
    for i, layer in enumerate(model.model.layers):
        scores = net.score(layer.input_layernorm(hidden[i]))[..., 0]
        out[i] = torch.zeros(len(ids), 1, ids.shape[1], dtype=torch.bool)
        for b in range(len(ids)):
            real = mask[b].nonzero()[:, 0].tolist()
            best = sorted(real[:-2], key=lambda c: -float(scores[b, c]))[:int(len(real) * keep) - 2]
            out[i][b, 0, best + real[-2:]] = True
    return out


@pytest.mark.parametrize("way", [dict(do_sample=False), dict(num_beams=3)])
def test_a_learned_scorer_and_store_generate(way):
    model, (ids, mask), plan = tiny_model(), prompt((24, 15)), Learned(0.5)
    masks = chosen_by(plan.net, model, ids, mask, 0.5)
    other = ByHand({i: m.repeat_interleave(way.get("num_beams", 1), 0) for i, m in masks.items()})
    vars(other)["net"] = plan.net
    options, made = dict(attention_mask=mask, max_new_tokens=7, output_scores=True, return_dict_in_generate=True, **way), []
    for one in (plan, other):
        with attach(model, one):
            made.append(model.generate(ids, **options))
    assert torch.equal(made[0].sequences, made[1].sequences)
    for a, b in zip(made[0].scores, made[1].scores):
        torch.testing.assert_close(a, b, **NEAR)
    for i, kept in kept_columns(made[0].past_key_values).items():
        assert torch.equal(kept[..., :24], masks[i].repeat_interleave(way.get("num_beams", 1), 0).expand(-1, 2, -1))
    low = made[0].past_key_values.layers[0].parts[0]
    assert isinstance(low.keys, LowRank) and low.nbytes == len(low.column) * 12 * (5 * 4 + 2 * (8 * 4 + 4 + 1 + 4))


@pytest.mark.parametrize("length", [6, 1])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_learned_scorer_and_store_learn_through_the_cache(frozen, length):
    """In training mode: the loss of a continuation reaches scores, projection and restoration, by the slope it really has."""
    model, plan, ids, more = tiny_model().train().requires_grad_(not frozen), Learned(0.5), words(2, 24), words(2, length, 1)

    def loss():
        with attach(model, plan) as attached:
            cache = attached.cache()
            model(ids, past_key_values=cache)
            logits = model(more, past_key_values=cache).logits
            return nn.functional.cross_entropy(logits.flatten(0, 1), words(2, length, 2).flatten())

    gradient = torch.autograd.grad(loss(), list(plan.net.parameters()))
    for (name, own), g in zip(plan.net.named_parameters(), gradient):
        step = 1e-3 * g / g.norm()
        with torch.no_grad():
            own += step
            up = loss()
            own -= 2 * step
            down = loss()
            own += step
        assert float(up - down) / 2e-3 == pytest.approx(float(g.norm()), rel=0.05), name
        assert float(g.norm()) > 1e-4


@dataclass(frozen=True)
class Retaining(CachePlan):
    """Locret: a token is scored once, when it comes; its score stays with its slot, noted in the place of evidence."""

    net: nn.Module = field(default_factory=Net)
    sinks: int = 0
    recent: int = 2
    needs = ("hidden",)

    def keeps_all(self, x):
        return False                                        # a layer that is left whole has nowhere to note scores

    def scores(self, x):
        new = self.net.score(x.states())[:, None, :, 0].expand(-1, x.valid.shape[1], -1)
        return new if x.slots.evidence is None else torch.cat([x.slots.evidence[..., :-new.shape[2]], new], 2)

    def reduce(self, x):
        return super().reduce(replace(x, slots=replace(x.slots, evidence=self.scores(x))))


@pytest.mark.parametrize("chunk", [5, 8, 24])
def test_a_scorer_that_sees_each_token_once_chooses_over_chunks(chunk):
    """In one layer states do not depend on what was dropped: the choice is that of all tokens' scores, whatever the chunks."""
    model, (ids, mask), plan = tiny_model(depth=1), prompt((24, 13)), Retaining(9, again=True)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with attach(model, plan) as attached:
        cache = attached.cache()
        turns(model, cache, [dict(input_ids=ids[:, i:i + chunk], attention_mask=mask[:, :i + chunk],
                                  position_ids=places[:, i:i + chunk]) for i in range(0, 24, chunk)])
    with torch.no_grad():
        scores = plan.net.score(model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)))[..., 0]
    for b in range(2):
        real = mask[b].nonzero()[:, 0].tolist()
        want = sorted(sorted(real[:-2], key=lambda c: -float(scores[b, c]))[:7] + real[-2:])
        for h in range(2):
            slots = cache.layers[0].slots
            assert slots.column[b, h][slots.valid[b, h]].tolist() == want
