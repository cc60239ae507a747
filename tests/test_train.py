"""Schedules and what attaches them: the published table, pure functions of the step, resume, accumulation, processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import IMAGE, llava_next, make_inputs
from transformers import LlavaNextForConditionalGeneration, TrainerCallback

import mmcompress
from mmcompress.image import GlobalRank, Uniform
from mmcompress.layers import FastV, InLayer, PyramidDrop, StagePool
from mmcompress.train import PRESETS, Schedule, Stage, StagedCompression, answer_kl, consistency

SCHEDULE = [{"until": 0.25, "layer": 1, "stride": 8}, {"until": 0.5, "layer": 1, "stride": 2},
            {"until": 0.75, "layer": 2, "stride": 2}, {"until": 1.0}]


# schedules ------------------------------------------------------------------------------------------------------------


def test_the_published_table():
    """LLaVolta's script: layers 2,2,16,0, strides 8,2,2,1, pivots 1300,2600,3900; compression ratios as the paper has them."""
    four = PRESETS["llavolta-4stage"]
    assert [(s.layer, s.stride) for s in four.stages] == [(2, 8), (2, 2), (16, 2), (0, 1)]
    assert four.boundaries(5197) == [1300, 2600, 3900, 5197] and four.depth == 32
    ratios = [s.compression_ratio() for s in four.stages]
    assert [round(100 * r) for r in ratios] == [557, 188, 133, 100]             # N=32, L=576; the paper cuts 556.5 to 556
    assert ratios[0] == 32 * 576 / (30 * 72 + 2 * 576)
    [heavy], [light] = PRESETS["llavolta-heavy"].stages, PRESETS["llavolta-light"].stages
    assert (heavy.layer, heavy.stride, light.layer, light.stride) == (2, 8, 16, 8)
    assert round(100 * light.compression_ratio()) == 178
    small = four.for_depth(8)
    assert [s.layer for s in small.stages] == [1, 1, 4, 0] and four.for_depth(32) is four


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_lie_in_configs_as_yaml(name):
    file = Path(__file__).parent.parent / "configs" / f"{name}.yaml"
    loaded = Schedule.build(str(file))
    for total in (100, 1000, 5197):
        assert loaded.boundaries(total) == PRESETS[name].boundaries(total)
    assert loaded.depth == 32
    assert [(s.layer, s.stride) for s in loaded.stages] == [(s.layer, s.stride) for s in PRESETS[name].stages]


@settings(deadline=None)
@given(st.integers(4, 10000), st.data())
def test_a_schedule_is_a_pure_function_of_the_step(total, data):
    schedule = Schedule.build(SCHEDULE)
    step = data.draw(st.integers(0, total - 1))
    number = schedule.number(step, total)
    assert schedule.at(step, total) is schedule.stages[number]
    ends = [0, *schedule.boundaries(total)]
    assert ends[number] <= step < ends[number + 1] and schedule.number(total + 5, total) == 3


def test_any_reducer_may_be_a_stage():
    configs = [Stage(1.0, layer=2, keep=0.5, method="fastv").config, Stage(1.0, keep=0.25, method="global_rank").config,
               Stage(1.0, layer=3, keep=0.25, method="global_rank").config, Stage(1.0, stride=4).config,
               Stage(1.0, method=PyramidDrop(((1, 0.5),))).config, Stage(1.0, method={"name": "uniform", "keep": 0.3}).config,
               Stage(1.0, method={"name": "pyramid_drop", "stages": [[1, 0.5]]}).config,
               Stage(1.0, method=Uniform(keep=9)).config]
    assert configs[0].layers == (FastV(2, 0.5),) and configs[1].image == GlobalRank(keep=0.25)
    assert configs[2].layers == (InLayer(3, GlobalRank(keep=0.25)),) and configs[3].positions == "original"
    assert configs[3].image.stride == 4 and configs[4].layers == configs[6].layers
    assert configs[5].image == Uniform(keep=0.3) and configs[7].image == Uniform(keep=9)
    assert Stage(1.0, layer=4, stride=3).config.layers == (StagePool(4, 3),)
    assert not Stage(1.0).reduces and not Stage(1.0, layer=5, stride=1).reduces and Stage(1.0, stride=2).reduces
    assert Stage(1.0, layer=2, keep=0.5, method="fastv").compression_ratio(4, 100) == 400 / 300
    assert Stage(1.0, keep=0.25, method="uniform").compression_ratio(4, 100) == 4
    schedule = Schedule((Stage(5, layer=2, keep=0.5, method="fastv"), Stage(1.0, method=Uniform(keep=9))))
    assert Schedule.build(json.loads(json.dumps(schedule.to_dict()))).to_dict() == schedule.to_dict()


@pytest.mark.parametrize("make,words", [
    (lambda: Stage(0), "until=0"), (lambda: Stage(1.5), "until=1.5"), (lambda: Stage(1.0, layer=-1), "layer=-1"),
    (lambda: Stage(1.0, stride=2, keep=0.5), "a stage has one of them"), (lambda: Stage(1.0, keep=0.5), "pools by a stride"),
    (lambda: Stage(1.0, stride=2, method="fastv"), "belongs to stage_pool"), (lambda: Stage(1.0, stride=0), "stride=0"),
    (lambda: Stage(1.0, keep=0.5, method="nope"), "no image reducer named 'nope'"),
    (lambda: Schedule(()), "one stage at least"), (lambda: Schedule((Stage(0.5), Stage(0.25))), "must end after"),
    (lambda: Schedule.build("nowhere.yaml"), "llavolta-heavy"), (lambda: Schedule.build([{"layer": 2}]), "say where it ends"),
    (lambda: Schedule.build([{"until": 1.0, "pace": 2}]), "no pace"), (lambda: Schedule.build(5), "schedule=5"),
    (lambda: Schedule((Stage(50), Stage(0.1))).boundaries(100), "must end after"),
    (lambda: StagedCompression("llavolta-heavy").attach(None), "total"),
    (lambda: StagedCompression("llavolta-heavy", total=3).step(), "nothing is attached"),
])
def test_errors_say_what_to_do(make, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        make()


# attaching ------------------------------------------------------------------------------------------------------------


def batch_of(model, seed=0, rows=None):
    rows = rows or [[(48, 48)], [(30, 70), (100, 40)], []]
    inputs = make_inputs(model, rows, "right", seed=seed)
    inputs["labels"] = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
    return inputs


def test_stages_of_a_plain_loop_and_what_they_cost():
    """Each stage's loss is that of a model wrapped with its reducer; evaluation sees all tokens; detaching leaves nothing."""
    model = llava_next(depth=4).train()
    batch = batch_of(model)
    staged = StagedCompression(SCHEDULE, total=8).attach(model)
    losses = []
    for _ in range(8):
        losses.append(float(model(**batch).loss))
        staged.step()
    model.eval()
    evaluated = float(model(**batch).loss)
    staged.detach()
    stock = float(model(**batch).loss)
    expected = []
    for reducer in (StagePool(1, 8), StagePool(1, 2), StagePool(2, 2)):
        with mmcompress.wrap(model, layers=[reducer]) as w:
            expected += [float(w(**batch).loss)] * 2
    assert losses == [*expected, stock, stock] and evaluated == stock
    assert "forward" not in model.__dict__ and not any(m._forward_pre_hooks for m in model.modules())
    summary = staged.summary()
    tokens = 192 + 126 + 148
    assert [s["steps"] for s in summary] == [2] * 4 and [s["until"] for s in summary] == [2, 4, 6, 8]
    assert all(s["pictures"] == 6 and s["tokens_before"] == 2 * tokens for s in summary)
    pooled = 192 // 8 + -(-126 // 8) + -(-148 // 8)
    assert summary[0]["tokens_after"] == 2 * (tokens + 3 * pooled) / 4 and summary[3]["tokens_after"] == 2 * tokens
    assert summary[0]["flops_after"] < summary[1]["flops_after"] < summary[2]["flops_after"] < summary[3]["flops_after"]
    assert summary[3]["flops_after"] == summary[0]["flops_before"] and summary[3]["label"] == "no compression"


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_fit_a_shallower_model(name):
    model = llava_next(depth=4).train()
    staged = StagedCompression(name, total=4).attach(model)
    first = {"llavolta-4stage": StagePool(1, 8), "llavolta-heavy": StagePool(1, 8), "llavolta-light": StagePool(2, 8)}[name]
    assert staged.handle.config.layers == (first,)
    model(**batch_of(model)).loss.backward()
    staged.detach()


def test_accelerate_counts_optimizer_steps_and_saves_its_state(tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
    model = llava_next(depth=4).train()
    tuned, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    staged = StagedCompression(SCHEDULE, total=4).attach(tuned, accelerator)
    batch, seen = batch_of(model, rows=[[(48, 48)]]), []
    for i in range(12):
        with accelerator.accumulate(tuned):
            accelerator.backward(tuned(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(staged.stage.label())
            staged.step()
        if i == 9:                                               # within an accumulation
            accelerator.save_state(tmp_path)
    a, b, c = "StagePool(layer=1, stride=8)", "StagePool(layer=1, stride=2)", "StagePool(layer=2, stride=2)"
    assert seen == [a] * 4 + [b] * 4 + [c] * 4
    accelerator.load_state(tmp_path)
    assert staged.count == 2 and staged.stage.label() == c
    other = StagedCompression("llavolta-heavy", total=4)
    with pytest.raises(ValueError, match="trained under another schedule"):
        other.load_state_dict(staged.state_dict())
    staged.detach()


class Data(torch.utils.data.Dataset):
    def __init__(self, model, rows=32):
        self.items = []
        for i in range(rows):
            one = batch_of(model, seed=i, rows=[[(48, 48)]] if i % 4 else [[]])
            self.items.append({k: v[0] for k, v in one.items()})

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def collate(items):
    """Right padding; rows with and without pictures."""
    pad = lambda key, value: torch.nn.utils.rnn.pad_sequence([i[key] for i in items], True, value)  # noqa: E731
    out = {"input_ids": pad("input_ids", 0), "attention_mask": pad("attention_mask", 0), "labels": pad("labels", -100)}
    if pictures := [i for i in items if "pixel_values" in i]:
        out |= {k: torch.stack([i[k] for i in pictures]) for k in ("pixel_values", "image_sizes")}
    return out


def trainer(folder, callbacks, model=None, **options):
    from transformers import Trainer, TrainingArguments
    model = model or llava_next(depth=4)
    data = Data(model)
    options = {"max_steps": 8, "per_device_train_batch_size": 4, "save_strategy": "no", **options}
    arguments = TrainingArguments(output_dir=str(folder), learning_rate=1e-2, report_to=[], use_cpu=True, seed=3,
                                  disable_tqdm=True, logging_steps=1, dataloader_num_workers=0, **options)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=[data[1], data[2]], data_collator=collate,
                   callbacks=callbacks)


class Stages(TrainerCallback):
    """Notes the stage of every micro-batch, and stops a run dead."""

    def __init__(self, staged, dies_at=None):
        self.staged, self.dies_at, self.seen = staged, dies_at, []

    def on_substep_end(self, args, state, control, **kwargs):
        self.seen.append(self.staged._number)

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append(self.staged._number)
        if state.global_step == self.dies_at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("dies_at", [1, 3, 5, 7])                 # one in the middle of each stage
def test_a_killed_training_goes_on_bit_for_bit(tmp_path, dies_at):
    whole = trainer(tmp_path / "whole", [StagedCompression(SCHEDULE)])
    whole.train()
    staged = StagedCompression(SCHEDULE)
    broken = trainer(tmp_path / "broken", [staged, Stages(staged, dies_at)], save_strategy="steps", save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    again, saved = StagedCompression(SCHEDULE), tmp_path / "broken" / f"checkpoint-{dies_at}"
    options = {"save_strategy": "steps", "save_steps": 1}
    resumed = trainer(tmp_path / "broken", [again], LlavaNextForConditionalGeneration.from_pretrained(saved), **options)
    resumed.train(resume_from_checkpoint=True)
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(a, b), name
    assert [s["steps"] for s in again.summary()] == [2, 2, 2, 2]                  # what the first run had counted is not lost
    assert "forward" not in resumed.model.__dict__


def test_what_does_not_resume(tmp_path):
    """Another schedule; and weights that Trainer failed to load, which it only warns of."""
    trainer(tmp_path, [StagedCompression(SCHEDULE)], save_strategy="steps", save_steps=4).train()
    saved = tmp_path / "checkpoint-4"
    other = trainer(tmp_path, [StagedCompression("llavolta-heavy")], max_steps=10)
    with pytest.raises(ValueError, match="trained under another schedule"):
        other.train(resume_from_checkpoint=str(saved))
    names = {n for n, _ in LlavaNextForConditionalGeneration.from_pretrained(saved).named_parameters()}
    if not names & set(load_file(saved / "model.safetensors")):
        with pytest.raises(ValueError, match=r"did not load the weights .*from_pretrained"):
            trainer(tmp_path, [StagedCompression(SCHEDULE)]).train(resume_from_checkpoint=str(saved))


def test_accumulation_does_not_move_the_stages(tmp_path):
    """1 x 4 and 4 x 1 rows a step: the same stages, and the same weights but for the order of summation."""
    models, seen = [], []
    for size, times in ((4, 1), (1, 4)):
        staged = StagedCompression(SCHEDULE)
        notes = Stages(staged)
        run = trainer(tmp_path / str(times), [staged, notes], per_device_train_batch_size=size,
                      gradient_accumulation_steps=times)
        run.train()
        models.append(run.model)
        seen.append(notes.seen)
    assert seen[0] == [0, 0, 1, 1, 2, 2, 3, 3] and seen[1] == [s for s in seen[0] for _ in range(4)]
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-3)


def test_evaluation_in_the_middle_sees_all_tokens(tmp_path):
    """Evaluating changes neither stages nor weights, and its loss is the stock model's."""
    plain = trainer(tmp_path / "a", [StagedCompression(SCHEDULE)])
    plain.train()
    staged = StagedCompression(SCHEDULE)
    run = trainer(tmp_path / "b", [staged], eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2)
    lengths = []
    forward = type(run.model.model.language_model.layers[3]).forward
    layer = run.model.model.language_model.layers[3]
    layer.register_forward_pre_hook(lambda m, a: lengths.append((m.training, a[0].shape[1])))
    run.train()
    assert type(layer).forward is forward
    for a, b in zip(plain.model.parameters(), run.model.parameters()):
        assert torch.equal(a, b)
    trained = [n for training, n in lengths if training]
    whole = collate([run.eval_dataset[0], run.eval_dataset[1]])["input_ids"].shape[1]
    assert {n for training, n in lengths if not training} == {whole} and min(trained) < max(trained) / 3
    logged = [x["eval_loss"] for x in run.state.log_history if "eval_loss" in x]
    run.model.eval()
    stock = run.evaluate()["eval_loss"]
    assert len(logged) == 8 and abs(logged[-1] - stock) < 1e-6
    assert [x["compression_stage"] for x in run.state.log_history if "loss" in x][:2] == [0, 1]


def test_compress_eval_reduces_evaluation_too():
    model = llava_next(depth=4).eval()
    batch = batch_of(model, rows=[[(48, 48)]])
    staged = StagedCompression("llavolta-heavy", total=4, compress_eval=True).attach(model)
    assert model(**batch).logits.shape[1] == batch["input_ids"].shape[1] - 192 + 24
    staged.detach()


# processes ------------------------------------------------------------------------------------------------------------


WORKER = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from test_train import batch_of, SCHEDULE
from tiny import llava_next
from mmcompress.train import StagedCompression

kind, rank, world, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if world > 1:
    dist.init_process_group("gloo", init_method="file://" + out + ".store", rank=rank, world_size=world)
model = llava_next(depth=4).train()
wrapped = model
if kind == "ddp":
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
if kind == "fsdp":
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
staged = StagedCompression(SCHEDULE, total=4).attach(wrapped)
optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
rows = [[(48, 48)], [(30, 70)]]
for step in range(4):
    mine = range(2) if world == 1 else [rank]
    loss = sum(wrapped(**batch_of(model, seed=10 * step + r, rows=[rows[r]])).loss for r in mine) / len(list(mine))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    staged.step()
state = dict(model.named_parameters())
if kind == "fsdp":
    state = {{k: v.full_tensor() for k, v in state.items()}}
if rank == 0:
    torch.save({{k: v.detach().clone() for k, v in state.items()}}, out)
if world > 1:
    dist.barrier(); dist.destroy_process_group()
sys.stdout.flush(); sys.stderr.flush()
os._exit(0)                     # gloo's threads may outlive the interpreter's end, which then aborts
"""


def run_workers(tmp_path, kind, world):
    script = tmp_path / f"{kind}.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent)))
    out = tmp_path / f"{kind}.pt"
    started = [subprocess.Popen([sys.executable, str(script), kind, str(rank), str(world), str(out)], stderr=subprocess.PIPE)
               for rank in range(world)]
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()[-2000:]
    return torch.load(out)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one(tmp_path, kind):
    alone = run_workers(tmp_path, "alone", 1)
    both = run_workers(tmp_path, kind, 2)
    assert alone.keys() == both.keys()
    for name in alone:
        torch.testing.assert_close(both[name], alone[name], atol=1e-6, rtol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023


# consistency ----------------------------------------------------------------------------------------------------------


def test_consistency_is_the_divergence_at_the_answers():
    """Against two separate runs and a loop over answer tokens; the full run gets no gradient from it."""
    model = llava_next(depth=4).train()
    batch = batch_of(model)
    for options in ({"image": GlobalRank(keep=0.3)}, {"layers": [FastV(2, 0.3)]},
                    {"image": Uniform(keep=0.5), "layers": [StagePool(1, 3)]}):
        out = consistency(model, batch, **options, temperature=2.0)
        full = model(**batch)
        with mmcompress.wrap(model, **options) as w:
            reduced, prompt = w(**batch), w.prompt
        torch.testing.assert_close(out.full_loss, full.loss)
        torch.testing.assert_close(out.reduced_loss, reduced.loss)
        terms = []
        for b in range(len(batch["labels"])):
            for j, c in enumerate(prompt.column[b].tolist()):
                if c >= 0 and c + 1 < batch["labels"].shape[1] and batch["labels"][b, c + 1] != -100:
                    p, q = (full.logits[b, c] / 2).softmax(-1), (reduced.logits[b, j] / 2).softmax(-1)
                    terms.append((p * (p / q).log()).sum())
        torch.testing.assert_close(out.kl, 4 * torch.stack(terms).mean(), atol=1e-5, rtol=1e-4)
        assert out.full.logits.grad_fn is not None and out.kl > 0
        assert torch.autograd.grad(out.kl, out.full.logits, retain_graph=True, allow_unused=True)[0] is None
        assert torch.autograd.grad(out.kl, out.reduced.logits)[0].abs().sum() > 0
    assert "forward" not in model.__dict__


def test_consistency_encodes_once_and_vanishes_without_reduction(monkeypatch):
    model = llava_next(depth=4).train()
    batch, calls = batch_of(model), []
    tower = model.model.vision_tower
    handle = tower.register_forward_pre_hook(lambda *a: calls.append(1))
    out = consistency(model, batch, image=Uniform(keep=1.0))
    handle.remove()
    assert len(calls) == 1 and float(out.kl) == 0 and torch.equal(out.full_loss, out.reduced_loss)
    out.full_loss.backward()
    assert tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="needs labels"):
        consistency(model, {k: v for k, v in batch.items() if k != "labels"}, image=Uniform(keep=0.5))
    with pytest.raises(ValueError, match="temperature=0"):
        consistency(model, batch, image=Uniform(keep=0.5), temperature=0)


def test_answer_kl_closed_form():
    """Two Bernoulli-like distributions of known divergence."""
    target = torch.tensor([[[0.75, 0.25]], [[0.5, 0.5]]]).log()
    logits = torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]]]).log()
    said = torch.tensor([[True], [False]])
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    torch.testing.assert_close(answer_kl(target, logits, said), expected)
