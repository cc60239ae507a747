"""PyramidDrop beside its authors' code, `LlavaLlamaForCausalLM_PDrop`, from prompts with placeholders on."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .case import ANSWERS, TOKENS, Answer, Call, Case, largest
from .theirs import answer

STAGES = ((3, 0.5), (6, 0.25), (9, 0.125))                          # at the quarters of 12 layers


def load(checkout: Path) -> Any:
    sys.path.insert(0, str(checkout))
    return importlib.import_module("llava.model.language_model.llava_llama_pdrop")


def run(module: Any, job: Call, call: Call) -> Answer:
    config = module.LlavaConfig(**job["config"])
    flash = call["attention"] == "flash"
    config._attn_implementation = "eager" if flash else call["attention"]
    model = module.LlavaLlamaForCausalLM_PDrop(config)
    model.load_state_dict(job["weights"])
    model.train(call["do"] == "train")
    inner = model.model
    inner.vision_tower, inner.mm_projector = nn.Identity(), nn.Identity()
    inner.layer_list = [layer for layer, _ in call["stages"]]
    inner.image_token_ratio_list = [1.0, *(keep for _, keep in call["stages"])]
    if flash:
        inner._use_flash_attention_2 = True
        for layer in inner.layers:
            layer.self_attn.register_forward_pre_hook(as_flash, with_kwargs=True)
    labels: list[Any] = []
    stock = inner.pdrop_forward

    def noting(**kwargs: Any) -> Any:
        out = stock(**kwargs)
        labels.append(out[1])
        return out

    inner.pdrop_forward = noting
    found = answer(model, call, {"attention_mask": call["mask"], "images": call["images"]},
                   {"input_ids": call["ids"], "labels": call["labels"]}, {"inputs": call["ids"]})
    return {**found, "labels": labels[-1]}


def as_flash(attention: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """FlashAttention's 2-D mask as the additive one of eager attention."""
    from transformers.modeling_attn_mask_utils import _prepare_4d_causal_attention_mask

    hidden, mask = kwargs["hidden_states"], kwargs["attention_mask"]
    return args, {**kwargs, "attention_mask": _prepare_4d_causal_attention_mask(mask, hidden.shape[:2], hidden, 0)}


def reducer(case: Case) -> Any:
    from mmcompress.layers import PyramidDrop

    return PyramidDrop(case.stages)


def leaves_answerless(theirs: Answer, ours: Answer, inputs: dict[str, Tensor]) -> str:
    full, left = int(inputs["attention_mask"][1].sum()), theirs["held"][-1]
    return f"prompt 1 keeps its {full} columns to the end; ours {int(ours['valid'][1].sum())}" if left == full else ""


def leaves_second(theirs: Answer, ours: Answer, inputs: dict[str, Tensor]) -> str:
    length, left = inputs["input_ids"].shape[1], theirs["logits"].shape[1]
    first, other = theirs["topk"][0]["scores"], theirs["topk"][1]["scores"]
    blind, whole = largest(first, other) < 1e-7, left == length - TOKENS + 72
    return (f"of {length} columns {left} are left, ours {ours['logits'].shape[1]}; another last token changes no score"
            if blind and whole else "")


a_case = partial(Case, "pyramid_drop", stages=STAGES)
CASES = (
    a_case("one picture", lambda n: [[n(), n()]], do="generate"),
    a_case("uneven stages", lambda n: [[n(), n()]], stages=((2, 0.7), (5, 0.31), (10, 0.1)), do="generate"),
    a_case("no picture", lambda n: [[n()]], do="generate"),
    a_case("two prompts, right padding", lambda n: [[n(), n()], [n(), n()]], attention="flash"),
    a_case("second has no picture", lambda n: [[n(), n()], [n()]], attention="flash"),
    a_case("training, one prompt", lambda n: [[n(), n()]], do="train", answers=(ANSWERS,)),
    a_case("training, right padding", lambda n: [[n(), n()], [n(), n()]], attention="flash", do="train",
         answers=(ANSWERS, ANSWERS[1:])),

    a_case("grouped-query attention", lambda n: [[n(), n()]], heads=2, compare=(),
         fails="The size of tensor a (4) must match the size of tensor b (2)",
         cause="the ranking multiplies 4 query heads with 2 key heads without repeating them; multi-head models only"),
    a_case("right padding without FlashAttention", lambda n: [[20, 40], [20, 20]], compare=(),
         fails="Subtraction, the `-` operator, with a bool tensor",
         cause="under SDPA the padding mask is 4-D when rank_drop takes it for the 2-D one; only FlashAttention keeps that"),
    a_case("eager attention", lambda n: [[20, 20]], attention="eager", compare=(),
         fails="Subtraction, the `-` operator, with a bool tensor",
         cause="the same 4-D mask, which eager attention has without padding too"),
    a_case("decoding two prompts", lambda n: [[20, 20]] * 2, do="generate", compare=(),
         fails="is out of bounds for dimension 1",
         cause="decoding positions become a list of one tensor a prompt, and cos[list] indexes one dimension with each, which "
               "is right for one prompt only"),
    a_case("training without an answer", lambda n: [[20, 20], [30, 30]], attention="flash", do="train",
         answers=(ANSWERS, ()), compare=(0,), known=leaves_answerless,
         cause="a prompt without labels has no token to rank by and stays whole; ours ranks it by its last token"),
    a_case("two pictures in a prompt", lambda n: [[n(), n(), n()]], twin=True, compare=(), known=leaves_second,
         cause="only the first placeholder is noted, and prompt_len counts the second as text, so the querying token is not "
               "the last but one in the second picture, which stays whole; ours reduces both by the last token"),
)
