"""FastV, PyramidDrop and LLaVolta against their authors' public code: the same tokens, logits, gradients and answers.

    python benchmarks/layer_parity.py --fastv FastV --pyramiddrop PyramidDrop --llavolta LLaVolta --old-python old/bin/python

The folders are your own checkouts of the authors' repositories, of which nothing is copied here; a method without one is
left out. `--old-python` has transformers 4.37.2, a torch of its time (2.2.2 was tried), numpy below 2 and Pillow; it runs
their classes, a process for each method. Both sides get the same random weights (12 layers of width 128, float32), the same
projected pictures (576 tokens each) and the same text.

A line per case, over all seeds: how many selections (one per picture and stage) are the same set of tokens, for LLaVolta,
which selects none, how many prompts have every token at the same position; the smallest relative gap between the last score
kept and the first dropped; the largest differences of the prompt's logits, of the loss, of the gradients (norm of the
difference by norm, worst parameter), and of the logits of greedy decoding with the cache; how many of its tokens are equal.
Labels of a shortened prompt must be equal too. A selection is "tied" where the scores of all that differ lie within 1e-5 of
the last one kept, since float32 decides there. Any other difference makes the script exit 1, and so does a known difference
(listed below the table, each with its cause) that is no longer what it is said to be.

What the worker adds to the authors' code, on instances only:
FastV         step 5 of its README: rotary tables are read by position, however short the keys are
PyramidDrop   a vision tower that hands ready features through. "flash": FlashAttention, which needs a GPU, is played by
              their eager attention under the mask that FlashAttention would apply
LLaVolta      such a tower. `avg_pool1d` of float16, which torch 2.2 lacks on a CPU, sums in float32 and rounds once, as later
              ones do. "float32 positions": positions are averaged in float32 instead, so nothing else differs
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from parity import fastv, llavolta, pyramid_drop
from parity.case import (
    CLOSE,
    IMAGE,
    IMAGE_THERE,
    LAYERS,
    STEPS,
    TIED,
    TOKENS,
    VOCAB,
    WIDTH,
    Answer,
    Call,
    Case,
    largest,
)
from parity.theirs import gradients, worker
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if "--worker" not in sys.argv[1:2]:             # the worker has an old transformers and no mmcompress
    from common import positive, print_table, versions, write_csv
    from tqdm import tqdm
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    import mmcompress

METHODS: dict[str, Any] = {"fastv": fastv, "pyramid_drop": pyramid_drop, "llavolta": llavolta}
CASES = fastv.CASES + pyramid_drop.CASES + llavolta.CASES
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 2048, "initializer_range": 0.1, "pad_token_id": 0}
COLUMNS = ("method", "case", "attention", "n", "selections", "margin", "logits", "loss", "gradients", "decoded",
           "decode_logits", "kind")


# prompts, for both ----------------------------------------------------------------------------------------------------


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
    call: Call = {"method": case.method, "attention": case.attention, "do": case.do, "cache": case.cache,
                  "exact": case.exact}
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
    if case.do == "stages":
        return {"stages": llavolta.stages_of_steps()}
    found: Answer = {}
    train = case.do == "train"
    model.zero_grad()
    with mmcompress.wrap(model.train(train), layers=[METHODS[case.method].reducer(case)]) as w, torch.set_grad_enabled(train):
        if case.do == "generate":
            made = w.generate(**inputs, do_sample=False, max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True)
            found |= {"new": made.sequences[:, -STEPS:], "scores": torch.stack(made.logits, 1)}
        last = model.model.language_model.layers[-1].register_forward_pre_hook(
            lambda layer, args, kwargs: found.update(positions=kwargs["position_ids"]), with_kwargs=True)
        out = w(**inputs)
        last.remove()
        prompt = w.prompt
        valid = inputs["attention_mask"].bool() if prompt is None else prompt.column >= 0
        found |= {"logits": out.logits.detach(), "valid": valid, "positions": found["positions"].expand_as(valid),
                  "row": [item.row for item in w.last], "kept": [[stage.index for stage in item.layers] for item in w.last]}
        if train and prompt is not None:
            out.loss.backward()
            found |= {"loss": float(out.loss.detach()), "labels": prompt.select(inputs["labels"], -100),
                      "gradients": gradients(model.model.language_model)}
    return found


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


def compare_positions(case: Case, theirs: Answer, ours: Answer) -> dict[str, Any]:
    """Prompts whose tokens all stand where the others do."""
    same = sum(torch.equal(theirs["positions"][p, :int(ours["valid"][p].sum())], ours["positions"][p][ours["valid"][p]])
               for p in range(len(ours["valid"])) if p in case.compare)
    return {"selections": sum(p in case.compare for p in range(len(ours["valid"]))), "same": same, "tied": 0, "margin": None}


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
            measured |= (compare_positions if case.method == "llavolta" else compare_choice)(case, theirs, ours)
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


def ask(python: str, jobs: dict[str, Call], checkouts: Mapping[str, Path]) -> dict[str, Any]:
    """The worker's answer to each job, of all methods that have a checkout."""
    answers: dict[str, Any] = {key: {"answers": {}} for key in jobs}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for key, job in jobs.items():
            torch.save(job, folder / f"job-{key}.pt")
        for method, checkout in checkouts.items():
            command = [python, __file__, "--worker", name, method, str(checkout.resolve())]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-3000:]}")
            for key, answer in answers.items():
                found = torch.load(folder / f"answer-{key}.pt")
                answer["about"] = found["about"]
                answer["answers"] |= found["answers"]
    return answers


def commit(checkout: Path | None) -> str:
    """The commit of a checkout, "" if there is none or git does not know it."""
    if checkout is None:
        return ""
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
    parser.add_argument("--fastv", type=Path, metavar="DIR", help="your checkout of pkunlp-icler/FastV")
    parser.add_argument("--pyramiddrop", type=Path, metavar="DIR", help="and of Cooperx521/PyramidDrop")
    parser.add_argument("--llavolta", type=Path, metavar="DIR", help="and of Beckschen/LLaVolta")
    parser.add_argument("--old-python", metavar="PYTHON", required=True, help="an interpreter with transformers 4.37.2")
    parser.add_argument("--seeds", type=positive, default=10, help="random weights, pictures and texts per case")
    parser.add_argument("--out", type=Path, help="write every case and seed to this CSV file")
    args = parser.parse_args(argv)
    given = {"fastv": args.fastv, "pyramid_drop": args.pyramiddrop, "llavolta": args.llavolta}
    checkouts = {method: folder for method, folder in given.items() if folder is not None}
    if not checkouts:
        parser.error("pass a checkout at least: --fastv, --pyramiddrop or --llavolta")
    cases = [case for case in CASES if case.method in checkouts]

    jobs, todo = {}, []
    for seed in range(args.seeds):
        for heads in sorted({case.heads for case in cases}):
            model = build(heads, seed)
            weights = {f"model.{name}": value for name, value in model.model.language_model.state_dict().items()}
            job: Call = {"config": {**TEXT, "num_key_value_heads": heads}, "calls": {},
                         "weights": {**weights, "lm_head.weight": model.lm_head.weight.data}}
            for case in (c for c in cases if c.heads == heads and not (c.once and seed)):
                inputs = make_inputs(case, seed)
                job["calls"][case.key] = as_theirs(case, model, inputs)
                todo.append((seed, case, model, inputs))
            jobs[f"{seed}-{heads}"] = job
    answers = ask(args.old_python, jobs, checkouts)
    about = {**versions(torch.device("cpu"), torch.float32), **next(iter(answers.values()))["about"],
             **{name: commit(checkouts.get(method)) for name, method in
                (("fastv", "fastv"), ("pyramiddrop", "pyramid_drop"), ("llavolta", "llavolta"))}}
    rows = []
    for seed, case, model, inputs in tqdm(sorted(todo, key=lambda x: cases.index(x[1])), desc="ours", unit="case"):
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
        worker(Path(sys.argv[2]), METHODS[sys.argv[3]], Path(sys.argv[4]))
    else:
        sys.exit(main())
