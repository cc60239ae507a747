"""Runs a recipe: `train(recipe, out)`. Alone, or on several processes under `accelerate launch -m mmcompress train ...`.

A step is a pure function of the weights, the optimizers' state and (seed, rank, step): the batch and torch's random
numbers are derived from these three, so a resumed run goes on exactly where the other stopped, bit for bit on a CPU.
Each process draws its own batches; losses are means over the answers' tokens of a process's batch, gradients means over
processes. In `out`: log.jsonl, state.pt to resume from, training.png, and at the end model/, which loads as pico does.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..flops import prefill_flops
from .asking import ask, summarize
from .clips import ClipBatches
from .data import Batch, Batches, Geometry
from .model import Learner, average_with_start, load
from .optim import build_optimizers, rate, set_rate
from .recipe import Recipe
from .record import Clock, Log, read_state, write_state


def train(recipe: Recipe, out: str | Path, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train, evaluate, save. -> what `mmcompress train --json` prints; only the process whose "main" is true writes files.

    resume    go on from the checkpoint in `out`, if there is one
    progress  a bar and the evaluations on stderr
    """
    run = Run(recipe, Path(out), resume, progress)
    run.go()
    return run.finish()


class Run:
    """One process's part of a training run."""

    def __init__(self, recipe: Recipe, out: Path, resume: bool, progress: bool) -> None:
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs
        except ImportError as e:
            raise ImportError("training needs accelerate: pip install 'mmcompress[train]'") from e

        # without the [CLS] objective the tower's last layer has no gradient, which DDP must know
        ddp = DistributedDataParallelKwargs(find_unused_parameters=not recipe.heads.cls)
        self.accelerator = Accelerator(kwargs_handlers=[ddp])
        self.recipe, self.out = recipe, out
        self.main = self.accelerator.is_main_process
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.progress = progress and self.main
        out.mkdir(parents=True, exist_ok=True)
        state = read_state(out, recipe.to_dict(), self.processes, resume)
        self.accelerator.wait_for_everyone()
        model, self.processor = load(recipe)
        model.set_attn_implementation(recipe.attention)
        torch.manual_seed(recipe.seed)
        self.learner = Learner(model, recipe).train()
        if state is not None:
            self.learner.load_state_dict(state["learner"])
        self.staged = self._staged(model, state)
        self.learner.to(self.accelerator.device)
        self.wrapped, *self.optimizers = self.accelerator.prepare(self.learner, *build_optimizers(self.learner, recipe.optim))
        for optimizer, saved in zip(self.optimizers, state["optimizers"] if state else ()):
            optimizer.load_state_dict(saved)
        self.step = state["step"] if state else 0
        self.log = Log(out, self.step, self.main)
        self.clock = Clock(self.accelerator.device, *(state["seconds"] if state else ()))
        self.counts = state["counts"] if state else {"tokens": 0, "image_tokens": 0, "flops": 0}

    def _staged(self, model: Any, state: dict[str, Any] | None) -> Any:
        """The recipe's schedule, attached where it stood; None without one."""
        if self.recipe.schedule is None:
            return None
        from .staged import StagedCompression

        staged = StagedCompression(self.recipe.schedule, total=self.recipe.steps).attach(model)
        if state is not None:
            staged.load_state_dict(state["staged"])
        return staged

    def go(self) -> None:
        """Every step that is left."""
        from tqdm import tqdm

        recipe = self.recipe
        with tqdm(total=recipe.steps, initial=self.step, unit="step", disable=None if self.progress else True) as bar:
            self.clock.start()
            for batch in self._batches():
                stage = None if self.staged is None else self.staged.stage.label()
                losses, lr = self._step(batch)
                bar.update()
                if self.step % recipe.log_every == 0 or self.step in (1, recipe.steps):
                    row = self._log_step(losses, lr, stage)
                    bar.set_postfix(loss=f"{row['lm']:.3f}", lr=f"{lr:.1e}")
                last = self.step == recipe.steps
                with self.clock.paused() as stands:
                    if last and recipe.average < 1:
                        average_with_start(self.learner.model, recipe)
                    if last or (recipe.eval.every and self.step % recipe.eval.every == 0):
                        self._evaluate(stands)
                    if last or self.step % recipe.save_every == 0:
                        self._save()

    def _batches(self) -> Iterator[Batch]:
        """The batches from this step on, drawn by `data.workers` processes."""
        numbers: Any = range(self.step, self.recipe.steps)
        data = self._stream(f"train/{self.recipe.seed}", self.recipe.batch, training=True)
        return iter(torch.utils.data.DataLoader(data, batch_size=None, sampler=numbers, num_workers=self.recipe.data.workers))

    def _stream(self, seed: str, batch: int, training: bool) -> Batches:
        data = self.recipe.data
        how = (self.processor.tokenizer, Geometry.of(self.learner.model.config), batch, seed, self.rank if training else 0,
               data.canvases, data.weights, data.odd, data.mix if training else None)
        return ClipBatches(data.clips, *how) if data.world == "clips" else Batches(data.world, *how)

    def _step(self, batch: Batch) -> tuple[dict[str, torch.Tensor], float]:
        """One optimizer step. -> (losses, learning rate)"""
        recipe = self.recipe
        self._count(batch)
        torch.manual_seed(random.Random(f"{recipe.seed}/{self.rank}/{self.step}").getrandbits(63))
        lr = set_rate(self.optimizers, rate(self.step, recipe.steps, recipe.optim))
        losses = self.wrapped(batch.to(self.accelerator.device), self.step)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.accelerator.backward(losses["loss"])
        self.accelerator.clip_grad_norm_(self.learner.parameters(), recipe.optim.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        if self.staged is not None:
            self.staged.step(self.step)
        return losses, lr

    def _count(self, batch: Batch) -> None:
        """Add a batch's tokens, and the FLOPs of the language model's forward pass over all of them."""
        rows, columns = batch.inputs["input_ids"].shape
        config, image_tokens = self.learner.model.config, rows * batch.canvas.tokens
        self.counts["tokens"] += image_tokens + batch.text_tokens
        self.counts["image_tokens"] += image_tokens
        self.counts["flops"] += prefill_flops(config, rows, [columns] * config.text_config.num_hidden_layers)

    def cost(self) -> dict[str, float]:
        """So far, in all processes as far as this one can tell: tokens of the prompts; image tokens that the language model
        saw, averaged over its layers; FLOPs of its forward passes."""
        cost: dict[str, float] = dict(self.counts)
        if self.staged is not None:
            stages = self.staged.summary()
            cost.update(image_tokens=sum(s["tokens_after"] for s in stages), flops=sum(s["flops_after"] for s in stages))
        return {k: v * self.processes for k, v in cost.items()}

    def _log_step(self, losses: dict[str, torch.Tensor], lr: float, stage: str | None) -> dict[str, Any]:
        row = {"event": "step", "step": self.step, **self.clock.read(), "lr": lr, "stage": stage,
               "pictures": self.step * self.recipe.batch * self.processes, **self.cost(),
               **{k: v.item() for k, v in losses.items()}}
        self.log.add(**row)
        return row

    def _evaluate(self, stands: dict[str, float]) -> None:
        """Uncompressed accuracy on the same held-out scenes for every run; the processes share the batches."""
        from accelerate.utils import gather_object
        from tqdm import tqdm

        asked = self.recipe.eval
        count = -(-asked.n // asked.batch)
        mine = ask(self.learner, self._stream("eval", asked.batch, training=False), range(self.rank, count, self.processes))
        found = summarize(gather_object(mine))
        for row in found:
            self.log.add(event="eval", step=self.step, **stands, **row)
        if self.progress:
            tqdm.write(f"step {self.step}, {stands['seconds']:.0f} s: " + ", ".join(
                f"{r['kind']} {r['accuracy']:.3f} ({r['hits']}/{r['n']})" for r in found), file=sys.stderr)

    def _save(self) -> None:
        if self.main:
            write_state(self.out, {
                "recipe": self.recipe.to_dict(), "processes": self.processes, "step": self.step,
                "seconds": list(self.clock.spent), "counts": self.counts, "learner": self.learner.state_dict(),
                "staged": None if self.staged is None else self.staged.state_dict(),
                "optimizers": [o.state_dict() for o in self.optimizers]})
        self.accelerator.wait_for_everyone()

    def finish(self) -> dict[str, Any]:
        """Save the model as pico is saved, draw the plots, sum up."""
        from ..viz.figure import save
        from .plots import plot_training

        cost, stages = self.cost(), [] if self.staged is None else self.staged.summary()
        if self.staged is not None:
            self.staged.detach()
        files = [str(self.out / name) for name in ("model", "log.jsonl", "state.pt", "training.png")]
        if self.main:
            self.learner.model.save_pretrained(self.out / "model")
            self.processor.save_pretrained(self.out / "model")
            save(plot_training({self.out.name: self.log.rows}), self.out / "training.png")
        self.accelerator.wait_for_everyone()
        last = [{k: v for k, v in r.items() if k != "event"} for r in self.log.rows
                if r["event"] == "eval" and r["step"] == self.step]
        return {"main": self.main, "steps": self.step, "seconds": self.clock.spent[0], "cpu_seconds": self.clock.spent[1],
                **cost, "parameters": sum(p.numel() for p in self.learner.model.parameters()), "eval": last,
                "stages": stages, "files": files}
