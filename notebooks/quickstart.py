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
# # Fewer image tokens, and what they cost
#
# `mmcompress` wraps a stock transformers model, keeps the image tokens that matter and leaves everything else as it was.
# This notebook needs no GPU and no download: the package brings **pico**, a LLaVA-NeXT of 11 million parameters that
# really reads the pictures drawn here.

# %%
import random
from dataclasses import dataclass

import torch

import mmcompress
from mmcompress import ImageReducer, pico, select
from mmcompress.eval import evaluate
from mmcompress.image import AveragePool, GlobalCom2, GlobalRank, Random
from mmcompress.ops.ranking import topk_in_order
from mmcompress.viz import plot_pareto

model, processor = pico.load()

# %% [markdown]
# ## A picture and a question
#
# Every picture is drawn from its seed, with the answers known.

# %%
kind, image, cards = pico.scenes.scene(random.Random(6), 336, 336, kind="cards")
image.resize((504, 504))

# %%
def ask(question):
    inputs = processor(images=image, text=pico.prompt(question), return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8)
    return processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()


questions = [(f"what number is on the {card['color']} card?", card["number"]) for card in cards[:4]]
for question, answer in questions:
    print(f"{question:42} {ask(question):8} (right: {answer})")

# %% [markdown]
# ## The same model on a quarter of the tokens
#
# `wrap` changes this one instance: `model.generate` itself now reduces the picture first. The report counts every token
# that the language model reads, newlines included.

# %%
w = mmcompress.wrap(model, image=GlobalRank(keep=0.25))
for question, answer in questions:
    print(f"{question:42} {ask(question):8} (right: {answer})")
print()
print(w.report)

# %% [markdown]
# What the language model still sees. GlobalRank ranks the tokens of all crops together, guided by the thumbnail, and
# passes over what repeats a token that it has.

# %%
w.plot(image)

# %% [markdown]
# `remove` puts everything back; `with mmcompress.wrap(model, image=...) as w:` does so at the end of its block.

# %%
w.remove()
ask(questions[0][0])

# %% [markdown]
# ## Accuracy against tokens
#
# 40 fresh questions, the same for every method, and the whole answer has to be right. Forty are few: the 95 % intervals
# are wide. Run `mmcompress eval` for figures worth quoting.

# %%
methods = {"GlobalRank": GlobalRank, "GlobalCom2": GlobalCom2, "AveragePool": AveragePool, "Random": Random}
reducers = {f"{name}@{keep}": make(keep=keep) for name, make in methods.items() for keep in (0.5, 0.25, 0.1)}
rows = evaluate(model, processor, {"all tokens": None, **reducers}, n=40, progress=False)
for row in rows:
    if row.kind == "all":
        print(f"{row.method:12} {row.tokens_after:6.0f} of {row.tokens_before:.0f} tokens   {row.accuracy:4.0%}   "
              f"[{row.low:.0%}, {row.high:.0%}]")

# %%
plot_pareto(rows, kinds=["all"])

# %% [markdown]
# ## A reducer of your own
#
# A reducer maps the picture's tokens to fewer of them. Budget, checks and the identity at `keep=1.0` come from
# `ImageReducer`; `x.features` is (pictures, tokens, width), in the order in which the language model reads them.

# %%
@dataclass(frozen=True)
class Distinct(ImageReducer):
    """Keep the tokens that are farthest from the picture's mean token."""

    def reduce(self, x, k):
        far = (x.features - x.features.mean(1, keepdim=True)).norm(dim=-1)          # (B, N)
        far = far.masked_fill(~x.places.is_patch, -torch.inf)                       # newlines go first
        return select(x, topk_in_order(far, k))


rivals = {"Distinct": Distinct(keep=0.25), "GlobalCom2": GlobalCom2(keep=0.25), "Random": Random(keep=0.25)}
for row in evaluate(model, processor, rivals, n=40, seed="rivals", progress=False):
    if row.kind == "all":
        print(f"{row.method:12} {row.accuracy:4.0%}   [{row.low:.0%}, {row.high:.0%}]")

# %% [markdown]
# It works in `wrap` like any other.

# %%
with mmcompress.wrap(model, image=Distinct(keep=0.25)) as w:
    print(ask(questions[0][0]), "(right:", questions[0][1] + ")")
    print(w.report)
