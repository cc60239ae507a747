"""An independent dense Llama decoder for one prompt: explicit attention maps, positions and reductions, no hooks, no cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny import IMAGE

from mmcompress.adapters import adapter_for


def embedded(model, inputs):
    """(L, D) embeddings of one prompt with its pictures put in, and the (start, layout) of each picture."""
    adapter = adapter_for(model)
    x = model.get_input_embeddings()(inputs["input_ids"][0])
    if "pixel_values" not in inputs:
        return x, []
    layouts = adapter.layouts(inputs)
    x = x.clone()
    spans, at = [], 0
    for features, layout in zip(adapter.encode(inputs).features, layouts):
        at = at + int((inputs["input_ids"][0, at:] == IMAGE).nonzero()[0])
        x[at:at + layout.tokens] = features
        spans.append((at, layout))
        at += layout.tokens
    return x, spans


def rotate(x, positions, theta=10000.0):
    """x (H, L, d) rotated to `positions` (L,)."""
    d = x.shape[-1]
    angle = positions.float()[:, None] * theta ** (-torch.arange(0, d, 2) / d)              # (L, d/2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :d // 2], x[..., d // 2:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention_map(layer, x, positions):
    """Probabilities (H, L, L) and values (H, L, d) of one decoder layer, causal."""
    attn = layer.self_attn
    h = layer.input_layernorm(x)
    q, k, v = (p(h).unflatten(-1, (-1, attn.head_dim)).transpose(0, 1) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    logits = rotate(q, positions) @ rotate(k, positions).transpose(1, 2) * attn.head_dim ** -0.5
    future = torch.ones(len(x), len(x)).triu(1).bool()
    return logits.masked_fill(future, -torch.inf).softmax(-1), v


def run_layer(layer, x, positions):
    probabilities, v = attention_map(layer, x, positions)
    x = x + layer.self_attn.o_proj((probabilities @ v).transpose(0, 1).flatten(1))
    h = layer.post_attention_layernorm(x)
    return x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h)), probabilities


def dense(model, x, spans, rules, queries):
    """Logits of one prompt whose pictures are reduced by `rules`: layer -> rule(state) -> (kept or pooled groups per picture).

    A rule gets the previous layer's map, this layer's map (a function), the pictures' starts and sizes and the queries, and
    returns for each picture a list of lists of places; each inner list becomes one token, their mean, at the floor of their
    mean position.
    -> logits (L', V), columns (L',) of the full prompt (of pooled tokens: the middle one)
    """
    lm = model.model.language_model
    positions, columns = torch.arange(len(x)), torch.arange(len(x))
    previous = None
    sizes = [layout.tokens for _, layout in spans]
    starts = [start for start, _ in spans]
    for number, layer in enumerate(lm.layers):
        if number in rules:
            rule, renumber = rules[number]
            asked = [int((columns == q).nonzero()[0]) for q in queries]
            groups = rule(previous, lambda: attention_map(layer, x, positions)[0], starts, sizes, asked)  # noqa: B023
            parts, new_starts, at, length = [], [], 0, 0
            for start, size, g in zip(starts, sizes, groups):
                parts += [[p] for p in range(at, start)]
                new_starts.append(length + start - at)
                parts += g
                length += start - at + len(g)
                at = start + size
            parts += [[p] for p in range(at, len(x))]
            x = torch.stack([x[p].mean(0) for p in parts])
            middle = torch.tensor([(p[0] + p[-1]) // 2 for p in parts])
            columns, positions = columns[middle], positions[middle]
            starts, sizes = new_starts, [len(g) for g in groups]
            if renumber:
                positions = torch.arange(len(x))
        x, previous = run_layer(layer, x, positions)
    return model.lm_head(lm.norm(x)), columns


def fastv(keep):
    def rule(previous, _own, starts, sizes, asked):
        out = []
        for start, size in zip(starts, sizes):
            paid = torch.stack([previous[:, q].mean(0) for q in asked]).mean(0)[start:start + size]
            k = max(1, int(size * keep + 1e-9))
            out.append([[start + i] for i in sorted(paid.topk(k).indices.tolist())])
        return out
    return rule, False


def pyramid(entered, keep, renumber=True):
    def rule(_previous, own, starts, sizes, asked):
        paid_all = own()
        out = []
        for n, start, size in zip(entered, starts, sizes):
            paid = torch.stack([paid_all[:, q].mean(0) for q in asked]).mean(0)[start:start + size]
            out.append([[start + i] for i in sorted(paid.topk(max(1, int(n * keep + 1e-9))).indices.tolist())])
        return out
    return rule, renumber


def pool(stride):
    def rule(_previous, _own, starts, sizes, _asked):
        return [[list(range(start + i, min(start + i + stride, start + size))) for i in range(0, size, stride)]
                for start, size in zip(starts, sizes)]
    return rule, False
