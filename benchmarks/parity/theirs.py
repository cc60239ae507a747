"""The authors' side: what answers the jobs, under the old interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .case import STEPS, Answer, Call


class Watch(TorchFunctionMode):
    """Notes the scores and the choice of every `topk`, with which tokens are selected, and the labels of every loss."""

    def __init__(self) -> None:
        super().__init__()
        self.topk: list[dict[str, Tensor]] = []
        self.targets: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "topk":
            self.topk.append({"scores": args[0].detach().flatten(), "index": out.indices.flatten().sort().values})
        elif name == "cross_entropy":
            self.targets.append(args[1])
        return out


def worker(folder: Path, method: Any, checkout: Path) -> None:
    """Answer what every job file in `folder` asks of a method. A process each: two of the checkouts are called llava."""
    import transformers

    name = method.__name__.rpartition(".")[2]
    module = method.load(checkout)
    about = {"authors_torch": str(torch.__version__), "authors_transformers": transformers.__version__}
    for path in sorted(folder.glob("job*.pt")):
        job = torch.load(path)
        answers: dict[str, Answer] = {}
        for key, call in job["calls"].items():
            if call["method"] != name:
                continue
            try:
                answers[key] = method.run(module, job, call)
            except (RuntimeError, ValueError, IndexError) as error:
                answers[key] = {"error": f"{type(error).__name__}: {error}"}
        torch.save({"about": about, "answers": answers}, folder / path.name.replace("job", "answer"))


def answer(model: Any, call: Call, inputs: Call, to_forward: Call, to_generate: Call) -> Answer:
    """One forward call; before it greedy decoding with the cache, after it the gradients, as the call says."""
    found: Answer = {}
    if call["do"] == "generate":
        model.generation_config.eos_token_id = None                 # an argument None would not override it
        made = model.generate(**inputs, **to_generate, do_sample=False, max_new_tokens=STEPS, pad_token_id=0,
                              return_dict_in_generate=True, output_scores=True)
        found |= {"new": made.sequences[:, -STEPS:], "scores": torch.stack(made.scores, 1)}
    with Watch() as watch, torch.set_grad_enabled(call["do"] == "train"):
        out = model(**inputs, **to_forward, use_cache=call["cache"], return_dict=True)
    found |= {"logits": out.logits.detach(), "topk": watch.topk}
    if watch.targets:                                               # of every column but the first
        found["labels"] = nn.functional.pad(watch.targets[-1].view(len(out.logits), -1), (1, 0), value=-100)
    if out.past_key_values is not None:
        found["held"] = [keys.shape[2] for keys, _ in out.past_key_values]
    if call["do"] == "train":
        out.loss.backward()
        found |= {"loss": float(out.loss.detach()), "gradients": gradients(model.model)}
    return found


def gradients(language_model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in language_model.named_parameters() if p.grad is not None}
