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
# # Clips with fewer tokens
#
# Most of a video repeats itself. `mmcompress` merges what stays the same and keeps what changes, in a stock transformers
# model, and says where every token went. This notebook needs no GPU and no download: **pico** reads short clips too,
# sixteen frames of cards that come, move, change and leave.

# %%
import random
import tempfile
from pathlib import Path

import av
import torch

import mmcompress
from mmcompress import WrapConfig, pico
from mmcompress.adapters import adapter_for
from mmcompress.eval import evaluate_clips
from mmcompress.tokens import Tokens, VideoLayout
from mmcompress.video import EVS, FastVID, HoliTom, Random, SpatioTemporalMerge, StreamingReducer, UniformFrames

model, processor = pico.load_video()

# %% [markdown]
# ## A video file
#
# The clip is drawn from its seed, with the answers known, and written as an mp4 of eight frames a second.

# %%
pixels, story = pico.clips.clip(random.Random(3), frames=16)
path = Path(tempfile.mkdtemp()) / "cards.mp4"
with av.open(str(path), "w") as out:
    stream = out.add_stream("libx264", rate=8, options={"crf": "12"})
    stream.height, stream.width, stream.pix_fmt = 168, 168, "yuv420p"
    for picture in pixels:
        out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    out.mux(stream.encode(None))

# %% [markdown]
# `mmcompress.video.read` gives frames with their timestamps: so many of them, or `fps=2`, or a stretch by `start=` and
# `end=`. The first and the last frame of the stretch are among them.

# %%
clip = mmcompress.video.read(path, frames=16)
print(clip.frames.shape, clip.frames.dtype, f"{clip.fps:g} frames a second, {clip.duration:g} s, read by {clip.backend}")
print("seconds:", *clip.timestamps[:4], "...", clip.timestamps[-1])

# %%
pico.clips.sheet(clip.frames).reduce(2)

# %% [markdown]
# ## Questions that need time
#
# The processor takes the frames and what is known of the file; `do_sample_frames=False` keeps the frames that were read.

# %%
def inputs_for(question):
    return processor(videos=[clip.frames], video_metadata=[clip.metadata()], do_sample_frames=False, return_tensors="pt",
                     text=pico.prompt(question, images=0, videos=1))


def ask(question):
    inputs = inputs_for(question)
    ids = model.generate(**inputs, max_new_tokens=6)
    return processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()


answers = {question: answer for _, question, answer in pico.clips.questions(random.Random(0), story, 24)}
questions = list(answers.items())[:4]
for question, answer in questions:
    print(f"{question:48} {ask(question):8} (right: {answer})")

# %% [markdown]
# ## The same on a quarter of the tokens
#
# `SpatioTemporalMerge` lets every cell of a frame point to the earlier cell it resembles most. The most novel cells stay,
# all others join the token they point to. The budget is exact.

# %%
w = mmcompress.wrap(model, video=SpatioTemporalMerge(keep=0.25))
for question, answer in questions:
    print(f"{question:48} {ask(question):8} (right: {answer})")
print()
print(w.report)

# %% [markdown]
# The strip shows where each token went. A tinted cell was merged into the token that is outlined in its colour, so the
# background keeps the colour of the moment in which it was last seen anew.

# %%
w.plot(clip)

# %%
w.remove()
ask(questions[0][0])

# %% [markdown]
# ## A stream
#
# A camera never ends, so nothing can wait for the whole clip. `StreamingReducer` takes frames as they come, holds a fixed
# number of tokens, and at every moment they are the ones that the whole clip so far would have been reduced to.

# %%
with torch.inference_mode():
    features = adapter_for(model).encode_video(inputs_for("which card came last?"), [], []).features[0]
frames = features.view(1, 16, 36, -1)                                               # (clips, frames, cells, width)

stream = StreamingReducer(SpatioTemporalMerge(keep=72), grid=(6, 6))
for number, frame in enumerate(frames.unbind(1)):
    stream.push(frame)
    if number % 5 == 0:
        held = torch.bincount(stream.index[0] // 36, minlength=16)[:number + 1]
        print(f"after {number + 1:2} frames: {stream.tokens.shape[1]} tokens, by frame {held.tolist()}")

whole = SpatioTemporalMerge(keep=72)(Tokens(features[None], VideoLayout(16, (6, 6))))
print("the tokens that the whole clip is reduced to:", torch.equal(stream.index, whole.index))

# %% [markdown]
# ## Methods at one budget
#
# A tenth of the tokens, 24 fresh clips and questions, the same for every method; the whole answer has to be right.
# Twenty-four are few: the 95 % intervals are wide. `mmcompress.eval.evaluate_clips` with more of them measures.

# %%
methods = [SpatioTemporalMerge, HoliTom, FastVID, EVS, UniformFrames, Random]
reducers = {method.__name__: WrapConfig(video=method(keep=0.1)) for method in methods}
for row in evaluate_clips(model, processor, {"all tokens": None, **reducers}, n=24, progress=False):
    if row.kind == "all":
        print(f"{row.method:22} {row.tokens_after:4.0f} of {row.tokens_before:.0f} tokens   {row.accuracy:4.0%}   "
              f"[{row.low:.0%}, {row.high:.0%}]")
