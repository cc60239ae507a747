"""Attach a compression schedule to any training: `Trainer` callback, accelerate loop, or a loop of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..compat import base_of, check_resumed, from_inside
from ..flops import prefill_flops
from ..wrap import Wrapped
from .schedule import Schedule, Stage

COUNTS = ("steps", "pictures", "tokens_before", "tokens_after", "flops_before", "flops_after")


class StagedCompression(TrainerCallback, ExportableState):
    """Reduces a model's pictures by a schedule while it trains; evaluation sees all tokens.

        Trainer(..., callbacks=[StagedCompression("llavolta-4stage")])

    or in a loop of your own, with or without accelerate:

        staged = StagedCompression("llavolta-4stage", total=steps).attach(model, accelerator)
        ...                                         # forward, backward, optimizer.step()
        staged.step()                               # behind optimizer.step()

    schedule       a `Schedule`, a preset's name, a YAML file or a list of stages
    total          optimizer steps of the whole training; `Trainer` knows it
    compress_eval  reduce in evaluation mode too

    The stage follows from the number of optimizer steps alone: under gradient accumulation micro-batches do not count, and a
    resumed training goes on in its stage. Checkpoints hold the schedule, which a resumed training must share, and
    what was counted so far: see `summary`.
    """

    def __init__(self, schedule: Any, total: int | None = None, compress_eval: bool = False) -> None:
        self.schedule = Schedule.build(schedule)
        self.total, self.compress_eval = total, compress_eval
        self.count = 0                                          # optimizer steps done
        self.counts: list[dict[str, float]] = [dict.fromkeys(COUNTS, 0) for _ in self.schedule.stages]
        self.handle: Wrapped | None = None
        self._accelerator: Any = None
        self._fitted = self.schedule                            # for the model's depth
        self._number = 0

    # attaching ----------------------------------------------------------------------------------------------------

    def attach(self, model: Any, accelerator: Any = None) -> StagedCompression:
        """Wrap `model`, which may be inside DDP, FSDP, PEFT or torch.compile, for the stage of the next step.

        accelerator  counts steps under gradient accumulation, and saves and loads the state with its checkpoints
        """
        if self.total is None:
            raise ValueError("total: how many optimizer steps will the training have? StagedCompression(schedule, total=...)")
        if self.handle is not None:
            raise ValueError("attached already; call detach() first")
        model = from_inside(model)
        self._fitted = self.schedule.for_depth(base_of(model).config.get_text_config().num_hidden_layers)
        self.handle = Wrapped(model, self._fitted.stages[-1].config)
        self.handle.only_training = not self.compress_eval
        self.handle.watch = self._watch
        if accelerator is not None:
            self._accelerator = accelerator
            accelerator.register_for_checkpointing(self)
        self._enter()
        return self

    def detach(self) -> None:
        """Leave the model as it was found."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    @property
    def stage(self) -> Stage | None:
        """The stage of the next optimizer step; None while nothing is attached."""
        return None if self.handle is None else self._fitted.stages[self._number]

    def step(self, done: int | None = None) -> Stage | None:
        """An optimizer step is done (or `done` of them, counted from the start): enter the stage of the next one.

        With an accelerator, calls within an accumulation are ignored, so it may stand in every micro-batch.
        """
        if done is None:
            if self._accelerator is not None and not self._accelerator.sync_gradients:
                return self.stage
            done = self.count + 1
        self.counts[self._number]["steps"] += max(0, done - self.count)
        self.count = done
        self._enter()
        return self.stage

    def _enter(self) -> None:
        if self.handle is None:
            raise ValueError("nothing is attached; call attach(model) first")
        assert self.total is not None
        self._number = self._fitted.number(self.count, self.total)
        config = self._fitted.stages[self._number].config
        if config != self.handle.config:
            self.handle.configure(config)

    # counting -------------------------------------------------------------------------------------------------------

    def _watch(self, run: Any) -> None:
        """Add one reduced forward call, from its plan: nothing is read from the device."""
        assert self.handle is not None
        if not self.handle.model.training:
            return
        depth, config = self.handle.adapter.depth, self.handle.model.config
        after, found = run.columns_by_layer(depth), self.counts[self._number]
        found["pictures"] += len(run.items)
        found["tokens_before"] += sum(item.before for item in run.items)
        found["tokens_after"] += sum(run.tokens_by_layer(depth)) / depth
        found["flops_before"] += prefill_flops(config, run.rows, [run.columns] * depth)
        found["flops_after"] += prefill_flops(config, run.rows, after)

    def summary(self) -> list[dict[str, Any]]:
        """Per stage: what it does, where it ends, and what this process's training forwards have cost so far.

        tokens_before and tokens_after are image tokens, the latter averaged over decoder layers; flops are those of the
        language model's forward passes (a backward pass costs about twice as many).
        """
        ends = self._fitted.boundaries(self.total) if self.total else [None] * len(self.counts)
        return [{"stage": i, "label": stage.label(), "until": end, **counts}
                for i, (stage, end, counts) in enumerate(zip(self._fitted.stages, ends, self.counts))]

    # checkpoints ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """For `accelerator.save_state`, or your own checkpoint."""
        return {"schedule": self.schedule.to_dict(), "total": self.total, "count": self.count,
                "counts": [dict(c) for c in self.counts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint stopped; raises if it was made under another schedule."""
        if state["schedule"] != self.schedule.to_dict():
            raise ValueError(f"the checkpoint was trained under another schedule, {state['schedule']}; resume with that one, "
                             f"or start anew")
        self.count = state["count"]
        self.counts = [dict(c) for c in state["counts"]]
        if self.handle is not None:
            self._enter()

    def state(self) -> dict[str, Any]:
        """For `Trainer`'s checkpoints."""
        return {"args": {"schedule": self.schedule.to_dict(), "total": self.total, "compress_eval": self.compress_eval},
                "attributes": {"count": self.count, "counts": self.counts}}

    # Trainer --------------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.total = state.max_steps
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if saved is not None and "attributes" in saved:
            self.load_state_dict({"schedule": saved["args"]["schedule"], **saved["attributes"]})
        self.count = state.global_step
        if state.global_step:
            check_resumed(from_inside(model), Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if self.handle is None:
            self.attach(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and self.handle is not None:
            for row in (logs, *state.log_history[-1:]):         # what reporters get, and what trainer_state.json keeps
                row["compression_stage"] = self._number

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()
