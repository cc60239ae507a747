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
# # Sound as discrete tokens
#
# A neural codec turns each 20 ms of sound into a few codes, one from each of its books, which a language model may read or
# write. Here an X-Codec is trained for some seconds, its codes are looked at, arranged, priced and given to a language model.
# This notebook needs no GPU and no download: the speech is synthesised, and the teacher lies in the package.

# %%
import tempfile
from math import log
from pathlib import Path

import torch
from IPython.display import display
from transformers import LlamaConfig, LlamaForCausalLM, XcodecModel

from mmcompress.adapters.codec_lm import CodecLM
from mmcompress.audio import detokenize, tokenize
from mmcompress.audio.codec import arrange, choose, collapse, gains, prefix_errors, usage
from mmcompress.audio.speech import SILENCE, draw
from mmcompress.audio.xcodec.losses import spectral_loss
from mmcompress.train import kinds
from mmcompress.train.codec.plots import plot_codec
from mmcompress.train.record import read_log
from mmcompress.viz.figure import INK, SOFT, new_figure
from mmcompress.viz.spectrogram import log_mel

# %% [markdown]
# ## A sentence
#
# `draw(seed)` says what the seed says, in a voice, at a speed and at a pitch that are the seed's too. The synthesiser
# (eSpeak NG) knows which phone it makes when. The codec below learns from other seeds.

# %%
said = [draw("notebook/0"), draw("notebook/1"), draw("notebook/2", "digits"), draw("notebook/3", "digit")]


def draw_speech(ax, utterance):
    """A log-mel spectrogram, white to blue over 70 dB, with the phones above."""
    sound = utterance.sound
    mel = log_mel(sound.samples, sound.sample_rate)
    ax.imshow(mel, origin="lower", aspect="auto", cmap="Blues", extent=(0, sound.seconds, 0, len(mel)))
    for phone in utterance.phones:
        ax.axvline(phone.start, color=SOFT, linewidth=0.4, alpha=0.6)
        if phone.label != SILENCE:
            ax.text((phone.start + phone.end) / 2, 1.03 * len(mel), phone.label, ha="center", fontsize=7, color=INK)
    ax.set_ylabel(f"{len(mel)} mel bands\nto {sound.sample_rate / 2000:g} kHz", color=SOFT, fontsize=8)
    ax.set_yticks([])


def lanes(heights):
    """A figure of stacked axes over the seconds of the first sentence."""
    fig = new_figure(11, sum(heights) + 0.7)
    axes = fig.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    axes[0].set_title(f"“{said[0].text}”, voice {said[0].voice}", loc="left", fontsize=10.5, color=INK, pad=18)
    axes[-1].set_xlabel("seconds", color=SOFT, fontsize=8)
    for ax in axes:
        ax.tick_params(colors=SOFT, labelsize=8, length=3)
        for side in ax.spines.values():
            side.set_color("#c9ced6")
    draw_speech(axes[0], said[0])
    return fig, axes


fig, _ = lanes([2.2])
fig.tight_layout()
display(fig)

# %% [markdown]
# ## A codec, hardly trained
#
# The recipe is `configs/xcodec-tiny.yaml`, cut down until it takes some seconds: 60 steps of 4 half seconds, 4 books of 64
# codes, no judge. **This is far from trained**; it is enough for codes that depend on the sound. The whole recipe is 700 steps
# of 8 seconds, 8 books of 256 codes, with a judge from step 450 on:
# `mmcompress train configs/xcodec-tiny.yaml --out out/xcodec`.

# %%
kind, recipe, train = kinds.load("../configs/xcodec-tiny.yaml", [
    "steps=60", "batch=4", "log_every=1", "optim={lr: 2.0e-3, warmup: 5, gamma: 0.98}",
    "model={width: 8, acoustic: 64, decoder: 64, codes: 64, books: [1, 2, 3, 4]}",
    "data={sentences: 40, seconds: 0.5}", "eval={every: 20, n: 8, seconds: 1.0}",
    "judge=null", "weights={semantic: 10, adversarial: 0, features: 0}"])
folder = Path(tempfile.mkdtemp())
train(recipe, folder, progress=False)
plot_codec({"60 steps": read_log(folder / "log.jsonl")})

# %% [markdown]
# Held-out errors are shares of what is there: 1 is as bad as silence (waveform, spectral convergence) or as the teacher's mean
# (semantic). The log spectrum is in nats. So far spectrum and semantics are learned a little, and the waveform not at all.
#
# ## Its codes
#
# What was trained is a stock `XcodecModel`. `tokenize` takes recordings of any lengths and gives each the codes that it gets
# alone; asking for fewer books gives the first of all. `usage` counts codes; of so few frames its entropy comes out low.

# %%
codec = XcodecModel.from_pretrained(folder / "model").eval()
tokens = tokenize(codec, [one.sound for one in said])                           # codes (recordings, books, frames)
assert torch.equal(tokenize(codec, said[0].sound, kbps=0.6).codes, tokens[0].prefix(2).codes)

print(f"{tuple(tokens.codes.shape)}, real frames {tokens.lengths.tolist()}; {tokens.rate:g} frames/s, {tokens.kbps:g} kbps")
use = usage(tokens)
for book, (used, perplexity) in enumerate(zip(use.used, use.perplexity), 1):
    print(f"book {book}: {used:4.0%} of {tokens.vocab[0]} codes occur in {use.frames} frames, perplexity {perplexity:.1f}")
print(f"an ideal coder of single codes would need {use.entropy_kbps:.2f} of {use.nominal_kbps:.2f} kbps")

# %% [markdown]
# Below, a colour is a code's number and means nothing more. `collapse` writes a run of one code once, with how many frames it
# lasts: here book 1 alone, as the lowest lane shows.

# %%
runs = collapse(tokens[0].prefix(1))
assert torch.equal(runs.expand().codes, tokens[0].prefix(1).codes)
pairs = list(zip(runs.tokens.codes[0, 0].tolist(), runs.durations[0].tolist()))
print(f"{int(tokens.lengths[0])} frames are {len(pairs)} runs, {runs.tokens_per_second:.1f} a second:",
      " ".join(f"{code}×{frames}" for code, frames in pairs[:16]), "...")

fig, (_, ax, lane) = lanes([2.2, 1.2, 0.3])
end = tokens[0].seconds.item()
ax.imshow(tokens[0].codes[0], aspect="auto", cmap="turbo", interpolation="nearest", extent=(0, end, 4.5, 0.5))
ax.set_yticks(range(1, 5), [f"book {k}" for k in range(1, 5)])
at = 0
for _, frames in pairs:
    lane.broken_barh([(at / tokens.rate, frames / tokens.rate)], (0, 1), facecolor="#f7c4b2", edgecolor="white")
    if frames > 1:
        lane.text((at + frames / 2) / tokens.rate, 0.46, f"{frames}", ha="center", va="center", fontsize=7.5, color=INK)
    at += frames
lane.set(xlim=(0, end), ylim=(0, 1), yticks=[0.5])
lane.set_yticklabels(["book 1, runs"])
fig.tight_layout()
display(fig)

# %% [markdown]
# ## Layouts
#
# Four frames of three books as the sequences that language models are given. `flatten` and `coarse_first` have one vocabulary,
# in which book 2 begins where book 1 ends; the other two have a stream for each book. Grey is the
# pad. `restore` gives the codes back.

# %%
few = tokens[0].prefix(3).frames(40, 44)
layouts = {order: arrange(few, order) for order in ("flatten", "coarse_first", "parallel", "delay")}
fig = new_figure(8, 4.4)
axes = fig.subplots(4, 1, height_ratios=[1, 1, 3, 3])
for ax, (order, sequence) in zip(axes, layouts.items()):
    assert torch.equal(sequence.restore().codes, few.codes)
    ids = sequence.ids[0].reshape(-1, sequence.ids.shape[-1])                   # (streams, steps)
    for (row, step), value in zip(torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist(), ids.flatten().tolist()):
        book = value // 64 if sequence.joint else row
        color = "#e6e8ec" if value == sequence.pad else ("#f7c4b2", "#c9dbe4", "#d5e3c0")[book]
        ax.broken_barh([(step, 1)], (row, 1), facecolor=color, edgecolor="white")
        ax.text(step + 0.5, row + 0.5, value, ha="center", va="center", fontsize=8, color=INK)
    ax.set(xlim=(0, 12), ylim=(len(ids), 0))
    ax.set_axis_off()
    ax.set_title(f"{order}: {ids.shape[1]} steps", loc="left", fontsize=9, color=INK, pad=2)
fig.tight_layout()
display(fig)

# %% [markdown]
# ## What a book is worth
#
# Every prefix is decoded and compared with the recording. The distortion is a function of ours, here the error of the
# spectrum as a share of it, so that silence has 1. `choose` buys books where they take most off it, within a mean rate, and
# none that makes it worse, as the last ones of so young a codec may.

# %%
def spectrum(reference, decoded):
    return float(spectral_loss(decoded[None], reference[None])[0])


errors = prefix_errors(codec, tokens, [one.sound for one in said], spectrum)    # (recordings, books)
bought = choose(errors, tokens, kbps=0.75)
for one, error, gain, books in zip(said, errors, gains(errors), bought):
    print(f"{one.text[:20]:20}  error", *(f"{x:.3f}" for x in error), " gains", *(f"{x:+.3f}" for x in gain), f" buys {books}")
mean = float((bought * tokens.seconds).sum() / tokens.seconds.sum())
print(f"{mean:.2f} books, {mean * tokens.kbps / tokens.n_q:.2f} kbps on average")

# %% [markdown]
# ## In a language model
#
# `CodecLM` puts an embedding and a head for each book around a stock causal language model. This one is tiny and **random**: it
# knows no word and no code, so that its losses are about those of guessing, and what it writes is noise. It shows what goes in
# and what comes out.

# %%
torch.manual_seed(0)
llama = LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                     num_attention_heads=4, bos_token_id=None, eos_token_id=None))
model = CodecLM(llama, tokens.vocab, layout="delay").eval()
rows = [[7, model.audio_token_id, 21, 22, 23]] * len(tokens)                    # a word, a recording, three words
inputs = model.expand(rows, tokens, labels=rows)
out = model(**inputs, tokens=tokens)
print(f"{tuple(inputs['input_ids'].shape)} columns; loss of words {out.text_loss:.2f} (guessing {log(100):.2f}), of books "
      f"{[round(x, 2) for x in out.book_losses.tolist()]} (guessing {log(64):.2f})")

begun = tokens[0].cut(0, 0.5)                                                   # until it writes an end, 25 frames at most
more = model.continue_sound(begun, frames=25, top_k=50, generator=torch.Generator().manual_seed(0))
sound, = detokenize(codec, more)
print(f"{tuple(begun.codes.shape)} codes go on to {tuple(more.codes.shape)}: {sound.seconds:.2f} s of noise")

# %% [markdown]
# ## A real checkpoint
#
# The same lines take published codecs (X-Codec, X-Codec 2, Mimi, DAC, EnCodec, NeuCodec). This cell is text, since it fetches
# weights:
#
# ```python
# from transformers import AutoModel
# from mmcompress.audio import load
#
# codec = AutoModel.from_pretrained("Manel/X-Codec").eval()
# tokens = tokenize(codec, load("speech.flac"), kbps=2)
# ```
#
# [docs/codec.md](../docs/codec.md) says more: hours of sound, thousands of files, training on your own.
