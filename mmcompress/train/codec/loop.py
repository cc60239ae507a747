"""Runs a codec's recipe: `train(recipe, out)`. Alone, or on several processes by `accelerate launch -m mmcompress train ...`.

As with pico (../loop.py) a step is a pure function of the weights, the optimizers' states and (seed, rank, step): a resumed
run goes on exactly where the other stopped, judge included. Each process hears its own segments; codebooks learn from all
processes' vectors. In `out`: log.jsonl, state.pt to resume from, training.png, and at the end model/, a stock XcodecModel.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from ...audio.xcodec import MultiFrequencyDiscriminator, XCodec
from ..record import Clock, Log, read_state, write_state
from .measure import measure
from .recipe import CodecRecipe
from .segments import Segments, batches, sources
from .step import Sides

EVAL_BATCH = 8


def train(recipe: CodecRecipe, out: str | Path, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train, evaluate, save. -> what `mmcompress train --json` prints; only the process whose "main" is true writes files.

    resume    go on from the checkpoint in `out`, if there is one
    progress  a bar and the evaluations on stderr
    """
    run = Run(recipe, Path(out), resume, progress)
    run.go()
    return run.finish()


def codec_of(recipe: CodecRecipe) -> XCodec:
    """The codec to train, from scratch or from weights."""
    from ...audio.xcodec.teacher import build

    torch.manual_seed(recipe.seed)
    if recipe.init is not None:
        model = XCodec.from_pretrained(recipe.init, semantic=recipe.semantic, rvq=recipe.rvq, dtype=torch.float32)
        return model.train()
    shape = recipe.model
    assert shape is not None                        # the recipe has seen to it
    return build(recipe.teacher, width=shape.width, acoustic=shape.acoustic, decoder=shape.decoder, codes=shape.codes,
                 books=shape.books, ratios=shape.ratios, sample_rate=shape.sample_rate, semantic=recipe.semantic,
                 rvq=recipe.rvq)


class Run:
    """One process's part of a training run."""

    def __init__(self, recipe: CodecRecipe, out: Path, resume: bool, progress: bool) -> None:
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs
        except ImportError as e:
            raise ImportError("training needs accelerate: pip install 'mmcompress[train]'") from e

        # codebooks are buffers that change in a forward pass, alike in all processes
        self.accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
        self.recipe, self.out = recipe, out
        self.main = self.accelerator.is_main_process
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.progress = progress and self.main
        out.mkdir(parents=True, exist_ok=True)
        state = read_state(out, recipe.to_dict(), self.processes, resume)
        self.accelerator.wait_for_everyone()
        model = codec_of(recipe)
        if recipe.weight_norm:
            model.apply_weight_norm()
        self.sides = Sides(self.accelerator, model, self._judge(model.config.sample_rate), recipe)
        if state is not None:
            self.sides.load_state_dict(state["sides"])
        self.learned, self.unheard = sources(recipe.data, model.config.sample_rate)
        self.step = state["step"] if state else 0
        self.log = Log(out, self.step, self.main)
        self.clock = Clock(self.accelerator.device, *(state["seconds"] if state else ()))

    def _judge(self, rate: int) -> MultiFrequencyDiscriminator | None:
        how = self.recipe.judge
        return None if how is None else MultiFrequencyDiscriminator(how.hops, how.hidden, rate)

    def go(self) -> None:
        """Every step that is left."""
        from tqdm import tqdm

        recipe = self.recipe
        with tqdm(total=recipe.steps, initial=self.step, unit="step", disable=None if self.progress else True) as bar:
            self.clock.start()
            for audio in self._batches():
                torch.manual_seed(random.Random(f"{recipe.seed}/{self.rank}/{self.step}").getrandbits(63))
                losses = self.sides.step(audio.to(self.accelerator.device), self.step)
                self.step += 1
                bar.update()
                if self.step % recipe.log_every == 0 or self.step in (1, recipe.steps):
                    row = self._log_step(losses)
                    bar.set_postfix(loss=f"{row['loss']:.2f}")
                last = self.step == recipe.steps
                with self.clock.paused() as stands:
                    if last or (recipe.eval.every and self.step % recipe.eval.every == 0):
                        self._evaluate(stands)
                    if last or self.step % recipe.save_every == 0:
                        self._save()

    def _batches(self) -> Any:
        recipe = self.recipe
        segments = Segments(self.learned, f"train/{recipe.seed}/{self.rank}", recipe.batch, self._samples(recipe.data.seconds),
                            recipe.data.gain)
        return batches(segments, range(self.step, recipe.steps), recipe.data.workers)

    def _samples(self, seconds: float) -> int:
        """Whole frames of about so many seconds, in samples."""
        config = self.sides.model.config
        return max(1, round(seconds * config.sample_rate / config.hop_length)) * config.hop_length

    def _log_step(self, losses: dict[str, torch.Tensor]) -> dict[str, Any]:
        heard = self.step * self.recipe.batch * self.processes * self.recipe.data.seconds
        row = {"event": "step", "step": self.step, **self.clock.read(), "heard": heard,
               "lr": self.sides.codec_optimizer.param_groups[0]["lr"], **{k: v.item() for k, v in losses.items()}}
        self.log.add(**row)
        return row

    def _evaluate(self, stands: dict[str, float]) -> None:
        """On the same held-out segments in every run; the main process measures, the others wait."""
        import sys

        from tqdm import tqdm

        if self.main:
            how = self.recipe.eval
            size = min(EVAL_BATCH, how.n)
            segments = Segments(self.unheard, "eval", size, self._samples(how.seconds))
            found = measure(self.sides.model, (segments[i] for i in range(-(-how.n // size))))
            self.log.add(event="eval", step=self.step, **stands, **found)
            if self.progress:
                semantic = "" if found["semantic"] is None else f"semantic {found['semantic']:.2f}, "
                tqdm.write(f"step {self.step}, {stands['seconds']:.0f} s: log spectrum {found['log']:.3f}, {semantic}"
                           f"codes used {', '.join(f'{u:.0%}' for u in found['used'])}", file=sys.stderr)
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        if self.main:
            write_state(self.out, {"recipe": self.recipe.to_dict(), "processes": self.processes, "step": self.step,
                                   "seconds": list(self.clock.spent), "sides": self.sides.state_dict()})
        self.accelerator.wait_for_everyone()

    def finish(self) -> dict[str, Any]:
        """Save the codec as a stock XcodecModel with its feature extractor, draw the plots, sum up."""
        from transformers import DacFeatureExtractor

        from ...viz.figure import save
        from .plots import plot_codec

        model = self.sides.model
        if self.recipe.weight_norm:
            model.remove_weight_norm()
        files = [str(self.out / name) for name in ("model", "log.jsonl", "state.pt", "training.png")]
        if self.main:
            model.eval().save_pretrained(self.out / "model")
            DacFeatureExtractor(1, model.config.sample_rate, hop_length=model.config.hop_length).save_pretrained(
                self.out / "model")
            save(plot_codec({self.out.name: self.log.rows}), self.out / "training.png")
        self.accelerator.wait_for_everyone()
        last = [{k: v for k, v in r.items() if k != "event"} for r in self.log.rows
                if r["event"] == "eval" and r["step"] == self.step]
        return {"main": self.main, "steps": self.step, "seconds": self.clock.spent[0], "cpu_seconds": self.clock.spent[1],
                "heard": self.step * self.recipe.batch * self.processes * self.recipe.data.seconds,
                "parameters": sum(p.numel() for p in model.parameters()), "eval": last, "files": files}
