# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A smaller key-value cache, and what it costs
#
# After the prompt, a model's memory is its cache. `mmcompress.wrap(model, cache=...)` keeps it small in a stock transformers
# model: plans drop slots, merge them, round them or share them between layers. No GPU and no download: **pico**, the
# embedded LLaVA-NeXT, answers questions about a picture that is held in a fraction of the bytes.

# %%
import copy
import random
from dataclasses import dataclass

import torch

import mmcompress
from mmcompress import pico
from mmcompress.cache import H2O, CachePlan, KeyDiff, KVMerger, MiKV, Random, RazorAttention, SnapKV, attach, chain
from mmcompress.viz import plot_slots

model, processor = pico.load()
kind, image, cards = pico.scenes.scene(random.Random(6), 336, 336, kind="cards")
questions = [(f"what number is on the {card['color']} card?", card["number"]) for card in cards[:4]]
image.resize((420, 420))

# %% [markdown]
# ## A conversation
#
# A layer is compressed after its attention over the prompt has run, so the prompt's own logits are the stock model's. What
# counts is what comes later. Here the picture comes first, alone, and is compressed before anything is asked; every question
# then goes to a copy of that cache.

# %%
shown = processor(images=image, text=pico.prompt("").removesuffix(" ASSISTANT:").rstrip(), return_tensors="pt")


def remember(w):
    """The picture, in a cache that the wrapped model's plans keep small."""
    cache = w.cache()
    with torch.no_grad():
        w(**shown, past_key_values=cache)
    return cache


def ask(w, cache, question):
    asked = processor.tokenizer(f" {question} ASSISTANT:", add_special_tokens=False, return_tensors="pt").input_ids
    ids = torch.cat([shown["input_ids"], asked], 1)
    out = w.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=copy.deepcopy(cache), max_new_tokens=8)
    return processor.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip()


for plan in (SnapKV(keep=1.0), Random(keep=0.25), SnapKV(keep=0.25), H2O(keep=0.25), KeyDiff(keep=0.25), MiKV(bits=2),
             [KeyDiff(keep=0.5), MiKV(bits=4)]):
    with mmcompress.wrap(model, cache=plan) as w:
        cache = remember(w)
        right = sum(ask(w, cache, question) == answer for question, answer in questions)
        print(f"{right} of {len(questions)} right with {cache.nbytes / cache.stock_nbytes:6.1%} of the bytes: {w.config.label}")

# %% [markdown]
# One picture proves little: `docs/cache.md` has the same for 400 questions, and real language models. What is there to see is
# that dropping by what the *last tokens* look at (SnapKV) cannot know what will be asked, and that holding everything in few
# bits (MiKV) need not.
#
# ## What a cache holds
#
# A line is a key head, a column a token.

# %%
with mmcompress.wrap(model, cache=[SnapKV(keep=0.5), MiKV(bits=4)]) as w:
    cache = remember(w)
plot_slots(cache)

# %% [markdown]
# ## What it saved
#
# `generate` makes such caches by itself. The report counts what the tensors hold: keys, values, scales, columns, validity.

# %%
inputs = processor(images=image, text=pico.prompt(questions[0][0]), return_tensors="pt")
with mmcompress.wrap(model, cache=SnapKV(keep=0.25)) as w:
    w.generate(**inputs, max_new_tokens=8)
    print(w.report)

# %% [markdown]
# ## One unit for tokens and slots
#
# `keep` counts tokens of the stock prompt. With an image reducer before the language model, the cache still keeps that share of
# what the *stock* prompt would have been. A mapping gives modalities budgets of their own.

# %%
for options in (dict(cache=SnapKV(keep={"image": 0.1})), dict(image="global_rank", cache=SnapKV(keep=0.1)),
                dict(image="global_rank", cache=KVMerger(keep=0.2, mass=True))):
    with mmcompress.wrap(model, **options) as w:
        w.generate(**inputs, max_new_tokens=8)
        print(w.report, end="\n\n")

# %% [markdown]
# ## Retrieval heads
#
# RazorAttention keeps everything in the heads that look things up, found by a probe of repeated random tokens, and one token
# for all the rest elsewhere. The blue slots stand for all that is gray in their line.

# %%
heads = mmcompress.cache.find_retrieval_heads(model, induction=0.2, echo=0.1, period=64)
print("(layer, key head):", heads)
with mmcompress.wrap(model, cache=RazorAttention(keep=0.15, recent=40, retrieval=heads)) as w:
    cache = remember(w)
plot_slots(cache)

# %% [markdown]
# ## A method of your own
#
# A plan is a frozen dataclass with `scores`. This one keeps tokens whose values are large; it works with batches, padding,
# beams, budgets by modality and chains, since none of that is its business.

# %%
@dataclass(frozen=True)
class LargeValues(CachePlan):
    """Keep the tokens with the largest values."""

    def scores(self, x):
        return x.values.float().norm(dim=-1)                                  # (B, H_kv, N), higher is kept


with attach(model, chain([LargeValues(keep=0.5), MiKV(bits=4)])) as attached:
    cache = attached.cache()
    with torch.no_grad():
        model(**shown, past_key_values=cache)
print(cache.lengths, f"{cache.nbytes / cache.stock_nbytes:.1%}")
