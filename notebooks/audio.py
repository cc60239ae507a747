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
# # Recordings with fewer tokens
#
# Half a minute of sound is 375 to 1500 tokens, and much of it is silence or goes on as it was. `mmcompress` pools, merges or
# drops them in stock transformers models that hear, and says which stretch of the sound each token that is left stands for.
# This notebook needs no GPU and no download: the sound is made here, and the models are tiny ones with random weights.

# %%
import math
import tempfile
import wave
from pathlib import Path

import torch
import transformers

import mmcompress
from mmcompress.audio import AdaptiveSpectralPool, EnergyPrune, MeanPool, SilencePrune, SpectralPool
from mmcompress.layout import AudioLayout
from mmcompress.pipeline import Item
from mmcompress.tokens import Tokens
from mmcompress.viz import plot_spans
from mmcompress.viz.figure import new_figure, quiet

# %% [markdown]
# ## A sound
#
# Ten seconds: a siren, silence, four clicks, silence, a chord that stays as it is, a hiss that swells. Written as a wav file at
# 44.1 kHz, as a recorder would, and read at the 16 kHz that the models want.

# %%
rate, seconds = 44_100, 10
t = torch.arange(rate * seconds) / rate


def within(a, b):
    return (t >= a) & (t < b)


x = 1e-4 * torch.randn(len(t), generator=torch.Generator().manual_seed(0))
turn = 2 * math.pi * 450 * t + 150 * torch.sin(2 * math.pi * 1.1 * t)
x += 0.2 * within(0.2, 2) * sum(torch.sin(h * turn) / h for h in range(1, 9))
for click in (3.5, 3.9, 4.3, 4.7):
    x += within(click, click + 0.2) * torch.exp(-60 * (t - click).clamp(min=0)) * torch.sin(2 * math.pi * 2500 * t)
x += 0.12 * within(6, 8) * sum(torch.sin(2 * math.pi * f * t) for f in (262, 330, 392))
x += 0.1 * within(8.5, 9.8) * (t - 8.5).clamp(min=0) * torch.randn(len(t), generator=torch.Generator().manual_seed(1))

path = Path(tempfile.mkdtemp()) / "sound.wav"
with wave.open(str(path), "wb") as file:
    file.setparams((1, 2, rate, 0, "NONE", ""))
    file.writeframes((x.clamp(-1, 1) * 32767).short().numpy().tobytes())

sound = mmcompress.audio.load(path, 16_000)
print(tuple(sound.samples.shape), f"samples, {sound.seconds:g} s, {sound.source_rate} Hz -> {sound.sample_rate} Hz")

# %% [markdown]
# ## A model that hears
#
# `WhisperForConditionalGeneration` with two small layers and random weights, which will write nonsense; what happens to the
# sound is what happens in a trained one. Its encoder gives 50 states a second, 1500 in all, since a window is always 30 s.

# %%
torch.manual_seed(0)
small = dict(d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
             encoder_ffn_dim=128, decoder_ffn_dim=128, vocab_size=200, decoder_start_token_id=1, bos_token_id=1, eos_token_id=2,
             pad_token_id=0, begin_suppress_tokens=None, num_mel_bins=80)
model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**small)).eval()
extractor = transformers.WhisperFeatureExtractor()
inputs = extractor(sound.samples.numpy(), sampling_rate=sound.sample_rate, return_tensors="pt")

w = mmcompress.wrap(model, audio=SpectralPool(keep=0.2))
model.generate(**inputs, max_new_tokens=8)
print(w.report)

# %% [markdown]
# The recording and the silence behind it give up the same share. Every token that is left stands for a tenth of a second,
# whatever is to be heard there:

# %%
w.plot(sound)

# %% [markdown]
# `w.last.spans` has the same as numbers, in seconds. `remove()` gives the stock model back.

# %%
print(w.last.spans[0][:4])
print(w.remove() is model)

# %% [markdown]
# ## What pooling by frequencies keeps
#
# `SpectralPool` transforms the tokens along time (DCT-II), keeps the k lowest frequencies and transforms back to k tokens.
# Tokens that change slowly enough are carried over **exactly**, at k places instead of n. Averages of neighbours damp them.
#
# Here one feature of 200 tokens is a sum of cosines with fewer half-waves than the 40 tokens that are left. The right answer is
# known in closed form: the same cosines at 40 places.

# %%
def cosines(n):
    at = (torch.arange(n) + 0.5) / n
    return sum(a * torch.cos(math.pi * f * at) for f, a in ((0, 0.5), (3, 1.0), (17, 0.6), (31, 0.4)))


def pool(reducer, values):
    """One feature (n,) through a reducer. -> (k,)"""
    return reducer(Tokens(values[None, :, None], AudioLayout(len(values), 25.0))).tokens[0, :, 0]


n, k = 200, 40
for reducer in (SpectralPool(keep=k), MeanPool(keep=k)):
    print(f"{type(reducer).__name__:12} largest error {(pool(reducer, cosines(n)) - cosines(k)).abs().max():.1e}")

# %% [markdown]
# Why a DCT and not the DFT of the paper (Rippel, Snoek and Adams, 2015)? A recording does not end where it begins. The DFT
# takes it for a circle, so that a ramp has a jump at its ends, which rings; the DCT mirrors it there.

# %%
ramp = torch.linspace(0, 1, n)


def compare(signals):
    fig = new_figure(9, 3)
    places = {"dct": (torch.arange(k) + 0.5) * n / k - 0.5, "dft": torch.arange(k) * n / k}
    for ax, (title, values) in zip(fig.subplots(1, 2), signals.items()):
        ax.plot(torch.arange(n), values, color="#20242b", linewidth=1, label=f"{n} tokens")
        for (basis, at), color in zip(places.items(), ("#e4572e", "#1f6fb2")):
            pooled = pool(SpectralPool(keep=k, basis=basis), values)
            ax.plot(at, pooled, "o", color=color, markersize=3.5, label=f"{basis}, {k} tokens")
        ax.set_title(title, loc="left", fontsize=10.5)
        ax.set_xlabel("token", fontsize=8)
        quiet(ax)
    ax.legend(frameon=False, fontsize=8.5)
    fig.tight_layout()
    return fig


compare({"slow waves": cosines(n), "a ramp": ramp})

# %% [markdown]
# ## What others keep
#
# `SilencePrune` drops pauses and thins out the rest; `EnergyPrune` keeps the loudest tokens. Both go by the mean of a token's
# log-mel bins, to which a hiss over all bands adds more than a tone in a few. They were made for speech: here the middle of
# the chord passes for a pause.

# %%
def listen(**config):
    """The handle of one call."""
    with mmcompress.wrap(model, **config) as w:
        model.generate(**inputs, max_new_tokens=2)
        return w


listen(audio=SilencePrune(keep=0.1, change=0)).plot(sound)

# %%
listen(audio=EnergyPrune(keep=0.1)).plot(sound)

# %% [markdown]
# ## A budget that follows the sound
#
# `AdaptiveSpectralPool` pools by frequencies segment by segment. A segment gets a further token as long as it has more left
# above its cut than the others: where the sound changes tokens are dense, where it stays as it is they are not. Nothing is
# dropped, and the count is exact.
#
# The states of a random encoder say more of their place than of the sound, so the tokens are log-mel frames here, 25 a second.

# %%
frames = inputs["input_features"][..., :100 * seconds].unflatten(-1, (-1, 4)).mean(-1).transpose(1, 2)         # (1, 250, 80)
layout = AudioLayout(frames.shape[1], 25.0)
pooled = AdaptiveSpectralPool(keep=0.2)(Tokens(frames, layout))
plot_spans(sound, Item("audio", 0, layout, pooled.index[0], pooled.source[0], pooled.mass[0]))

# %% [markdown]
# ## One budget for several recordings
#
# `budget=` is what all recordings of a prompt may cost together. It is divided by how much each has to say: the tokens that the
# ones before do not say already. Here the four parts of the sound are four recordings in one prompt of a tiny Qwen2-Audio.

# %%
vocabulary = dict(vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
tower = transformers.Qwen2AudioEncoderConfig(d_model=64, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=96,
                                             num_mel_bins=80)
torch.manual_seed(0)
chat = transformers.Qwen2AudioForConditionalGeneration(transformers.Qwen2AudioConfig(
    audio_config=tower, text_config=transformers.Qwen2Config(**vocabulary), audio_token_index=99)).eval()

parts = {"siren": (0.2, 2), "clicks": (3.3, 5.1), "chord": (6.1, 7.9), "hiss": (8.6, 9.8)}
samples = [mmcompress.audio.load(path, 16_000, start=a, end=b).samples.numpy() for a, b in parts.values()]
mel = extractor(samples, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
tokens = [((int(frames) - 1) // 2 - 1) // 2 + 1 for frames in mel["attention_mask"].sum(-1)]
ids = torch.tensor([[1, *(id for n in tokens for id in [*[99] * n, 5])]])

with mmcompress.wrap(chat, audio=SpectralPool(), budget=0.25) as w:
    chat(input_ids=ids, attention_mask=torch.ones_like(ids), input_features=mel["input_features"],
         feature_attention_mask=mel["attention_mask"])
for name, item in zip(parts, w.last):
    print(f"{name:8} {item.before} -> {item.after} tokens ({item.after / item.before:.0%})")
print(f"together {sum(i.before for i in w.last)} -> {sum(i.after for i in w.last)}")

# %% [markdown]
# ## A real checkpoint
#
# The same line wraps a trained model. These cells are text, since they fetch weights:
#
# ```python
# from transformers import AutoProcessor, WhisperForConditionalGeneration
#
# processor = AutoProcessor.from_pretrained("openai/whisper-small.en")
# model = WhisperForConditionalGeneration.from_pretrained("openai/whisper-small.en")
# sound = mmcompress.audio.load("talk.mp3", 16_000)
# inputs = processor(audio=sound.samples.numpy(), sampling_rate=16_000, return_tensors="pt", truncation=False,
#                    padding="longest", return_attention_mask=True)               # longer than 30 s: several windows
#
# w = mmcompress.wrap(model, audio="adaptive_spectral_pool")
# ids = model.generate(**inputs, return_timestamps=True)
# print(processor.decode(ids[0], skip_special_tokens=True), w.report)
# ```
#
# ```python
# from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration
#
# processor = AutoProcessor.from_pretrained("Qwen/Qwen2-Audio-7B-Instruct")
# model = Qwen2AudioForConditionalGeneration.from_pretrained("Qwen/Qwen2-Audio-7B-Instruct", dtype="auto", device_map="auto")
# w = mmcompress.wrap(model, audio={"name": "adaptive_spectral_pool", "keep": 0.25})
# ```
#
# On the command line: `mmcompress run --model openai/whisper-tiny.en --audio talk.mp3 --plot spans.png`.
