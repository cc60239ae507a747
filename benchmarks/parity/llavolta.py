"""LLaVolta's visual context compressor beside its authors' code, `LlavaLlamaForCausalLM` with their `post_config`."""

from __future__ import annotations

import importlib
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .case import ANSWERS, CLOSE, IMAGE, TOKENS, Answer, Call, Case, largest
from .theirs import answer

TRAINING = 5197                                                     # optimizer steps of the fine-tuning, as in our preset


class HalfPool(TorchFunctionMode):
    """`avg_pool1d` of float16 on a CPU as a later torch has it, summed in float32 and rounded once; an old one has none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "avg_pool1d" and args[0].dtype == torch.float16:
            return func(args[0].float(), *args[1:], **(kwargs or {})).half()
        return func(*args, **(kwargs or {}))


def load(checkout: Path) -> Any:
    sys.path.insert(0, str(checkout))
    return importlib.import_module("llava.model.language_model.llava_llama")


def run(module: Any, job: Call, call: Call) -> Answer:
    if call["do"] == "stages":
        return {"stages": stages_of_calls(module, job["config"], call["ids"])}
    config = module.LlavaConfig(**job["config"])
    config._attn_implementation = call["attention"]
    model = module.LlavaLlamaForCausalLM(config)
    model.load_state_dict(job["weights"])
    model.train(call["do"] == "train")
    inner = model.model
    inner.vision_tower, inner.mm_projector = nn.Identity(), nn.Identity()
    ((layer, stride),) = call["stages"]
    model.post_config(SimpleNamespace(grouping="avgpool1d", layer=layer, stride=stride))
    if call["exact"]:
        stock = inner.visual_avg_pool1d
        inner.visual_avg_pool1d = lambda states, positions: (
            stock(states, positions)[0], nn.functional.avg_pool1d(positions.float(), stride, stride).squeeze(1))
    with HalfPool():
        found = answer(model, call, {"attention_mask": call["mask"], "images": call["images"]},
                       {"input_ids": call["ids"], "labels": call["labels"]}, {"inputs": call["ids"]})
    return {**found, "positions": inner.label_ids.expand(len(found["logits"]), -1)}


@torch.no_grad()
def stages_of_calls(module: Any, config: Call, ids: Tensor) -> list[tuple[int, ...]]:
    """(call, layer, stride) where a stage of train-4stage.sh begins: forward calls, from 0, of a model with one layer."""
    script = Path(module.__file__).parents[3] / "scripts/v1_5/train-4stage.sh"
    said = {name.lower(): [int(x) for x in value.split(",")]
            for name, value in re.findall(r"^(LAYERS|STRIDES|PIVOTS)=([\d,]+)$", script.read_text(), re.MULTILINE)}
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = module.LlavaLlamaForCausalLM(module.LlavaConfig(**{**config, **small, "num_hidden_layers": 1}))
    model.post_config(SimpleNamespace(grouping="avgpool1d", progressive=True, **said))
    seen: list[tuple[int, ...]] = []
    for call in range(TRAINING):
        now = model.model.groupingLayer, model.model.stride
        if not seen or seen[-1][1:] != now:
            seen.append((call, *now))
        model(input_ids=ids)
    return seen


def stages_of_steps() -> list[tuple[int, ...]]:
    """(optimizer step, layer, stride) where a stage of our preset begins."""
    from mmcompress.train import PRESETS

    preset = PRESETS["llavolta-4stage"]
    begins = [0, *preset.boundaries(TRAINING)[:-1]]
    return [(step, preset.at(step, TRAINING).layer, preset.at(step, TRAINING).stride or 1) for step in begins]


def reducer(case: Case) -> Any:
    from mmcompress.layers import StagePool

    return StagePool(*map(int, case.stages[0]))


def rounds_positions(theirs: Answer, ours: Answer, inputs: dict[str, Tensor]) -> str:
    there, here = theirs["positions"][0], ours["positions"][0]
    picture = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    pooled = TOKENS - inputs["input_ids"].shape[1] + len(here)
    half = nn.functional.avg_pool1d(picture.half()[None], TOKENS // pooled, TOKENS // pooled)[0].long()
    replayed = torch.cat([here[:picture[0]], half, here[picture[0] + pooled:]])
    off, difference = (there - here)[there != here], largest(theirs["logits"], ours["logits"])
    if not len(off) or not torch.equal(there, replayed) or difference < CLOSE:
        return ""
    by = " or ".join(map(str, off.unique().tolist()))
    return (f"{len(off)} of {pooled} pooled tokens stand {by} after the floor of their mean, as a replay in float16 says; the "
            f"logits differ by up to {difference:.2g}")


def drops_second(theirs: Answer, ours: Answer, inputs: dict[str, Tensor]) -> str:
    there, here = theirs["logits"], logits(ours, 0)
    alone = there.shape == (1, *here.shape) and largest(there[0], here) < CLOSE
    return "one row of logits for two prompts, that of prompt 0" if alone else ""


def pools_first(theirs: Answer, ours: Answer, inputs: dict[str, Tensor]) -> str:
    there, before = theirs["logits"], 20                            # columns of text before the picture of prompt 1
    pooled = len(there) == 1 and there.shape[1] == len(logits(ours, 1)) < len(logits(ours, 0))
    first, second = (largest(there[0, :before], logits(ours, prompt)[:before]) for prompt in (0, 1))
    return (f"one row of logits for two prompts, of prompt 0, whose text is pooled from column {before} on"
            if pooled and first < CLOSE < second else "")


def logits(found: Answer, prompt: int) -> Tensor:
    return found["logits"][prompt][found["valid"][prompt]]


def one_call_late(theirs: Answer, ours: Answer, inputs: dict[str, Tensor]) -> str:
    there, here = theirs["stages"], ours["stages"]
    late = [(at + bool(at), *what) for at, *what in here]
    begins = ["{:,}, {:,} and {:,}".format(*(at for at, *_ in side[1:])) for side in (there, here) if len(side) == 4]
    return f"stages 2 to 4 begin at forward calls {begins[0]}, ours at steps {begins[1]}, from 0" if there == late else ""


def settings(name: str, rows: Any, **rest: Any) -> list[Case]:
    """A case for each setting of layer K and stride S."""
    return [a_case(f"{name}, K={k} S={s}", rows, stages=((k, s),), **rest) for k, s in ((2, 8), (2, 2), (6, 8))]


a_case = partial(Case, "llavolta", stages=((2, 8),))
FAR = ((1100, (2, 8)), (1101, (2, 2)), (2100, (2, 8)), (2100, (2, 2)))         # the picture's first column, and the setting
CASES = (
    *settings("one picture", lambda n: [[n(), n()]], do="generate"),
    *settings("two prompts, right padding", lambda n: [[n(), n()], [n(), n()]]),
    *settings("training, one prompt", lambda n: [[n(), n()]], do="train", answers=(ANSWERS,)),
    *settings("training, right padding", lambda n: [[n(), n()], [n(), n()]], do="train", answers=(ANSWERS, ANSWERS[1:])),
    a_case("grouped-query attention", lambda n: [[n(), n()]], do="generate", heads=2),
    a_case("two pictures in a prompt, float32 positions", lambda n: [[n(), n(), n()]], do="generate", exact=True),
    a_case("no picture", lambda n: [[n()]], do="generate"),
    *(a_case(f"picture at {at:,}, float32 positions, S={setting[1]}", lambda n, at=at: [[at, n()]], stages=(setting,),
             exact=True) for at, setting in FAR),

    *(a_case(f"picture at {at:,}, S={setting[1]}", lambda n, at=at: [[at, n()]], stages=(setting,), compare=(),
             known=rounds_positions,
             cause="positions are averaged in float16, where a mean of n + 1/2 rounds to even from 1,024 on and odd columns do "
                   "from 2,048 on; with float32 (above) nothing differs. Ours rounds every mean down")
      for at, setting in FAR),
    a_case("second has no picture", lambda n: [[20, 20], [616]], compare=(), known=drops_second,
           cause="visual_operating skips prompts without a picture, so they are missing from the batch that goes on; their "
                 "training groups samples by modality. Ours keeps every prompt"),
    a_case("first has no picture", lambda n: [[616], [20, 20]], compare=(), known=pools_first,
           cause="and its row counter stands still for them, so the first prompt is pooled where the second has its picture"),
    a_case("second has no picture, padding", lambda n: [[20, 20], [300]], compare=(), fails="Attention mask should be of size",
           cause="the same, where the mask still has a row for the prompt that is missing"),
    a_case("one picture and two", lambda n: [[20, 20], [20, 20, 20]], compare=(), fails="Sizes of tensors must match",
           cause="shortened prompts are concatenated unpadded: each must lose as many columns as the next. Ours pads them"),
    a_case("stages of training", lambda n: [[3]], do="stages", once=True, compare=(), known=one_call_late,
           cause="step_stride_and_layer compares its count at the end of a forward call and before counting it, so call "
                 "`pivot`, from 0, still runs in the old stage; and all forward calls count, those of an evaluation and of "
                 "every accumulated micro-batch. Ours are optimizer steps, as published"),
)
