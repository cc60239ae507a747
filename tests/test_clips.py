"""Clips: what the story says against what the pixels show, answers against a table of frames, weights, batches, accuracy."""

import hashlib
import random
import re
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from mmcompress import pico
from mmcompress.config import WrapConfig
from mmcompress.eval import CONTROLS, clip_questions, evaluate_clips, wilson
from mmcompress.pico import clips, video
from mmcompress.tokens import KeepAll
from mmcompress.train import clips as train_clips
from mmcompress.train import data, loop, model
from mmcompress.train.recipe import Recipe

CONFIGS = Path(__file__).parents[1] / "configs"
IMAGE_WEIGHTS = "bfa33aee013720b1b60644f6de0032634c94d848fb1264aee06ea0084ce9a2f2"      # of model.safetensors of 0.2.0
SMOKE = 0.7                  # share of 60 questions; 0.86 of 500 are right, and guessing gets 0.3 at most
CHANCE = {"order": 0.42, "count": 0.37, "change": 0.15}     # what a guess gets at most


@pytest.fixture(scope="module")
def loaded():
    return pico.load_video()


@pytest.fixture(scope="module")
def stories():
    """Stories of many clips, with lengths, without their pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "_drawn", lambda *_: None)
        return [clips.clip(random.Random(i), frames)[1] for i in range(600) for frames in (8, 16, 31)]


def table(story):
    """What is seen, frame by frame: shape -> colour."""
    out = []
    for frame in range(story.frames):
        shown = [c for c in story.cards if c.came <= frame and not (c.left is not None and frame >= c.left)]
        out.append({c.shape: c.then if c.turned is not None and frame >= c.turned else c.color for c in shown})
    return out


def events(frames):
    """(frame, what, shape, colour before, colour after) of all that differs between neighbouring frames of a table."""
    out = []
    for t, (a, b) in enumerate(pairwise(frames), 1):
        out += [(t, "came", s, None, b[s]) for s in b if s not in a]
        out += [(t, "leave", s, a[s], None) for s in a if s not in b]
        out += [(t, "turn", s, a[s], b[s]) for s in a if s in b and a[s] != b[s]]
    return out


def answer(question, frames):
    """The answer, from the table alone."""
    seen = events(frames)
    came = [(t, colour) for t, what, _, _, colour in seen if what == "came"]
    [(changed_at, what, shape, before, _)] = [e for e in seen if e[1] != "came"]
    if m := re.fullmatch(r"which card came first, (\w+) or (\w+)\?", question):
        return min((t, c) for t, c in came if c in m.groups())[1]
    if question == "which card came last?":
        return max(came)[1]
    if m := re.fullmatch(r"did the (\w+) card come before the change\?", question):
        return "yes" if dict((c, t) for t, c in came)[m[1]] < changed_at else "no"
    if m := re.fullmatch(r"how many cards are there at the (start|end)\?", question):
        return str(len(frames[0 if m[1] == "start" else -1]))
    if m := re.fullmatch(r"what color is the (\w+) at the end\?", question):
        return frames[-1][m[1]]
    if m := re.fullmatch(r"what color is the (\w+) before the change\?", question):
        assert m[1] == shape
        return before
    kind = {"which card left?": ("leave", before), "what shape is on the card that left?": ("leave", shape),
            "what shape is on the card that changed color?": ("turn", shape)}[question]
    assert kind[0] == what
    return kind[1]


# the clips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [clips.clip, clips.still])
def test_a_clip_is_a_function_of_its_generator(draw):
    before, numpys = random.getstate(), np.random.get_state()[1].copy()
    (a, one), (b, two), (c, three) = (draw(random.Random(seed), 12) for seed in (1, 1, 2))
    assert np.array_equal(a, b) and one == two
    assert not np.array_equal(a, c) and one != three
    assert random.getstate() == before and np.array_equal(np.random.get_state()[1], numpys)
    assert a.shape == (12, 168, 168, 3) and a.dtype == np.uint8


def test_one_change_a_clip_and_one_or_two_cards_that_come(stories):
    for story in stories:
        seen = events(table(story))
        kinds = Counter(e[1] for e in seen)
        assert kinds["turn"] + kinds["leave"] == 1 and 1 <= kinds["came"] <= 2
        times = sorted(e[0] for e in seen)
        gap = max(2, round(0.16 * story.frames))
        assert times[0] >= gap and times[-1] <= story.frames - gap and all(b - a >= gap for a, b in pairwise(times))
        assert story.change == next((e[1], e[0]) for e in seen if e[1] != "came")
        assert [c.came for c in story.late] == sorted(e[0] for e in seen if e[1] == "came")
        ever = [c for card in story.cards for c in (card.color, card.then) if c]
        assert len(set(ever)) == len(ever) and len({c.shape for c in story.cards}) == len(story.cards) <= 5
    share = sum(s.change[0] == "turn" for s in stories) / len(stories)
    assert 0.45 < share < 0.55


@pytest.mark.parametrize("seed", range(6))
def test_the_pixels_show_the_story(seed):
    """A card's plate is read off every frame, at two corners inside of it; it has the colour the story says, or none."""
    pixels, story = clips.clip(random.Random(seed), 16)
    palette = np.array(list(clips.COLORS.values()), float)
    for frame, seen in enumerate(table(story)):
        for card in story.cards:
            x, y = (round(v) for v in card.corner_at(frame))
            spots = [pixels[frame, y + dy:y + dy + 3, x + dx:x + dx + 3].reshape(-1, 3).astype(float).mean(0)
                     for dx, dy in ((4, 4), (card.side - 7, 4))]
            far = [np.abs(palette - s).max(1) for s in spots]
            if card.shape in seen:
                wanted = list(clips.COLORS).index(seen[card.shape])
                assert max(f[wanted] for f in far) < 22, (frame, card)         # tint 15, noise of nine pixels
            else:
                assert max(np.abs(s - clips.COLORS[card.color]).max() for s in spots) > 22, (frame, card)


def test_frames_differ_by_noise_alone_where_nothing_happens():
    pixels, _ = clips.still(random.Random(0), 10)
    step = np.diff(pixels.astype(float), axis=0)
    inside = (pixels[1:] > 20) & (pixels[1:] < 235) & (pixels[:-1] > 20) & (pixels[:-1] < 235)
    assert all(np.any(d) for d in step)
    assert step[inside].std() == pytest.approx(clips.NOISE * 2**0.5, rel=0.05)
    assert np.abs(step).max() < 12 * clips.NOISE


def test_cards_move_straight_at_constant_speed(stories):
    movers = [c for s in stories for c in s.cards if c.begin != c.end]
    assert len(movers) > 200
    for card in movers[:200]:
        first, last = card.moves
        assert card.corner_at(0) == card.corner_at(first) == card.begin and card.corner_at(last) == card.end
        ways = np.diff([card.corner_at(t) for t in range(first, last + 1)], axis=0)
        assert np.allclose(ways, ways[0])
    for story in stories:                                                       # and never into each other
        for frame in range(0, story.frames, 3):
            boxes = [(*c.corner_at(frame), c.side) for c in story.cards]
            for i, (x, y, side) in enumerate(boxes):
                assert x >= 0 and y >= 0 and max(x, y) + side <= 168
                assert all(x + side < u or u + s < x or y + side < v or v + s < y for u, v, s in boxes[:i])


def test_answers_follow_from_the_frames(stories):
    asked = Counter()
    for i, story in enumerate(stories):
        frames = table(story)
        for kind, question, said in clips.questions(random.Random(i), story, 6):
            assert answer(question, frames) == said, (question, story)
            assert len(said.split()) == 1 and said == said.lower()
            asked[kind] += 1
    assert set(asked) == set(clips.KINDS) and min(asked.values()) > 0.3 * asked.total()


def test_dense_tasks_follow_from_the_frames(stories):
    for i, story in enumerate(stories[::7]):
        frames = table(story)
        _, rows = clips.lookup(random.Random(i), story, "shape")
        assert {s for s, _ in rows} > {s for f in frames for s in f}
        for shape, wanted in rows:
            assert wanted == f"{frames[0].get(shape, 'no')} {frames[-1].get(shape, 'no')}"
        _, rows = clips.lookup(random.Random(i), story, "color")
        assert sorted(c for c, _ in rows) == sorted({c for f in frames for c in f.values()})
        for color, wanted in rows:
            [shape] = {s for f in frames for s, c in f.items() if c == color}
            assert wanted == f"{shape} " + " ".join("yes" if color in f.values() else "no" for f in (frames[0], frames[-1]))
        parts = clips.transcript(story)[1].split("; ")
        start = [p for p in parts if p.split()[0] not in ("came", "left", "change")]
        assert {tuple(reversed(p.split())) for p in start} == set(frames[0].items())
        said = [p.replace("came ", "").replace("left ", "").replace("change ", "") for p in parts[len(start):]]
        assert said == [" ".join(x for x in (before or after, shape, after if before else None) if x)
                        for _, _, shape, before, after in events(frames)]


def test_guessing_is_poor(stories):
    """Whoever knows how often each answer is given to a question, and which of two named cards, but sees nothing."""
    said = defaultdict(Counter)
    names = {*clips.COLORS, *clips.SHAPES}
    for i, story in enumerate(stories):
        for kind, question, right in clips.questions(random.Random(i), story, 4):
            named = [w.strip(",?") for w in question.split() if w.strip(",?") in names]
            asked = " ".join(w for w in question.split() if w.strip(",?") not in names)
            said[kind, asked][named.index(right) if right in named else right] += 1
    for kind, most in CHANCE.items():
        counts = [c for (k, _), c in said.items() if k == kind]
        assert sum(c.most_common(1)[0][1] for c in counts) / sum(c.total() for c in counts) < most, kind


def test_what_cannot_be_drawn_or_asked_is_refused():
    rng = random.Random(0)
    with pytest.raises(ValueError, match=r"frames=7: .* 8 or more"):
        clips.clip(rng, 7)
    with pytest.raises(ValueError, match="84 x 168 pixels does not hold five cards"):
        clips.still(rng, 8, 84, 168)
    _, story = clips.still(rng, 8)
    assert story.change is None and story.changed is None and not story.late and len(set(map(str, table(story)))) == 1
    with pytest.raises(ValueError, match="still clip has no change"):
        clips.questions(rng, story, 1)


def test_a_sheet_shows_every_frame():
    pixels, _ = clips.clip(random.Random(0), 9)
    sheet = np.asarray(clips.sheet(pixels, columns=4))
    assert sheet.shape == (3 * 170, 4 * 170, 3)
    assert np.array_equal(sheet[340:340 + 168, :168], pixels[8])


# the weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_small_and_the_image_model_is_as_it_was():
    files = {p.name: p for p in pico.WEIGHTS.iterdir()}
    assert files["video.safetensors"].stat().st_size <= 7.5e6 and sum(p.stat().st_size for p in files.values()) < 30e6
    assert hashlib.sha256(files["model.safetensors"].read_bytes()).hexdigest() == IMAGE_WEIGHTS
    loaded, processor = pico.load()
    assert type(loaded).__name__ == "LlavaNextForConditionalGeneration" and len(processor.tokenizer) == 591


def test_the_tower_is_shared_and_the_rest_differs(loaded):
    image, _ = pico.load()
    start, _ = video.build(trained=False)
    ours, base, theirs = (dict(m.state_dict()) for m in (loaded[0], start, image))
    assert set(ours) == set(base) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(base[name][:len(tensor)], tensor)
        if "vision_tower" in name or "newline" in name:
            assert torch.equal(ours[name], tensor) or "newline" in name
    assert not torch.equal(ours["model.language_model.layers.0.self_attn.q_proj.weight"],
                           base["model.language_model.layers.0.self_attn.q_proj.weight"])
    assert loaded[0].lm_head.weight is loaded[0].get_input_embeddings().weight


def test_without_the_differences_it_is_the_image_model():
    """On a picture, bit for bit: the pooled way and the new token touch nothing else."""
    image, images = pico.load()
    start, both = video.build(trained=False)
    _, picture, _ = pico.scenes.scene(random.Random(0), 168, 336, kind="cards")
    inputs = images(images=picture, text=pico.prompt("how many cards are there?"), return_tensors="pt")
    same = both(images=picture, text=pico.prompt("how many cards are there?"), return_tensors="pt")
    assert torch.equal(inputs["input_ids"], same["input_ids"]) and torch.equal(inputs["pixel_values"], same["pixel_values"])
    with torch.inference_mode():
        assert torch.equal(image(**inputs).logits, start(**same).logits[..., :591])


def test_differences_are_kept_up_to_half_a_step():
    torch.manual_seed(0)
    before = {"w": torch.randn(5, 300), "n": torch.randn(300), "same": torch.randn(4, 4), video.EMBEDDINGS: torch.randn(6, 8),
              "zero": torch.randn(3, 7)}
    before[video.TIED] = before[video.EMBEDDINGS]
    after = {k: v + 1e-2 * torch.randn_like(v) for k, v in before.items()}
    after["same"] = before["same"]
    after["zero"] = before["zero"].clone()
    after["zero"][1] += 0.5                                                     # rows without any difference stay exact
    packed = video.difference(before, after)
    assert packed["w"].dtype == torch.int8 and "same" not in packed and video.TIED not in packed
    got = video.apply(before, packed)
    for name in ("w", "zero", video.EMBEDDINGS):
        step = (after[name] - before[name]).abs().amax(1, keepdim=True) / 127
        assert ((got[name] - after[name]).abs() <= 0.51 * step + 1e-6).all()
    assert torch.allclose(got["n"], after["n"], atol=2e-4) and got[video.TIED] is got[video.EMBEDDINGS]
    assert torch.equal(got["same"], before["same"]) and torch.equal(got["zero"][0], before["zero"][0])


def test_weights_that_are_missing_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(video, "VIDEO", tmp_path / "video.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no weights at .*video.safetensors; reinstall"):
        pico.load_video()


# the model ------------------------------------------------------------------------------------------------------------


def test_the_processor_counts_and_lays_out(loaded):
    loaded_model, processor = loaded
    pixels, _ = clips.clip(random.Random(0), 9)
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "which card left?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
            {"role": "user", "content": [{"type": "text", "text": "how many cards are there at the end?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == pico.prompt("which card left?", "how many cards are there at the end?", answers=("red",), images=0, videos=1)
    inputs = processor(videos=[pixels], text=text, return_tensors="pt")
    assert int((inputs["input_ids"] == loaded_model.config.video_token_id).sum()) == 9 * 36
    assert inputs["pixel_values_videos"].shape == (1, 9, 3, 168, 168)
    picture = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.allclose(inputs["pixel_values_videos"][0], picture, atol=1e-6)


def test_it_answers():
    rows = {r.kind: r for r in evaluate_clips(*pico.load_video(dtype=torch.bfloat16), {"all tokens": None}, 60, seed="smoke",
                                              batch=10, progress=False)}
    assert rows["all"].accuracy > SMOKE
    assert rows["all"].hits == sum(rows[k].hits for k in clips.KINDS) and rows["all"].n == 60
    assert rows["all"].tokens_before == rows["all"].tokens_after == 16 * 36
    assert (rows["all"].low, rows["all"].high) == wilson(rows["all"].hits, 60)


def test_teacher_forcing_agrees_with_generation(loaded):
    loaded_model, processor = loaded
    for show in (None, CONTROLS["gray frames"]):
        [row] = [r for r in evaluate_clips(*loaded, {"a": None}, 4, seed="smoke", frames=8, show=show, progress=False)
                 if r.kind == "all"]
        for q, right in zip(clip_questions(4, "smoke", 8), row.right):
            frames = q.image if show is None else show(q.image)
            inputs = processor(videos=[frames], text=pico.prompt(q.question, images=0, videos=1), return_tensors="pt")
            out = loaded_model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
            assert (processor.decode(out, skip_special_tokens=True).strip() == q.answer) == right


def test_controls_replace_frames():
    frames = np.arange(8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    shown = {name: show(frames)[:, 0, 0, 0].tolist() for name, show in CONTROLS.items()}
    assert shown["first frame"] == [0] * 8 and shown["last frame"] == [7] * 8
    assert shown["first and last frame"] == [0] * 4 + [7] * 4 and shown["gray frames"] == [127] * 8
    assert shown["reversed frames"] == list(range(8))[::-1]
    assert sorted(shown["shuffled frames"]) == list(range(8)) != shown["shuffled frames"]
    orders = [CONTROLS["shuffled frames"](frames * k)[:, 0, 0, 0] // k for k in range(1, 21)]      # of twenty clips
    assert len({tuple(o) for o in orders}) > 15
    assert abs(np.mean([np.corrcoef(o, range(8))[0, 1] for o in orders])) < 0.3


def test_each_clip_is_encoded_once_for_all_configurations(loaded, monkeypatch):
    calls, stock = [], type(loaded[0].model).get_video_features

    def encode(self, *args, **kwargs):
        calls.append(len(kwargs["pixel_values_videos"]))
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(type(loaded[0].model), "get_video_features", encode)
    rows = evaluate_clips(*loaded, {"a": None, "b@x": WrapConfig(video=KeepAll())}, 3, frames=8, batch=2, progress=False)
    assert calls == [2, 1]
    assert [r.method for r in rows if r.kind == "all"] == ["a", "b"]
    assert rows[0].right == next(r for r in rows if r.method == "b").right
    with pytest.raises(ValueError, match="n=0"):
        evaluate_clips(*loaded, {"a": None}, 0)


def test_questions_depend_on_seed_and_number_alone():
    said = lambda some: [(q.question, q.answer, q.kind, q.image.tobytes()) for q in some]  # noqa: E731
    few, more, other = (said(clip_questions(n, seed, 8)) for n, seed in ((2, "a"), (4, "a"), (2, "b")))
    assert few == more[:2] and not set(few) & set(other)


# training -------------------------------------------------------------------------------------------------------------


RECIPE = {"steps": 2, "batch": 1, "init": "pico-video", "attention": "eager", "freeze": ["vision_tower"],
          "data": {"world": "clips", "clips": {"frames": [8], "weights": [1]}, "mix": {"turns": 4}},
          "heads": {"cls": 0, "cells": 0}, "eval": {"every": 0, "n": 2, "batch": 2}, "log_every": 1}


@pytest.fixture(scope="module")
def stream(loaded):
    """Training batches of clips and pictures."""
    geometry = data.Geometry.of(loaded[0].config)
    how = train_clips.Clips((8, 9), (1, 1), pictures=0.5)
    return train_clips.ClipBatches(how, loaded[1].tokenizer, geometry, 2, "a", canvases=((168, 336),), mix=data.Mix(turns=3))


def test_a_batch_depends_on_seed_rank_and_number_alone(stream):
    def fresh(**changes):
        other = object.__new__(train_clips.ClipBatches)
        other.__dict__.update({**vars(stream), "known": {}, **changes})
        return other

    same = lambda a, b: list(a.inputs) == list(b.inputs) and all(  # noqa: E731
        x.shape == y.shape and torch.equal(x, y) for x, y in zip(a.inputs.values(), b.inputs.values()))
    drawn = [stream[i] for i in range(8)]
    assert [same(fresh()[i], drawn[i]) for i in (5, 2)] == [True] * 2
    for other in (fresh(seed="b"), fresh(rank=1)):
        assert not any(same(other[i], b) for i, b in enumerate(drawn) if "frames" in b.inputs)
    clipped = [b for b in drawn if "frames" in b.inputs]
    assert 0 < len(clipped) < 8 and all("pictures" in b.inputs for b in drawn if "frames" not in b.inputs)
    assert {b.inputs["frames"].shape[1] for b in clipped} == {8, 9}
    assert all(b.canvas.tokens == 36 * b.inputs["frames"].shape[1] for b in clipped)


def test_training_sees_what_the_processor_makes(loaded):
    """One question a clip, as in evaluation: ids, pixels and labels are the processor's and the answer's."""
    loaded_model, processor = loaded
    recipe = Recipe.from_dict(RECIPE)
    stream = train_clips.ClipBatches(recipe.data.clips, processor.tokenizer, data.Geometry.of(loaded_model.config), 2, "eval")
    batch = stream[0]
    learner = model.Learner(loaded_model, recipe)
    inputs = learner.inputs(batch)
    assert inputs["pixel_values_videos"].shape == (2, 16, 3, 168, 168)
    for row, question in enumerate(batch.questions):
        labels = inputs["labels"][row]
        answer = processor.tokenizer.decode(labels[labels != -100]).strip()
        made = processor(videos=[batch.inputs["frames"][row].numpy()], return_tensors="pt",
                         text=pico.prompt(question, images=0, videos=1) + f" {answer}")
        ids = inputs["input_ids"][row, :int(inputs["attention_mask"][row].sum())]
        assert answer.endswith("</s>") and torch.equal(ids, made["input_ids"][0])
        assert torch.allclose(inputs["pixel_values_videos"][row], made["pixel_values_videos"][0], atol=1e-6)
    loaded_model.requires_grad_(True).eval()


def test_labels_are_the_answers_and_what_is_looked_up(stream):
    tok, seen = stream.tokenizer, Counter()
    for number in range(12):
        inputs = stream[number].inputs
        if "frames" not in inputs:
            continue
        for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"]):
            assert torch.equal(labels[labels != -100], ids[labels != -100]) and (labels[mask == 0] == -100).all()
            text = tok.decode(ids[mask == 1].tolist()).replace("<video>", "").removeprefix("<s>")
            wanted = []
            for question, answer in (t.partition(" ASSISTANT:")[::2] for t in text.split("USER: ")[1:]):
                seen[" ".join(question.split()[:2])] += 1
                if "look up" in question:
                    answer = "".join(" " + " ".join(part.split()[1:]) + ";" for part in answer.split(";")[:-1]) + "</s>"
                wanted.append(answer)
            assert tok.decode(labels[labels != -100].tolist()) == "".join(wanted)
    assert seen["look up"] and seen["describe the"]


def test_a_run_trains_all_but_the_tower_and_its_export_loads(tmp_path, monkeypatch):
    recipe = Recipe.from_dict({**RECIPE, "optim": {"lr": 1e-3, "warmup": 0}})
    result = loop.train(recipe, tmp_path / "run", progress=False)
    assert result["steps"] == 2 and result["eval"][0]["n"] == 2
    size = video.export(tmp_path / "run" / "model", tmp_path / "video.safetensors")
    assert size == (tmp_path / "video.safetensors").stat().st_size < 7.5e6
    monkeypatch.setattr(video, "VIDEO", tmp_path / "video.safetensors")
    again, _ = pico.load_video()
    base, _ = video.build(trained=False)
    trained, _ = model.load(replace(recipe, init=str(tmp_path / "run" / "model")))
    moved = 0
    for (name, a), b, c in zip(again.named_parameters(), base.parameters(), trained.parameters()):
        assert torch.equal(a, b) or "vision_tower" not in name
        moved += not torch.equal(a, b)
        row = (c - b).abs().amax(-1, keepdim=True) if c.ndim > 1 else (c - b).abs()
        assert ((a - c).abs() <= row / 250 + 1e-7).all(), name
    assert moved > 70 and torch.equal(base.model.image_newline, again.model.image_newline)


def test_recipes_for_clips_are_checked():
    for change, message in (({"heads": {"cls": 1, "cells": 0}}, "data.world=clips: give an init"),
                            ({"schedule": "llavolta-4stage"}, "data.world=clips"),
                            ({"data": {"world": "clips", "clips": {"frames": [4], "weights": [1]}}}, "8 frames or more"),
                            ({"data": {"world": "clips", "clips": {"frames": [8], "weights": [0]}}}, "none below 0"),
                            ({"data": {"world": "clips", "clips": {"pictures": 1.0}}}, r"pictures=1.0: a share")):
        with pytest.raises(ValueError, match=message):
            Recipe.from_dict({**RECIPE, **change})
    for name in ("pico-clips", "pico-clips-asking"):
        recipe = Recipe.load(CONFIGS / f"{name}.yaml")
        assert Recipe.from_dict(recipe.to_dict()) == recipe and recipe.data.world == "clips"
