"""FastV and PyramidDrop against their authors' public code, end to end: the same tokens, logits, gradients and answers.

    python benchmarks/layer_parity.py --fastv FastV --pyramiddrop PyramidDrop --old-python old/bin/python --out parity.csv

The two folders are your own checkouts of the authors' repositories, of which nothing is copied here. `--old-python` has
transformers 4.37.2, a torch of its time (2.2.2 was tried), numpy below 2 and Pillow; it runs their classes in a process of
its own. Both sides get the same random weights (12 layers of width 128, float32), the same projected pictures (576 tokens
each) and the same text.

A line per case, over all seeds: how many selections (one per picture and stage) are the same set of tokens; the smallest
relative gap between the last score kept and the first dropped; the largest differences of the prompt's logits, of the loss,
of the gradients (norm of the difference by norm, worst parameter), and of the logits of greedy decoding with the cache; how
many of its tokens are equal. A selection is "tied" where the scores of all that differ lie within 1e-5 of the last one kept,
since float32 decides there. Any other difference makes the script exit 1, and so does a known difference (listed below the
table, each with its cause) that is no longer what it is said to be.

What the worker adds to the authors' code, on instances only:
FastV         step 5 of its README: rotary tables are read by position, however short the keys are
PyramidDrop   a vision tower that hands ready features through. "flash": FlashAttention, which needs a GPU, is played by
              their eager attention under the mask that FlashAttention would apply
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode

if "--worker" not in sys.argv[1:2]:             # the worker has an old transformers and no mmcompress
    from common import positive, print_table, versions, write_csv
    from tqdm import tqdm
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    import mmcompress
    from mmcompress.layers import FastV, PyramidDrop

LAYERS, WIDTH, VOCAB, TOKENS, BEFORE = 12, 128, 200, 576, 35        # FastV's code has the picture at columns 35 to 611
IMAGE, IMAGE_THERE = VOCAB - 1, -200
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 2048, "initializer_range": 0.1, "pad_token_id": 0}
STAGES = ((3, 0.5), (6, 0.25), (9, 0.125))                          # PyramidDrop's at the quarters of 12 layers
STEPS = 8                                                           # of greedy decoding
TIED, CLOSE = 1e-5, 1e-4
COLUMNS = ("method", "case", "attention", "n", "selections", "margin", "logits", "loss", "gradients", "decoded",
           "decode_logits", "kind")

Call = dict[str, Any]       # what goes to the worker: tensors, numbers and strings
Answer = dict[str, Any]     # what either side makes of it


# the authors' code, in the old interpreter ----------------------------------------------------------------------------


class TopK(TorchFunctionMode):
    """Notes the scores and the choice of every `topk`: both codes select with it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "topk":
            self.seen.append({"scores": args[0].detach().flatten(), "index": out.indices.flatten().sort().values})
        return out


def worker(folder: Path, fastv: Path, pyramiddrop: Path) -> None:
    """Answer every job file in `folder`."""
    import transformers

    sys.path.insert(0, str(pyramiddrop))
    pdrop = importlib.import_module("llava.model.language_model.llava_llama_pdrop")
    spec: Any = importlib.util.spec_from_file_location("fastv", fastv / "src/FastV/lmms-eval/fastv_kvcache.py")
    fast = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fast)
    about = {"authors_torch": str(torch.__version__), "authors_transformers": transformers.__version__}
    for path in sorted(folder.glob("job*.pt")):
        job = torch.load(path)
        answers: dict[str, Answer] = {}
        for name, call in job["calls"].items():
            module, run = (fast, run_fastv) if call["method"] == "fastv" else (pdrop, run_pyramid_drop)
            try:
                answers[name] = run(module, job, call)
            except (RuntimeError, ValueError, IndexError) as error:
                answers[name] = {"error": f"{type(error).__name__}: {error}"}
        torch.save({"about": about, "answers": answers}, folder / path.name.replace("job", "answer"))


def run_fastv(module: Any, job: Call, call: Call) -> Answer:
    """`FastVLlamaModel` within the stock LlamaForCausalLM."""
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


def run_pyramid_drop(module: Any, job: Call, call: Call) -> Answer:
    """`LlavaLlamaForCausalLM_PDrop`, from prompts with placeholders on."""
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


def answer(model: Any, call: Call, inputs: Call, to_forward: Call, to_generate: Call) -> Answer:
    """One forward call; before it greedy decoding with the cache, after it the gradients, as the call says."""
    found: Answer = {}
    if call["do"] == "generate":
        model.generation_config.eos_token_id = None                 # an argument None would not override it
        made = model.generate(**inputs, **to_generate, do_sample=False, max_new_tokens=STEPS, pad_token_id=0,
                              return_dict_in_generate=True, output_scores=True)
        found |= {"new": made.sequences[:, -STEPS:], "scores": torch.stack(made.scores, 1)}
    with TopK() as topk, torch.set_grad_enabled(call["do"] == "train"):
        out = model(**inputs, **to_forward, use_cache=call["cache"], return_dict=True)
    found |= {"logits": out.logits.detach(), "topk": topk.seen}
    if out.past_key_values is not None:
        found["held"] = [keys.shape[2] for keys, _ in out.past_key_values]
    if call["do"] == "train":
        out.loss.backward()
        found |= {"loss": float(out.loss.detach()), "gradients": gradients(model.model)}
    return found


def gradients(language_model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in language_model.named_parameters() if p.grad is not None}


# prompts, for both ----------------------------------------------------------------------------------------------------

Known = Callable[[Answer, Answer, dict[str, Tensor]], str]


@dataclass(frozen=True)
class Case:
    """A batch of prompts and what is asked of both sides.

    rows      a random number of tokens -> for each prompt the lengths of its runs of text; a picture stands between two
    answers   for each prompt the slices of its columns that are answers; empty: no labels
    twin      the first prompt comes a second time, but for its last token
    compare   prompts that must agree
    cause     of a known difference; then `fails` is in the error that theirs raises, or `known` (theirs, ours, inputs)
              returns evidence that it is this difference, "" if it is not
    """

    method: str
    name: str
    rows: Callable[[Callable[[], int]], list[list[int]]]
    attention: str = "sdpa"
    do: str = "forward"                     # or "generate", or "train"
    cache: bool = True
    heads: int = 4                          # of keys and values
    stages: tuple[tuple[int, float], ...] = STAGES
    answers: tuple[tuple[slice, ...], ...] = ()
    twin: bool = False
    compare: tuple[int, ...] = (0, 1)
    cause: str = ""
    fails: str = ""
    known: Known | None = None

    @property
    def key(self) -> str:
        return f"{self.method}: {self.name}"

    @property
    def reducer(self) -> Any:
        return FastV(layer=3, keep=0.5) if self.method == "fastv" else PyramidDrop(self.stages)


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


def leaves_answerless(theirs: Answer, ours: Answer, inputs: dict[str, Tensor]) -> str:
    full, left = int(inputs["attention_mask"][1].sum()), theirs["held"][-1]
    return f"prompt 1 keeps its {full} columns to the end; ours {int(ours['valid'][1].sum())}" if left == full else ""


def leaves_second(theirs: Answer, ours: Answer, inputs: dict[str, Tensor]) -> str:
    length, left = inputs["input_ids"].shape[1], theirs["logits"].shape[1]
    first, other = theirs["topk"][0]["scores"], theirs["topk"][1]["scores"]
    blind, whole = largest(first, other) < 1e-7, left == length - TOKENS + 72
    return (f"of {length} columns {left} are left, ours {ours['logits'].shape[1]}; another last token changes no score"
            if blind and whole else "")


ANSWERS = (slice(-10, -6), slice(-3, None))
CASES = (
    Case("fastv", "one picture", lambda n: [[BEFORE, n()]], do="generate", heads=2),
    Case("fastv", "eager, no cache", lambda n: [[BEFORE, n()]], attention="eager", cache=False, heads=2),
    Case("pyramid_drop", "one picture", lambda n: [[n(), n()]], do="generate"),
    Case("pyramid_drop", "uneven stages", lambda n: [[n(), n()]], stages=((2, 0.7), (5, 0.31), (10, 0.1)), do="generate"),
    Case("pyramid_drop", "no picture", lambda n: [[n()]], do="generate"),
    Case("pyramid_drop", "two prompts, right padding", lambda n: [[n(), n()], [n(), n()]], attention="flash"),
    Case("pyramid_drop", "second has no picture", lambda n: [[n(), n()], [n()]], attention="flash"),
    Case("pyramid_drop", "training, one prompt", lambda n: [[n(), n()]], do="train", answers=(ANSWERS,)),
    Case("pyramid_drop", "training, right padding", lambda n: [[n(), n()], [n(), n()]], attention="flash", do="train",
         answers=(ANSWERS, ANSWERS[1:])),

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
    Case("pyramid_drop", "grouped-query attention", lambda n: [[n(), n()]], heads=2, compare=(),
         fails="The size of tensor a (4) must match the size of tensor b (2)",
         cause="the ranking multiplies 4 query heads with 2 key heads without repeating them; multi-head models only"),
    Case("pyramid_drop", "right padding without FlashAttention", lambda n: [[20, 40], [20, 20]], compare=(),
         fails="Subtraction, the `-` operator, with a bool tensor",
         cause="under SDPA the padding mask is 4-D when rank_drop takes it for the 2-D one; only FlashAttention keeps that"),
    Case("pyramid_drop", "eager attention", lambda n: [[20, 20]], attention="eager", compare=(),
         fails="Subtraction, the `-` operator, with a bool tensor",
         cause="the same 4-D mask, which eager attention has without padding too"),
    Case("pyramid_drop", "decoding two prompts", lambda n: [[20, 20]] * 2, do="generate", compare=(),
         fails="is out of bounds for dimension 1",
         cause="decoding positions become a list of one tensor a prompt, and cos[list] indexes one dimension with each, which "
               "is right for one prompt only"),
    Case("pyramid_drop", "training without an answer", lambda n: [[20, 20], [30, 30]], attention="flash", do="train",
         answers=(ANSWERS, ()), compare=(0,), known=leaves_answerless,
         cause="a prompt without labels has no token to rank by and stays whole; ours ranks it by its last token"),
    Case("pyramid_drop", "two pictures in a prompt", lambda n: [[n(), n(), n()]], twin=True, compare=(), known=leaves_second,
         cause="only the first placeholder is noted, and prompt_len counts the second as text, so the querying token is not "
               "the last but one in the second picture, which stays whole; ours reduces both by the last token"),
)


def build(heads: int, seed: int) -> Any:
    """LLaVA-1.5's geometry, 24 x 24 tokens a picture, with random weights."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=48,
                              patch_size=2, projection_dim=32)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT, num_key_value_heads=heads),
                         image_token_index=IMAGE)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def make_inputs(case: Case, seed: int) -> dict[str, Tensor]:
    """What the processor would give, padded on the right, with labels where the case has answers."""
    made = torch.Generator().manual_seed(1000 * seed + 7)
    rows = case.rows(lambda: int(torch.randint(12, 41, (1,), generator=made)))
    ids = []
    for texts in rows:
        runs = [torch.randint(3, IMAGE - 1, (n,), generator=made) for n in texts]
        ids.append(torch.cat([x for run in runs for x in (torch.full((TOKENS,), IMAGE), run)][1:]))
    pixels = torch.randn(sum(len(texts) - 1 for texts in rows), 3, 48, 48, generator=made)
    labels = [torch.full_like(row, -100) for row in ids]
    for row, label, answers in zip(ids, labels, case.answers):
        for at in answers:
            label[at] = row[at]
    if case.twin:
        ids, pixels = [ids[0], torch.cat([ids[0][:-1], ids[0][-1:] + 1])], torch.cat([pixels, pixels])
    inputs = {"input_ids": pad_sequence(ids, batch_first=True),
              "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)}
    if len(pixels):
        inputs["pixel_values"] = pixels
    if case.answers:
        inputs["labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
    return inputs


def as_theirs(case: Case, model: Any, inputs: dict[str, Tensor]) -> Call:
    """The same prompts as the authors' code takes them."""
    call: Call = {"method": case.method, "attention": case.attention, "do": case.do, "cache": case.cache}
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs.get("labels")
    picture, features = ids == IMAGE, torch.zeros(0, TOKENS, WIDTH)
    if "pixel_values" in inputs:
        features = torch.stack(model.get_image_features(inputs["pixel_values"]).pooler_output)
    if case.method == "fastv":
        embeds = model.get_input_embeddings()(ids).masked_scatter(picture[..., None], features.flatten(0, 1))
        return {**call, "embeds": embeds, "mask": mask}
    first = picture & (picture.long().cumsum(1) % TOKENS == 1)                          # 576 placeholders are one there
    stays = (first | ~picture) & mask.bool()
    squeeze = lambda x, pad: pad_sequence([row[s] for row, s in zip(x, stays)], batch_first=True,       # noqa: E731
                                          padding_value=pad)
    images, at = [], 0
    for count in first.sum(1).tolist():                             # a prompt without a picture brings an empty one
        images += list(features[at:at + count]) or [torch.zeros(TOKENS, WIDTH)]
        at += count
    return {**call, "ids": squeeze(ids.masked_fill(first, IMAGE_THERE), 0), "mask": squeeze(mask, 0), "stages": case.stages,
            "images": torch.stack(images) if at else None, "labels": None if labels is None else squeeze(labels, -100)}


# ours, and the comparison ---------------------------------------------------------------------------------------------


def run_ours(case: Case, model: Any, inputs: dict[str, Tensor]) -> Answer:
    """A wrapped model of the present transformers."""
    found: Answer = {}
    train = case.do == "train"
    model.zero_grad()
    with mmcompress.wrap(model.train(train), layers=[case.reducer]) as w, torch.set_grad_enabled(train):
        if case.do == "generate":
            made = w.generate(**inputs, do_sample=False, max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True)
            found |= {"new": made.sequences[:, -STEPS:], "scores": torch.stack(made.logits, 1)}
        out = w(**inputs)
        prompt = w.prompt
        valid = inputs["attention_mask"].bool() if prompt is None else prompt.column >= 0
        found |= {"logits": out.logits.detach(), "valid": valid, "row": [item.row for item in w.last],
                  "kept": [[stage.index for stage in item.layers] for item in w.last]}
        if train and prompt is not None:
            out.loss.backward()
            found |= {"loss": float(out.loss.detach()), "labels": prompt.select(inputs["labels"], -100),
                      "gradients": gradients(model.model.language_model)}
    return found


def largest(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def compare_choice(case: Case, theirs: Answer, ours: Answer) -> dict[str, Any]:
    """Selections, picture by picture and stage by stage, until the first that differs."""
    pictures = [p for p, row in enumerate(ours["row"]) if row in case.compare]
    stages = [ours["kept"][p] for p in pictures]
    same = tied = 0
    margin = None
    for p, kept_of in enumerate(stages):
        left = torch.arange(TOKENS)
        for number, kept in enumerate(kept_of):
            choice = theirs["topk"][number * len(pictures) + p]
            scores, there, here = choice["scores"], choice["index"], torch.searchsorted(left, kept)
            last, following = scores.sort(descending=True).values[len(kept) - 1:len(kept) + 1].tolist()
            gap = (last - following) / last
            margin = gap if margin is None else min(margin, gap)
            if not torch.equal(there, here):
                swapped = sorted(set(there.tolist()) ^ set(here.tolist()))
                tied += largest(scores[swapped], torch.tensor(last)) < TIED * last
                break
            left = kept
            same += 1
    return {"selections": sum(map(len, stages)), "same": same, "tied": tied, "margin": margin}


def compare(case: Case, theirs: Answer, ours: Answer, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """One row of the file. kind: equal, tied, known (a known difference, as described), or another."""
    row: dict[str, Any] = {"method": case.method, "case": case.name, "attention": case.attention, "do": case.do,
                           "kv_heads": case.heads, "prompts": len(inputs["input_ids"])}
    measured = dict.fromkeys(("selections", "same", "tied", "margin", "logits", "loss", "gradients", "labels", "decoded",
                              "decode_logits"))
    error = note = theirs.get("error", "")
    good = bool(error and case.fails and case.fails in error)
    if not error and not case.fails:
        if case.compare:
            measured |= compare_choice(case, theirs, ours)
            if not measured["tied"]:
                measured |= compare_outputs(case, theirs, ours)
        good = not case.compare or bool(measured["tied"]) or agrees(measured)
        if case.known is not None and good:
            note = case.known(theirs, ours, inputs)
            good = bool(note)
    kind = "another" if not good else "known" if case.cause else "tied" if measured["tied"] else "equal"
    return {**row, **measured, "kind": kind, "note": note}


def compare_outputs(case: Case, theirs: Answer, ours: Answer) -> dict[str, Any]:
    """Logits, and what else both sides have. Padding is on the right on both, and is not compared."""
    out: dict[str, Any] = {"logits": 0.0}
    for prompt, valid in enumerate(ours["valid"]):
        n = int(valid.sum())
        there = theirs["logits"][prompt, :n]
        if prompt in case.compare:
            out["logits"] = max(out["logits"], largest(there, ours["logits"][prompt, :n]) if len(there) == n else torch.inf)
    if "loss" in ours:
        out["loss"] = abs(theirs["loss"] - ours["loss"])
        if case.compare == (0, 1):
            out["labels"] = torch.equal(theirs["labels"], ours["labels"])
        out["gradients"] = max(float((g - theirs["gradients"][name]).norm() / g.norm().clamp_min(1e-12))
                               for name, g in ours["gradients"].items())
    if "new" in ours:
        out["decoded"] = int((theirs["new"] == ours["new"]).sum())
        out["decode_logits"] = largest(theirs["scores"], ours["scores"])
    return out


def agrees(row: dict[str, Any]) -> bool:
    numbers = [row[k] for k in ("logits", "loss", "gradients", "decode_logits") if row[k] is not None]
    return row["same"] == row["selections"] and max(numbers) < CLOSE and row["labels"] in (None, True) \
        and row["decoded"] in (None, STEPS)


# all of it --------------------------------------------------------------------------------------------------------------


def ask(python: str, jobs: dict[str, Call], fastv: Path, pyramiddrop: Path) -> dict[str, Any]:
    """The worker's answer to each job."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for key, job in jobs.items():
            torch.save(job, folder / f"job-{key}.pt")
        command = [python, __file__, "--worker", name, str(fastv.resolve()), str(pyramiddrop.resolve())]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-3000:]}")
        return {key: torch.load(folder / f"answer-{key}.pt") for key in jobs}


def commit(checkout: Path) -> str:
    """The commit of a checkout, "" if git does not know it."""
    done = subprocess.run(["git", "-C", str(checkout), "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per case, over its seeds."""
    out = []
    for case in dict.fromkeys((r["method"], r["case"]) for r in rows):
        of = sorted((r for r in rows if (r["method"], r["case"]) == case), key=lambda r: r["kind"] != "another")
        worst = lambda name, of=of, pick=max: pick((r[name] for r in of if r[name] is not None), default=None)  # noqa: E731
        total = lambda name, of=of: sum(r[name] or 0 for r in of)                                                # noqa: E731
        decoded = [r for r in of if r["decoded"] is not None]
        out.append({**of[0], "n": len(of), "tied": total("tied"),
                    "selections": f"{total('same')}/{total('selections')}" if total("selections") else None,
                    **{name: worst(name) for name in ("logits", "loss", "gradients", "decode_logits")},
                    "margin": worst("margin", pick=min),
                    "decoded": f"{total('decoded')}/{STEPS * len(decoded)}" if decoded else None,
                    "kind": ", ".join(dict.fromkeys(r["kind"] for r in of))})
    return out


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fastv", type=Path, metavar="DIR", required=True, help="your checkout of pkunlp-icler/FastV")
    parser.add_argument("--pyramiddrop", type=Path, metavar="DIR", required=True, help="and of Cooperx521/PyramidDrop")
    parser.add_argument("--old-python", metavar="PYTHON", required=True, help="an interpreter with transformers 4.37.2")
    parser.add_argument("--seeds", type=positive, default=10, help="random weights, pictures and texts per case")
    parser.add_argument("--out", type=Path, help="write every case and seed to this CSV file")
    args = parser.parse_args(argv)

    jobs, todo = {}, []
    for seed in range(args.seeds):
        for heads in sorted({case.heads for case in CASES}):
            model = build(heads, seed)
            weights = {f"model.{name}": value for name, value in model.model.language_model.state_dict().items()}
            job: Call = {"config": {**TEXT, "num_key_value_heads": heads}, "calls": {},
                         "weights": {**weights, "lm_head.weight": model.lm_head.weight.data}}
            for case in (case for case in CASES if case.heads == heads):
                inputs = make_inputs(case, seed)
                job["calls"][case.key] = as_theirs(case, model, inputs)
                todo.append((seed, case, model, inputs))
            jobs[f"{seed}-{heads}"] = job
    answers = ask(args.old_python, jobs, args.fastv, args.pyramiddrop)
    about = {**versions(torch.device("cpu"), torch.float32), **next(iter(answers.values()))["about"],
             "fastv": commit(args.fastv), "pyramiddrop": commit(args.pyramiddrop)}
    rows = []
    for seed, case, model, inputs in tqdm(sorted(todo, key=lambda x: CASES.index(x[1])), desc="ours", unit="case"):
        theirs = answers[f"{seed}-{case.heads}"]["answers"][case.key]
        rows.append({"seed": seed, **compare(case, theirs, run_ours(case, model, inputs), inputs), **about})

    summary = summarize(rows)
    print_table(f"ours and the authors' code\n{', '.join(f'{k} {v}' for k, v in about.items())}", summary, COLUMNS)
    for line in summary:
        case = next(c for c in CASES if (c.method, c.name) == (line["method"], line["case"]))
        if case.cause or line["kind"] != "equal":
            print(f"{case.key}\n  cause: {case.cause or 'not known'}\n  seen:  {line['note'] or 'see the table'}")
    if args.out is not None:
        write_csv(args.out, rows)
    return int(any(row["kind"] == "another" for row in rows))


if __name__ == "__main__":
    if "--worker" in sys.argv[1:2]:
        worker(*map(Path, sys.argv[2:5]))
    else:
        sys.exit(main())
