"""An independent dense decoder for one prompt with recordings under FastAdaSP: full maps and loops, no hooks, no cache."""

from __future__ import annotations

from unittest.mock import patch

import tiny_audio
import torch
import torch.nn.functional as F
from dense import rotate, run_layer
from tiny import text

from mmcompress.adapters import adapter_for
from mmcompress.layers.base import steps_of


def build(family, **options):
    """A tiny model of four decoder layers."""
    words = {**tiny_audio._qwen_words(), "num_hidden_layers": 4}
    with patch.object(tiny_audio, "_qwen_words", lambda: words), patch.object(tiny_audio, "text", lambda: text(depth=4)):
        return tiny_audio.build(family, **options)


def slowly(h, s, w, k):
    """One recording, by hand. h (N, D), s (N - 1,), w (N,) -> groups of places and their tokens"""
    pairs = sorted(range(len(s)), key=lambda i: (-float(s[i]), i))[:len(h) - k]
    groups = [[0]]
    for i in range(1, len(h)):
        if i - 1 in pairs:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups, torch.stack([sum(h[j] * w[j] for j in g) / sum(w[j] for j in g) for g in groups])


def embedded(model, inputs):
    """(L, D) embeddings of one prompt with its recordings put in, and their (start, tokens)."""
    adapter, ids = adapter_for(model), inputs["input_ids"]
    x, spans = model.get_input_embeddings()(ids)[0].clone(), []
    found = adapter.find(inputs, ids)
    if found:
        for item, features in zip(found, adapter.encode_all(inputs, found, {})["audio"].features):
            x[item.columns] = features
            spans.append((int(item.columns[0]), item.layout.tokens))
    return x, sorted(spans)


def dense(model, x, spans, reducer, prompt=None, answers=()):
    """Logits of one prompt without cache, batch or hooks: full maps, loops. `prompt`: its columns; None: all of them.

    -> logits (L', V), columns (L',) of the full prompt, of joined tokens the one that weighs most
    """
    lm, keeps = model.model.language_model, {s.layer: s.reducer.keep for s in steps_of([reducer], 4)} if spans else {}
    positions = columns = torch.arange(len(x))
    keys = received = torch.empty(0)
    counts = torch.tensor([i < (prompt or len(x)) and i not in answers for i in range(len(x))])
    for number, layer in enumerate(lm.layers):
        if number in keeps:
            parts, new, at = [], [], 0
            for start, size in spans:
                k = max(1, int(size * keeps[number] + 1e-9))
                key = keys[:, start:start + size].transpose(0, 1).flatten(1)
                s = F.cosine_similarity(key[:-1], key[1:], dim=1)
                w = received[start:start + size] if reducer.weights == "attention" else torch.ones(size)
                parts += [([p], [1.0]) for p in range(at, start)]
                new.append((len(parts), k))
                groups, _ = slowly(x[start:start + size].detach(), s, w, k)
                parts += [([start + p for p in g], [float(w[p]) for p in g]) for g in groups]
                at = start + size
            parts += [([p], [1.0]) for p in range(at, len(x))]
            x = torch.stack([sum(x[p] * a for p, a in zip(g, w)) / sum(w) for g, w in parts])
            most = torch.tensor([g[w.index(max(w))] for g, w in parts])
            columns, positions, counts, spans = columns[most], positions[most], counts[most], new
            if reducer.positions == "closed":
                positions = torch.arange(len(x))
        with torch.no_grad():
            keys = layer.self_attn.k_proj(layer.input_layernorm(x)).unflatten(-1, (-1, layer.self_attn.head_dim))
            keys = rotate(keys.transpose(0, 1), positions)
        x, map_ = run_layer(layer, x, positions)
        received = map_.detach()[:, counts].sum((0, 1))
    return model.lm_head(lm.norm(x)), columns
