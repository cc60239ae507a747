"""`mmcompress run` and `viz` on video files, as a user types them."""

import json
import random

import av
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmcompress
from mmcompress import asking, cli
from mmcompress.checkpoint import chat, load
from mmcompress.pico import clips, video

FRAMES, RATE, CELLS = 16, 8, 36                                             # of the file; tokens of a frame
QUESTION = "which card came last?"
runner = CliRunner()


def call(*args):
    return runner.invoke(cli.app, [str(a) for a in args])


def output(*args):
    """What a command prints with --json: one object and nothing else."""
    result = call(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a clip, a picture, and a LLaVA-NeXT-Video checkpoint: pico before it was trained on clips."""
    folder = tmp_path_factory.mktemp("files")
    pixels, _ = clips.clip(random.Random(3), FRAMES)
    encode(folder / "clip.mp4", pixels)
    Image.fromarray(pixels[0]).resize((336, 168)).save(folder / "picture.png")
    for part in video.build(trained=False):
        part.save_pretrained(folder / "model")
    return folder


def encode(path, pixels):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in pixels:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))


def ask(files, *more, model=None):
    return ("run", "--model", model or files / "model", "--prompt", QUESTION, "--max-new-tokens", "2", *more)


def counts(got):
    return [(i["modality"], i["tokens_before"], i["tokens_after"]) for i in got["report"]["items"]]


def test_run_answers_as_the_stock_model_does(files):
    model, processor = load(str(files / "model"), "cpu", "auto", "sdpa")
    clip = mmcompress.video.read(files / "clip.mp4", frames=8)
    inputs = processor(videos=[clip.frames], video_metadata=[clip.metadata()], do_sample_frames=False, return_tensors="pt",
                       text=mmcompress.pico.prompt(QUESTION, images=0, videos=1))
    ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    got = output(*ask(files, "--video", files / "clip.mp4", "--frames", 8, "--video-reducer", "evs", "--keep", "1.0"))
    assert got["answer"] == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert counts(got) == [("video", 8 * CELLS, 8 * CELLS)] and got["report"]["prompt_before"] == inputs["input_ids"].shape[1]


def test_run_says_what_was_read_and_what_was_saved(files, tmp_path):
    got = output(*ask(files, "--video", files / "clip.mp4", "--fps", 4, "--start", 0.5, "--end", 1.5, "--keep", 50, "--plot",
                      tmp_path / "new" / "strip.png"))
    assert got["clip"]["timestamps"] == [0.5, 0.75, 1.0, 1.25] and got["clip"]["frames"] == 4
    assert {k: got["clip"][k] for k in ("start", "end", "fps", "height", "width")} == {
        "start": 0.5, "end": 1.5, "fps": RATE, "height": 168, "width": 168}
    assert counts(got) == [("video", 4 * CELLS, 50)] and sum(got["report"]["items"][0]["frames"]) == 50
    assert got["report"]["reducer"] == "SpatioTemporalMerge(keep=50)"
    assert got["report"]["prompt_before"] - got["report"]["prompt_after"] == 4 * CELLS - 50
    strip = Image.open(got["plot"])
    assert strip.format == "PNG" and strip.size[0] > 800


def test_run_in_words(files, tmp_path):
    result = call(*ask(files, "--video", files / "clip.mp4", "--frames", 4, "--video-reducer", "dycoke", "--option",
                       "rate=0.5"))
    assert result.exit_code == 0, result.stderr
    assert "rate=0.5" in result.stdout and f"{4 * CELLS} -> {CELLS + 3 * CELLS // 2} tokens" in result.stdout


@pytest.mark.parametrize("more,want", [
    (("--image-reducer", "uniform", "--video-reducer", "evs", "--keep", "60"), {"image": 60, "video": 60}),
    (("--image-reducer", "uniform", "--video-reducer", "{name: evs, keep: 40}", "--keep", "60"), {"image": 60, "video": 40}),
    (("--video-reducer", "{name: evs, keep: 40}"), {"image": 444, "video": 40}),
    (("--keep", "0.5"), {"image": 222, "video": 72}),
    (("--config", "config.yaml"), {"image": 444, "video": 70}),
])
def test_a_picture_and_a_clip_in_one_question(files, tmp_path, monkeypatch, more, want):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("video: {name: uniform_frames, keep: 70}\n")
    got = output(*ask(files, "--video", files / "clip.mp4", "--frames", 4, "--image", files / "picture.png", *more))
    assert [(kind, after) for kind, _, after in counts(got)] == list(want.items())


def test_run_reduces_inside_the_language_model(files):
    got = output(*ask(files, "--video", files / "clip.mp4", "--frames", 4, "--layers", "{name: fastv, layer: 2, keep: 0.5}"))
    assert counts(got) == [("video", 4 * CELLS, 4 * CELLS)] and got["report"]["layers"][0]["tokens"] == 2 * CELLS


def test_pico_reads_clips(files):
    got = output(*ask(files, "--video", files / "clip.mp4", "--frames", 16, model="pico"))
    assert got["answer"] in clips.COLORS and counts(got) == [("video", FRAMES * CELLS, FRAMES * CELLS // 4)]


def test_pico_is_the_one_that_reads_clips(files, monkeypatch):
    asked = []
    monkeypatch.setattr(mmcompress.pico, "load_video", lambda *a, **k: asked.append(a) or video.build(trained=False))
    output("viz", "--video", files / "clip.mp4", "--frames", 2, "--out", files / "viz.png")
    assert len(asked) == 1
    output("viz", "--image", files / "picture.png", "--out", files / "viz.png")
    assert len(asked) == 1


def test_viz(files, tmp_path):
    got = output("viz", "--video", files / "clip.mp4", "--model", files / "model", "--out", tmp_path / "strip.png", "--method",
                 "uniform_frames", "--keep", CELLS)
    assert (got["tokens_before"], got["tokens_after"], got["clip"]["frames"]) == (FRAMES * CELLS, CELLS, FRAMES)
    assert got["reducer"] == f"UniformFrames(keep={CELLS})"
    pixels = np.asarray(Image.open(tmp_path / "strip.png").convert("RGB"))
    assert pixels.shape[1] > 1000 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_seconds_are_not_rounded_with_the_pixels(files, monkeypatch):
    """A bf16 model takes bf16 pixels; what else the processor gives keeps its dtype."""
    model, processor = load(str(files / "model"), "cpu", "bfloat16", "sdpa")

    def with_seconds(**given):
        return {**processor(**given), "second_per_grid_ts": torch.tensor([0.999])}

    with_seconds.chat_template, with_seconds.apply_chat_template = processor.chat_template, processor.apply_chat_template
    shown = asking.open_shown([], files / "clip.mp4", frames=2)
    inputs = asking.inputs_of(model, with_seconds, shown, QUESTION)
    assert inputs["pixel_values_videos"].dtype == torch.bfloat16 and inputs["input_ids"].dtype == torch.int64
    assert inputs["second_per_grid_ts"].dtype == torch.float32


def test_the_prompt_of_a_clip(files):
    _, processor = load(str(files / "model"), "cpu", "auto", "sdpa")
    assert chat(processor, "why?", 2, 1) == "<s>USER: <image>\n<image>\n<video>\nwhy? ASSISTANT:"
    processor.chat_template = None
    assert chat(processor, "why?", 1, 1) == "<image>\n<video>\nwhy?"


def one_line(result, word):
    assert result.exit_code == 2 and result.stdout == "", (result.exit_code, result.stdout)
    assert word in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize("more,word", [
    ((), "--image FILE, --video FILE or both"), (("--video", "lost.mp4"), "lost.mp4 does not exist"),
    (("--video", "broken.mp4"), "broken.mp4"), (("--video", "picture.png"), "not a video"),
    (("--video", "clip.mp4", "--frames", "3", "--fps", "2"), "pass one of them"),
    (("--video", "clip.mp4", "--start", "9"), "2.000 s"),
    (("--image", "picture.png", "--fps", "3"), "--fps without --video"),
    (("--image", "picture.png", "--video-reducer", "evs"), "without --video"),
    (("--video", "clip.mp4", "--image-reducer", "uniform"), "without --image"),
    (("--video", "clip.mp4", "--video-reducer", "globalcom2"), "known: "),
    (("--video", "clip.mp4", "--keep", "1.5"), "keep=1.5"),
    (("--video", "clip.mp4", "--video-reducer", "{name: evs"), "not valid YAML"),
    (("--video", "clip.mp4", "--video-reducer", "{name: evs}", "--keep", "0.5"), "given by name"),
    (("--video", "clip.mp4", "--image", "picture.png", "--option", "seed=1"), "Write them as YAML"),
    (("--video", "clip.mp4", "--config", "config.yaml", "--video-reducer", "evs"), "not both"),
])
def test_user_errors_are_one_line(files, monkeypatch, more, word):
    monkeypatch.chdir(files)
    (files / "broken.mp4").write_bytes((files / "clip.mp4").read_bytes()[:2000])
    one_line(call(*ask(files, *more)), word)


def test_a_model_that_reads_pictures_only(files):
    one_line(call(*ask(files, "--video", files / "clip.mp4", model=mmcompress.pico.WEIGHTS)), "reads no clips")


@pytest.mark.parametrize("more,word", [((), "--video FILE"),
                                       (("--image", "picture.png", "--video", "clip.mp4"), "one of them")])
def test_viz_draws_one(files, monkeypatch, more, word):
    monkeypatch.chdir(files)
    one_line(call("viz", "--out", "out.png", *more), word)


def test_list_shows_video_reducers_whole():
    shown = call("list").stdout
    assert "slot: video" in shown and "spatio_temporal_merge" in shown and "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
