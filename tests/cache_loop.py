"""A compressed cache in loops: one row and one key head at a time, entries in plain tensors; no masks, no slots, no padding.

Rules change a head after each call, one after another. What they read and how they round is written out here.
"""

import math
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from test_cache_dense import NEAR, prompt, tiny_model, turns, words
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmcompress.cache import attach


class Head:
    """Entries of one key head of one row: keys, values (n, d), column, mass, paid (n,), and which are in few bits."""

    def __init__(self, d):
        self.keys = self.values = torch.zeros(0, d)
        self.column, self.low = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool)
        self.mass = self.paid = torch.zeros(0)
        self.balance = None

    def add(self, keys, values, column):
        n = len(column)
        self.keys, self.values = torch.cat([self.keys, keys]), torch.cat([self.values, values])
        self.column, self.low = torch.cat([self.column, column]), torch.cat([self.low, torch.zeros(n, dtype=torch.bool)])
        self.mass, self.paid = torch.cat([self.mass, torch.ones(n)]), torch.cat([self.paid, torch.zeros(n)])

    def stay(self, places):
        for name in ("keys", "values", "column", "low", "mass", "paid"):
            setattr(self, name, getattr(self, name)[places])


class Loop:
    """Attention over heads in loops. The first call is the stock attention's, so that what it leaves is the same to the bit."""

    def __init__(self, stock, rules, real, totals=None, prompt=None):
        self.stock, self.rules, self.heads, self.start, self.most = stock, rules, {}, 0, 0
        self.real, self.totals, self.prompt = real, totals, prompt

    def __call__(self, module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
        (rows, kv, queries, d), layer, out = key.shape, module.layer_idx, torch.zeros(query.shape)
        for b in range(rows):
            there = self.real[b, self.start:self.start + queries].nonzero()[:, 0]
            for h in range(kv):
                head = self.heads.setdefault((layer, b, h), Head(d))
                head.add(key[b, h, there].float(), value[b, h, there].float(), there + self.start)
                self.most = max(self.most, len(head.column))
                asked = query[b].unflatten(0, (kv, -1))[h][:, there].float()                        # (G, q, d)
                logits = asked @ head.keys.T * scaling + head.mass.log()
                future = head.column > (there + self.start)[:, None]
                maps = logits.masked_fill(future, -torch.inf).softmax(-1)
                for g in range(len(asked)):
                    out[b, h * len(asked) + g, there] = maps[g] @ head.values
                head.paid = head.paid + maps.sum((0, 1)) / len(asked)
                so_far = int(self.real[b, :self.start + queries].sum())
                at = SimpleNamespace(layer=layer, row=b, head=h, queries=asked, maps=maps, first=self.start == 0, count=queries,
                                     total=so_far if self.totals is None else self.totals[b], so_far=so_far,
                                     prompt=queries > 1 if self.prompt is None else self.start < self.prompt)
                for rule in self.rules:
                    rule(head, at)
        if self.start == 0:
            stock = ALL_ATTENTION_FUNCTIONS.get(self.stock, sys.modules[type(module).__module__].eager_attention_forward)
            return stock(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
        return out.transpose(1, 2).to(query.dtype), None


@contextmanager
def looped(model, loop):
    config = model.config
    before = config._attn_implementation
    AttentionInterface.register("loop_reference", loop)
    AttentionMaskInterface.register("loop_reference", AttentionMaskInterface()[before])
    config._attn_implementation = "loop_reference"
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.no_grad()
def run(model, rules, calls, totals=None, prompt=None):
    """Logits of several calls, and the loop with its heads. calls as for `turns`

    totals: tokens of each row that budgets count; prompt: so many columns are a prompt, not generated, whatever a call's length
    """
    length = sum(call["input_ids"].shape[1] for call in calls)
    real = torch.ones(len(calls[0]["input_ids"]), length, dtype=torch.bool)
    if "attention_mask" in calls[-1]:
        real = calls[-1]["attention_mask"].bool()
    loop, logits = Loop(model.config._attn_implementation, rules, real, totals, prompt), []
    with looped(model, loop):
        for call in calls:
            n = call["input_ids"].shape[1]
            places = call.get("position_ids", torch.arange(loop.start, loop.start + n)[None])
            mask = {} if loop.start or "attention_mask" not in call else {"attention_mask": call["attention_mask"]}
            logits.append(model(call["input_ids"], position_ids=places, use_cache=False, **mask).logits)
            loop.start += n
    return logits, loop


def count(total, keep):
    return min(total, keep if isinstance(keep, int) else max(1, math.floor(total * keep + 1e-9)))


# rules ----------------------------------------------------------------------------------------------------------------
def when(rule, again=False, every=None):
    """After the first prompt; after all; or when so many tokens have come since."""
    since = {}

    def timed(head, at):
        key = id(head)
        since[key] = since.get(key, 0) + at.count
        if (at.prompt and (at.first or again)) or (every is not None and since[key] >= every):
            since[key] = 0
            rule(head, at)
    return timed


def chosen(scores, k, first, last):
    """Places of the k best, the first and the last ones among them."""
    n = len(scores)
    always = set(range(min(n, first))) | set(range(max(0, n - last), n))
    rest = sorted((i for i in range(n) if i not in always), key=lambda i: (-float(scores[i]), i))
    return sorted(always | set(rest[:max(0, k - len(always))]))


def drop(score, keep, first=0, last=0):
    """Keep the best by score(head, at). last: a number, or a share of the budget"""
    def rule(head, at):
        k = count(at.total, keep)
        head.stay(chosen(score(head, at), k, first, last if isinstance(last, int) else math.floor(k * last + 1e-9)))
    return rule


def paid(head, at):
    return head.paid


def norm(head, at):
    return -head.keys.square().sum(-1)


def age(head, at):
    return head.column


def unlike(head, at):
    unit = head.keys / head.keys.norm(dim=-1, keepdim=True)
    mean = unit.mean(0)
    return -(unit @ mean) / mean.norm()


def votes(window, kernel=5):
    """SnapKV: what the call's last queries pay, averaged over neighbours outside of the window."""
    def score(head, at):
        outside = max(0, len(head.column) - window)
        seen = at.maps[:, -window:, :outside].mean((0, 1)) if at.maps.shape[1] else torch.zeros(outside)
        return [sum(float(seen[j]) for j in range(max(0, i - kernel // 2), min(outside, i + kernel // 2 + 1))) / kernel
                for i in range(outside)] + [math.inf] * (len(head.column) - outside)
    return score


def razor(keep, first, last, whole=()):
    """What is near stays; the mean of the rest, by mass, is in the place of its last."""
    def rule(head, at):
        if (at.layer, at.head) in whole:
            return
        near = chosen(head.column, count(at.total, keep), first, last)
        far = [i for i in range(len(head.column)) if i not in near]
        if far:
            mass = head.mass[far]
            head.keys[far[-1]] = (head.keys[far] * mass[:, None]).sum(0) / mass.sum()
            head.values[far[-1]] = (head.values[far] * mass[:, None]).sum(0) / mass.sum()
            head.paid[far[-1]], head.mass[far[-1]] = head.paid[far].sum(), mass.sum()
        head.stay(sorted(near + far[-1:]))
    return rule


def grid(x, bits, group):
    """Eq. 1, one token and group at a time, scales and offsets in float16. x (n, d) -> rounded, codes"""
    out, codes = torch.zeros(x.shape), torch.zeros(x.shape, dtype=torch.long)
    for i in range(x.shape[0]):
        for c in range(0, x.shape[1], group):
            part = x[i, c:c + group]
            step = float(((part.max() - part.min()) / (2 ** bits - 1)).half())
            low = float(part.min().half())
            for j, value in enumerate(part.tolist()):
                code = 0 if step == 0 else min(2 ** bits - 1, max(0, math.floor((value - low) / step + 0.5)))
                out[i, c + j], codes[i, c + j] = low + code * step, code
    return out, codes


def mikv(high=0.2, bits=2, high_bits=16, recent=0.5, sinks=0, balance=True):
    """Round all but the most attended and the last ones; Eq. 2 from the first prompt."""
    def rule(head, at):
        n = len(head.column)
        k = count(n, high) if high else 0
        top = chosen(head.paid, k, sinks, recent if isinstance(recent, int) else math.floor(k * recent + 1e-9))
        if head.balance is None:
            head.balance = (at.queries.abs().amax((0, 1)) / head.keys.abs().amax(0)).sqrt() if balance else torch.ones(())
        head.low = torch.tensor([i not in top for i in range(n)])
        for places, width in ((head.low, bits), (~head.low, high_bits)):
            if width < 16 and places.any():
                half = head.keys.shape[1] // 2
                head.keys[places] = grid(head.keys[places] * head.balance, width, half)[0] / head.balance
                head.values[places] = grid(head.values[places], width, half)[0]
    return rule


def same_slots(cache, loop, near):
    """Assert that every head holds the loop's entries: columns, keys, values, masses."""
    for (layer, b, h), head in loop.heads.items():
        slots = cache.layers[layer].slots
        valid = slots.valid[b, h]
        assert slots.column[b, h][valid].tolist() == head.column.tolist()
        torch.testing.assert_close(slots.keys[b, h][valid].float(), head.keys, **near)
        torch.testing.assert_close(slots.values[b, h][valid].float(), head.values, **near)
        torch.testing.assert_close(slots.mass[b, h][valid], head.mass, **near)


def talk(side="left", lengths=(24, 15, 7), sizes=(4, 1, 1)):
    """A padded prompt, a second turn of several tokens, then single ones: calls with masks and positions."""
    ids, mask = prompt(lengths, side)
    calls, after = [], mask.sum(1, keepdim=True)
    calls.append(dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)))
    for i, n in enumerate(sizes):
        mask = torch.cat([mask, mask.new_ones(len(mask), n)], 1)
        calls.append(dict(input_ids=words(len(mask), n, i + 1), attention_mask=mask, position_ids=after + torch.arange(n)))
        after = after + n
    return calls


def check(plan, rules, calls, model=None, near=NEAR):
    """A plan answers and holds what the loops do. -> its cache, the loop"""
    model = tiny_model() if model is None else model
    with attach(model, plan) as attached:
        cache = attached.cache()
        got = turns(model, cache, calls)
    want, loop = run(model, rules, calls)
    for call, a, b in zip(calls, got, want):
        real = call["attention_mask"][:, -call["input_ids"].shape[1]:].bool()
        torch.testing.assert_close(a[real], b[real], **near)
    same_slots(cache, loop, near)
    return cache, loop
