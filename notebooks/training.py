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
# # Inside the language model, and while it trains
#
# Image reducers drop tokens before the language model. Layer reducers drop them inside it, after some layers have read
# all of them; LLaVolta trains that way, heavily at first and not at all in the end.

# %%
import random

import torch
from IPython.display import display

import mmcompress
from mmcompress import pico
from mmcompress.image import GlobalRank
from mmcompress.layers import FastV, PyramidDrop
from mmcompress.train import Schedule, Stage, StagedCompression, consistency

model, processor = pico.load()
kind, image, cards = pico.scenes.scene(random.Random(6), 336, 336, kind="cards")
question = f"what number is on the {cards[0]['color']} card?"
inputs = processor(images=image, text=pico.prompt(question), return_tensors="pt")


def answer(ids):
    return processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()


print(question, "right:", cards[0]["number"])

# %% [markdown]
# ## FastV: what the question looks at
#
# From layer 4 of 8 on, only the quarter of the tokens that the last prompt token attends to is left. The report counts layer by
# layer: what a layer reads on average, its columns, the cache's bytes and the prefill's operations.

# %%
with mmcompress.wrap(model, layers=[FastV(layer=4, keep=0.25)]) as w:
    print(answer(w.generate(**inputs, max_new_tokens=8)))
    print(w.report)
    kept = w.plot(image, layer=4)
display(kept)

# %% [markdown]
# ## Both together, and in stages

# %%
for options in ({"image": GlobalRank(keep=0.5), "layers": [FastV(4, 0.5)]}, {"layers": [PyramidDrop.for_depth(8)]}):
    with mmcompress.wrap(model, **options) as w:
        print(f"{w.config.label}: {answer(w.generate(**inputs, max_new_tokens=8))}, "
              f"{w.report.tokens_mean:.0f} of {w.report.tokens_before} tokens a layer")

# %% [markdown]
# ## A schedule is a function of the optimizer step
#
# LLaVolta's four stages, as published for 32 layers and 5,197 steps, and as pico's 8 layers get them. CR is the paper's
# compression ratio: visual tokens of all layers without compression over those with it.

# %%
published = Schedule.build("llavolta-4stage")
for stage, end in zip(published.stages, published.boundaries(5197)):
    print(f"until step {end:5}  layer {stage.layer:2}  stride {stage.stride}  CR {100 * stage.compression_ratio():.0f} %")
print([stage.label() for stage in published.for_depth(8).stages])

# %% [markdown]
# `Trainer(..., callbacks=[StagedCompression("llavolta-4stage")])` is all that transformers' trainer needs. In a loop of
# your own it is two lines. Any reducer may be a stage. Evaluation mode sees all tokens.

# %%
def batch(seed, rows=2):
    """Scenes with one answer each; labels are -100 outside answers."""
    rng = random.Random(seed)
    scenes = [pico.scenes.scene(rng, 336, 336) for _ in range(rows)]
    asked = [pico.scenes.questions(rng, kind, objects, 1)[0] for kind, _, objects in scenes]
    out = processor(images=[s[1] for s in scenes], text=[pico.prompt(q) + f" {a}</s>" for q, a in asked], padding=True,
                    padding_side="right", return_tensors="pt")
    labels = torch.full_like(out["input_ids"], -100)
    for row, (_, a) in enumerate(asked):
        said = torch.tensor(processor.tokenizer(f" {a}</s>", add_special_tokens=False)["input_ids"])
        end = int(out["attention_mask"][row].sum())
        labels[row, end - len(said):end] = said
    return {**out, "labels": labels}


schedule = Schedule((Stage(0.25, layer=1, stride=8), Stage(0.5, layer=2, keep=0.25, method="fastv"),
                     Stage(0.75, keep=0.25, method="global_rank"), Stage(1.0)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
model.train()
staged = StagedCompression(schedule, total=8).attach(model)                     # line one
for step in range(8):
    label = staged.stage.label()
    loss = model(**batch(step)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    staged.step()                                                               # line two
    print(f"step {step}  loss {loss.item():.3f}  {label}")
staged.detach()
for s in staged.summary():
    print(f"{s['label']:28} {s['tokens_after'] / s['pictures']:5.0f} tokens a picture and layer, "
          f"{s['flops_after'] / s['flops_before']:.0%} of the operations")

# %% [markdown]
# ## A model made to be reduced
#
# The consistency loss pulls the answers with few tokens towards the same model's answers with all of them. `mmcompress train
# configs/pico-consistency.yaml` fine-tunes with it.

# %%
model.eval()
both = consistency(model, batch(99), image=GlobalRank(keep=0.1))
print(f"with all tokens {both.full_loss.item():.3f}, with a tenth {both.reduced_loss.item():.3f}, "
      f"divergence {both.kl.item():.3f}")
