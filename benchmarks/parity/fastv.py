"""FastV beside its authors' code, `FastVLlamaModel` within the stock LlamaForCausalLM."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor

from .case import LAYERS, Answer, Call, Case
from .theirs import answer

BEFORE = 35                                                         # the code has the picture at columns 35 to 611


def load(checkout: Path) -> Any:
    spec: Any = importlib.util.spec_from_file_location("fastv", checkout / "src/FastV/lmms-eval/fastv_kvcache.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module: Any, job: Call, call: Call) -> Answer:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**job["config"])
    config._attn_implementation = call["attention"]
    model: Any = LlamaForCausalLM(config)
    model.model = module.FastVLlamaModel(config)
    model.load_state_dict(job["weights"])
    for layer in model.model.layers:
        rotary = layer.self_attn.rotary_emb
        rotary.forward = lambda x, seq_len=None, rotary=rotary: (rotary.cos_cached, rotary.sin_cached)
    return answer(model.eval(), call, {"attention_mask": call["mask"], "inputs_embeds": call["embeds"]}, {}, {})


def reducer(case: Case) -> Any:
    from mmcompress.layers import FastV

    return FastV(layer=3, keep=0.5)


def ranks_row_0(theirs: Answer, ours: Answer, inputs: dict[str, Tensor]) -> str:
    other = len(set(ours["kept"][0][0].tolist()) & set(ours["kept"][1][0].tolist()))
    one = len(theirs["topk"]) == 1 and other < 288
    return f"one ranking for two prompts; by its own attention prompt 1 would keep {other} of these 288" if one else ""


def held_twice(theirs: Answer, ours: Answer, inputs: dict[str, Tensor]) -> str:
    length, kept = inputs["input_ids"].shape[1], theirs["logits"].shape[1]
    right = theirs.get("held") == [length, length, 2 * length] + [kept] * (LAYERS - 3)
    return f"layer 2 holds {2 * length} columns of a prompt of {length}, and the logits agree all the same" if right else ""


def drops_text(theirs: Answer, ours: Answer, inputs: dict[str, Tensor]) -> str:
    counts = theirs["logits"].shape[1], ours["logits"].shape[1]
    return "412 of 700 columns are left, though no picture is there; ours keeps 700" if counts == (412, 700) else ""


CASES = (
    Case("fastv", "one picture", lambda n: [[BEFORE, n()]], do="generate", heads=2),
    Case("fastv", "eager, no cache", lambda n: [[BEFORE, n()]], attention="eager", cache=False, heads=2),

    Case("fastv", "two prompts", lambda n: [[BEFORE, 20]] * 2, heads=2, compare=(0,), known=ranks_row_0,
         cause="last_attention.mean(dim=1)[0] ranks the first prompt and its columns are taken from all; ours ranks each"),
    Case("fastv", "two prompts, right padding", lambda n: [[BEFORE, 40], [BEFORE, 20]], heads=2, compare=(),
         fails="Attention mask should be of size",
         cause="layer K-1 runs twice into the cache, where its keys outgrow the mask: no padding with the cache"),
    Case("fastv", "the cache of layer K-1", lambda n: [[BEFORE, n()]], heads=2, known=held_twice,
         cause="that layer runs twice (once for its attention map) and each run appends; a softmax over everything twice is "
               "the same, so it costs memory and time only"),
    Case("fastv", "no picture, 40 tokens", lambda n: [[40]], heads=2, compare=(), fails="selected index k out of range",
         cause="columns 35 to 611 are hard-coded, whatever stands there; ours passes text through"),
    Case("fastv", "no picture, 700 tokens", lambda n: [[700]], heads=2, compare=(), known=drops_text,
         cause="columns 35 to 611 are hard-coded, whatever stands there; ours passes text through"),
)
