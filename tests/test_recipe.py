"""Training recipes: the stream of batches, labels, pixels, resuming, and the command."""

import json
import random
from dataclasses import replace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmcompress
from mmcompress.cli import app
from mmcompress.pico import scenes
from mmcompress.train import asking, blocks, data, loop, model, optim, plots, record
from mmcompress.train.recipe import Recipe

TINY = """
steps: 6
batch: 2
precision: fp32
model:
  tile: 56
  patch: 14
  vocabulary: 400
  vision: {width: 16, layers: 2, heads: 1, mlp: 16}
  text: {width: 16, layers: 2, heads: 2, kv_heads: 1, mlp: 16}
data: {world: blocks, canvases: [[56, 112], [112, 56]], weights: [1, 1], odd: 0.3}
optim: {lr: 1e-2, warmup: 2}
eval: {every: 4, n: 8, batch: 4}
log_every: 1
save_every: 3
"""


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path / "tiny.yaml"


@pytest.fixture(scope="module")
def stream():
    """Training batches of blocks with the tokenizer made for them."""
    tokenizer = model.build_tokenizer(blocks, 400)
    return data.Batches("blocks", tokenizer, data.Geometry(((168, 168), (84, 168)), 84, 14), 6, "a", canvases=((168, 168),),
                        odd=0.5, mix=data.Mix(turns=3))


def same(a, b):
    """Whether two batches are equal in every part."""
    tensors = lambda x: [*x.inputs.values(), x.tiles, x.cells]  # noqa: E731
    return (a.canvas, a.questions, list(a.inputs)) == (b.canvas, b.questions, list(b.inputs)) and all(
        torch.equal(x, y) for x, y in zip(tensors(a), tensors(b)))


def test_a_batch_depends_on_seed_rank_and_number_alone(stream):
    variant = lambda **k: _changed(stream, **k)  # noqa: E731
    ahead = stream[7]
    assert same(variant()[3], stream[3]) and same(stream[7], ahead)            # whatever was drawn before
    for other in (stream[4], variant(seed="b")[3], variant(rank=1)[3]):
        assert not same(stream[3], other)
    state = random.getstate()
    assert [same(x, stream[i]) for i, x in zip((5, 6, 7), torch.utils.data.DataLoader(
        stream, batch_size=None, sampler=range(5, 8), num_workers=2))] == [True] * 3
    assert random.getstate() == state                                          # and draws nothing from anyone else


def _changed(stream, **changes):
    other = object.__new__(data.Batches)
    other.__dict__.update({**vars(stream), "known": {}, **changes})
    return other


def test_labels_are_the_answers_and_nothing_else(stream):
    tok, lookups = stream.tokenizer, 0
    for number in range(4):
        inputs = stream[number].inputs
        for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"]):
            assert torch.equal(labels[labels != -100], ids[labels != -100])
            assert (labels[mask == 0] == -100).all() and (ids[mask == 0] == tok.pad_token_id).all()
            text = tok.decode(ids[mask == 1].tolist()).replace("<image>", "")
            turns = [t.partition(" ASSISTANT:")[::2] for t in text.removeprefix("<s>").split("USER: ")[1:]]
            wanted = []
            for question, answer in turns:
                assert answer.endswith("</s>")
                if "look up" in question:                                       # each object's first word is given
                    lookups += 1
                    wanted += [" ".join(part.split()[1:]) + ";" for part in answer.removesuffix("</s>").split(";")[:-1]]
                else:
                    wanted.append(answer.removesuffix("</s>").strip())
            said = tok.decode(labels[labels != -100].tolist()).replace("</s>", " ")
            assert said.replace(";", "; ").split() == " ".join(wanted).replace(";", "; ").split()
    assert lookups > 3


def test_single_questions_have_the_right_answer_and_the_canvas_its_placeholders(stream):
    batch = _changed(stream, mix=None)[0]
    tok = stream.tokenizer
    rng = random.Random("a/0/0")
    rng.choices(stream.canvases, stream.weights)
    for row, question in enumerate(batch.questions):
        kind, image, objects = blocks.scene(rng, 168, 168)
        [(asked, answer)] = blocks.questions(rng, kind, objects, 1)
        labels = batch.inputs["labels"][row]
        assert asked == question and tok.decode(labels[labels != -100].tolist()) == f" {answer}</s>"
        assert (batch.inputs["input_ids"][row] == tok.convert_tokens_to_ids("<image>")).sum() == 36 + 12 * 13
        assert (batch.inputs["pictures"][row].numpy() == image).all()


@pytest.mark.parametrize("size", [(336, 336), (168, 504), (300, 200), (150, 411), (520, 190)])
def test_pixels_and_placeholders_are_the_processors(pico, size):
    processor = pico[1]
    geometry = data.Geometry.of(pico[0].config)
    _, image, objects = scenes.scene(random.Random(str(size)), *size, "cards")
    canvas = data.canvas_of(size, geometry)
    want = processor(images=image, text=mmcompress.pico.prompt("?"), return_tensors="pt")
    got = data.pixel_values(torch.from_numpy(data.place(canvas, image, objects).copy())[None], canvas, 168)
    assert got.shape == want["pixel_values"].shape
    error = (got - want["pixel_values"]).abs()
    if size in geometry.pinpoints:
        assert error[:, 1:].max() < 1e-6 and error.max() < 1.01 / 127.5         # the thumbnail: one level of 255
    else:                                                   # resized by Pillow here, by torchvision there
        assert error.mean() < 1e-3 and error.max() < 0.2
    assert canvas.tokens == (want["input_ids"] == pico[0].config.image_token_id).sum()


def test_patches_know_what_they_show():
    _, image, objects = blocks.scene(random.Random(4), 112, 112)
    cells = blocks.cell_labels(objects, 8, 8, 14)
    names = list(blocks.COLORS)
    assert (cells[..., 0] > 0).sum() == 9 * len(objects) and ((cells[..., 0] > 0) == (cells[..., 1] > 0)).all()
    for row, column in zip(*cells[..., 0].nonzero()):
        patch = torch.tensor(list(image.crop((column * 14, row * 14, column * 14 + 14, row * 14 + 14)).getdata())).float()
        if patch.min() > 245:                               # inside the white shape
            continue
        distance = [(patch - torch.tensor(blocks.COLORS[n])).norm(dim=1).min() for n in names]
        assert names[int(torch.tensor(distance).argmin())] == names[cells[row, column, 0] - 1]


STAGES = "[{until: 2, layer: 1, stride: 4}, {until: 0.8, layer: 1, stride: 2}, {until: 1.0, layer: 0, stride: 1}]"


@pytest.mark.parametrize("change", ["optim.name=adamw", "optim.name=muon", f"schedule={STAGES}"])
def test_a_killed_run_goes_on_bit_for_bit(tiny, tmp_path, monkeypatch, change):
    recipe = Recipe.load(tiny, [change])
    whole = loop.train(recipe, tmp_path / "whole", progress=False)
    step = loop.Run._step

    def killed(self, batch):
        if self.step == 5:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(loop.Run, "_step", killed)
        loop.train(recipe, tmp_path / "killed", progress=False)
    assert torch.load(tmp_path / "killed/state.pt", weights_only=True)["step"] == 3
    again = loop.train(replace(recipe, log_every=1), tmp_path / "killed", resume=True, progress=False)
    states = [torch.load(tmp_path / n / "state.pt", weights_only=True) for n in ("whole", "killed")]
    assert _equal(*[{k: s[k] for k in ("step", "counts", "learner", "staged", "optimizers")} for s in states])
    rows = [[{k: v for k, v in r.items() if "seconds" not in k} for r in record.read_log(tmp_path / n / "log.jsonl")]
            for n in ("whole", "killed")]
    assert rows[0] == rows[1] and [r["step"] for r in rows[0] if r["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    timeless = lambda rows: [{k: v for k, v in r.items() if "seconds" not in k} for r in rows]  # noqa: E731
    assert timeless(again["eval"]) == timeless(whole["eval"]) == [{k: v for k, v in r.items() if k != "event"}
                                                                  for r in rows[0] if r["event"] == "eval" and r["step"] == 6]


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(_equal, a, b)) if isinstance(a, (list, tuple)) else a == b


def test_a_schedule_lowers_what_the_language_model_computes(tiny, tmp_path):
    plain, staged = Recipe.load(tiny), Recipe.load(tiny, [f"schedule={STAGES}"])
    a, b = loop.train(plain, tmp_path / "a", progress=False), loop.train(staged, tmp_path / "b", progress=False)
    assert a["tokens"] == b["tokens"] and a["stages"] == []
    assert b["image_tokens"] < 0.9 * a["image_tokens"] and b["flops"] < 0.9 * a["flops"]
    steps = [[r for r in record.read_log(tmp_path / n / "log.jsonl") if r["event"] == "step"] for n in "ab"]
    assert [s["steps"] for s in b["stages"]] == [2, 3, 1] and len({r["stage"] for r in steps[1]}) == 3
    last = [s[-1]["flops"] - s[-2]["flops"] for s in steps]
    assert last[0] == last[1] > 0                           # the last stage reduces nothing


def test_consistency_draws_its_budget_from_the_step(tiny, tmp_path, monkeypatch):
    from mmcompress.train import losses

    kept, stock = [], losses.consistency

    def spy(*args, image, **options):
        kept.append(image.keep)
        return stock(*args, image=image, **options)

    monkeypatch.setattr(losses, "consistency", spy)
    recipe = Recipe.load(tiny, ["heads={cls: 0, cells: 0}", "consistency={keep: [0.2, 0.4, 0.6], kl: 0.5}",
                                "freeze=[vision_tower, projector, newline]"])
    before = {n: p.clone() for n, p in model.load(recipe)[0].named_parameters()}
    loop.train(recipe, tmp_path / "a", progress=False)
    first, kept[:] = list(kept), []
    loop.train(recipe, tmp_path / "b", progress=False)
    assert kept == first and len(set(kept)) > 1 and set(kept) <= {0.2, 0.4, 0.6}
    row = record.read_log(tmp_path / "a/log.jsonl")[0]
    assert row["loss"] == pytest.approx(row["lm"] + row["reduced"] + 0.5 * row["kl"], rel=1e-5) and row["kl"] > 0
    after = torch.load(tmp_path / "a/state.pt", weights_only=True)["learner"]
    moved = {n for n, p in before.items() if not torch.equal(p, after[f"model.{n}"])}
    assert moved and all("language_model" in n for n in moved)


def test_the_loss_is_the_stock_models_and_falls(tiny, tmp_path):
    recipe = Recipe.load(tiny, ["steps=40", "batch=4", "data.odd=0", "optim.lr=0.02", "log_every=40"])
    loaded, processor = model.load(recipe)
    learner = model.Learner(loaded, recipe)
    batch = data.Batches("blocks", processor.tokenizer, data.Geometry.of(loaded.config), 4, "a", mix=recipe.data.mix)[0]
    with torch.no_grad():
        logits = loaded(**learner.inputs(batch)).logits
        losses = learner(batch)
    labels = batch.inputs["labels"]
    chosen = labels[:, 1:] != -100
    want = -logits[:, :-1].log_softmax(-1)[chosen].gather(1, labels[:, 1:][chosen][:, None]).mean()
    assert losses["lm"].item() == pytest.approx(want.item(), rel=1e-5)
    assert losses["loss"].item() == pytest.approx(sum(
        losses[k].item() * w for k, w in (("lm", 1.0), ("cls", 2.0), ("cells", 1.0))), rel=1e-5)
    loop.train(recipe, tmp_path / "out", progress=False)
    rows = [r for r in record.read_log(tmp_path / "out/log.jsonl") if r["event"] == "step"]
    assert rows[-1]["lm"] < 0.7 * rows[0]["lm"]


def test_the_saved_model_loads_and_answers_as_the_run_measured(tiny, tmp_path):
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

    recipe = Recipe.load(tiny, ["steps=2"])
    loop.train(recipe, tmp_path / "out", progress=False)
    processor = LlavaNextProcessor.from_pretrained(tmp_path / "out/model")
    loaded = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out/model").eval()
    batch = data.Batches("blocks", processor.tokenizer, data.Geometry.of(loaded.config), 1, "eval")[0]
    image = Image.fromarray(batch.inputs["pictures"][0].numpy())
    made = processor(images=image, text=mmcompress.pico.prompt(batch.questions[0]), return_tensors="pt")
    length = made["input_ids"].shape[1]
    assert torch.equal(made["input_ids"], batch.inputs["input_ids"][:, :length])
    learner = model.Learner(loaded, recipe)
    learner.load_state_dict(torch.load(tmp_path / "out/state.pt", weights_only=True)["learner"])
    again = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out/model").eval()
    assert all(torch.equal(p, q) for p, q in zip(learner.model.parameters(), again.parameters()))
    assert again.generate(**made, max_new_tokens=2, do_sample=False).shape[1] > length


def test_exact_answers_are_counted(tiny):
    recipe = Recipe.load(tiny)
    loaded, processor = model.load(recipe)
    learner = model.Learner(loaded, recipe)
    batches = data.Batches("blocks", processor.tokenizer, data.Geometry.of(loaded.config), 4, "eval")
    seen = iter([batches[i].inputs["labels"] for i in (0, 2)])

    def oracle(**inputs):                                   # right but for the first prompt of each batch
        labels = next(seen).clone()
        labels[0][labels[0] != -100] = 0
        keep = inputs["logits_to_keep"]
        wanted = torch.cat([labels[:, 1:], labels[:, :1]], 1)[:, -keep:].clamp_min(0)
        return type("Out", (), {"logits": torch.nn.functional.one_hot(wanted, 400).float()})

    learner.model.forward = oracle
    outcomes = asking.ask(learner, batches, (0, 2))
    assert [hit for _, hit in outcomes] == [False, True, True, True] * 2
    [total, *kinds] = asking.summarize(outcomes)
    assert (total["hits"], total["n"]) == (6, 8) and total["low"] < 0.75 < total["high"]
    assert sum(r["n"] for r in kinds) == 8
    assert data.question_kind("what shape is on the red card?", scenes) == "what shape is on the card"
    assert data.question_kind("shape of red?", blocks) == "shape of"


def test_muon_takes_the_maps_between_hidden_states_alone(tiny):
    recipe = Recipe.load(tiny, ["optim.name=muon", "freeze=[projector]"])
    learner = model.Learner(model.load(recipe)[0], recipe)
    adamw, muon = optim.build_optimizers(learner, recipe.optim)
    names = {id(p): n for n, p in learner.named_parameters()}
    mapped = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    assert all(".layers." in n and n.endswith(".weight") for n in mapped) and len(mapped) == 2 * 6 + 2 * 7
    held = [id(p) for o in (adamw, muon) for g in o.param_groups for p in g["params"]]
    assert len(held) == len(set(held)) and not any("projector" in names[i] for i in held)
    assert all(p.ndim > 1 or g["weight_decay"] == 0 for g in adamw.param_groups for p in g["params"])


def test_rate_warms_up_and_ends_at_the_floor():
    how = optim.Optim(warmup=10, floor=0.1)
    rates = [optim.rate(i, 100, how) for i in range(101)]
    assert rates[0] == pytest.approx(0.1, abs=1e-3) and max(rates) == rates[9] and rates[100] == pytest.approx(0.1)


@pytest.mark.parametrize("change,word", [
    ("steps=0", "steps=0"), ("optim.name=sgd", "'adamw' or 'muon'"), ("optim.lr=fast", "optim.lr='fast'"),
    ("optim.speed=1", "no key optim.speed; there are optim.name"), ("stesp=3", "no key stesp"),
    ("freeze=[tower]", "vision_tower"), ("data.canvases=[[56, 50]]", "1 canvases and 2 weights"), ("freeze=newline", "a list"),
    ("data.canvases=[[56, 50], [56, 56]]", "multiples of model.tile=56"),
    ("data.world=mars", "blocks"), ("data.mix.lookup=1.5", "sum to 1"), ("init=pico", "not both"),
    ("model=null", "from scratch"),
    ("precision=int8", "bf16"), ("consistency.keep=[0.1, 1.5]", "keep=1.5"), ("consistency.keep=[0.1]", "heads.cls"),
    ("batch=two", "batch='two'"), ("batch", "key=value"), ("steps.a=1", "has no keys"), ("model.vision.layers=1", "layers=1"),
])
def test_recipes_are_checked_before_anything_is_built(tiny, change, word):
    with pytest.raises(ValueError) as e:
        Recipe.load(tiny, [change])
    assert word in str(e.value)


def test_recipes_survive_plain_data(tiny):
    recipe = Recipe.load(tiny)
    assert recipe.optim.lr == 1e-2 and Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("name", ["pico", "pico-llavolta", "pico-small", "pico-consistency"])
def test_shipped_recipes_are_valid(name, request):
    assert Recipe.load(request.config.rootpath / "configs" / f"{name}.yaml").steps > 100


def test_a_folder_is_not_overwritten_nor_mixed_up(tiny, tmp_path):
    recipe = Recipe.load(tiny, ["steps=1"])
    loop.train(recipe, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="--resume"):
        loop.train(recipe, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match=r"optim.lr \(0.01 then, 0.5 now\)"):
        loop.train(Recipe.load(tiny, ["steps=1", "optim.lr=0.5"]), tmp_path / "out", resume=True, progress=False)


def test_the_command_leaves_log_checkpoint_plot_and_model(tiny, tmp_path):
    runner, out = CliRunner(), tmp_path / "run"
    result = runner.invoke(app, ["train", str(tiny), "--out", str(out), "--set", "steps=2", "--json"])
    assert result.exit_code == 0, result.stderr
    got = json.loads(result.stdout)
    assert got["steps"] == 2 and [r["kind"] for r in got["eval"]][0] == "all" and got["eval"][0]["n"] == 8
    assert Image.open(out / "training.png").format == "PNG" and (out / "state.pt").stat().st_size > 10_000
    assert len(record.read_log(out / "log.jsonl")) == 2 + len(got["eval"]) and (out / "model/config.json").is_file()
    shown = runner.invoke(app, ["train", str(tiny), "--out", str(out), "--set", "steps=2", "--resume"])
    assert shown.exit_code == 0 and "2 steps" in shown.stdout
    wrong = runner.invoke(app, ["train", str(tiny), "--out", str(out), "--set", "steps=many"])
    assert wrong.exit_code == 2 and "steps='many'" in wrong.stderr


def test_plots_need_rows():
    with pytest.raises(ValueError, match=r"log\.jsonl"):
        plots.plot_training({"empty": []})
