"""One training step of a codec: it is heard, its judge learns to tell made from real, then it learns to pass."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...audio.xcodec import PQMF, XCodecOutput, discriminator_loss, generator_losses
from .recipe import CodecRecipe, Optim


class Sides:
    """The codec and, unless the recipe has none, its judge, each with its AdamW; prepared by accelerate."""

    def __init__(self, accelerator: Any, model: Any, judge: Any, recipe: CodecRecipe) -> None:
        self.accelerator, self.recipe = accelerator, recipe
        self.model: Any = model.to(accelerator.device)
        self.judge: Any = None if judge is None else judge.to(accelerator.device)
        self.bank = PQMF().to(accelerator.device)
        self.codec, self.codec_optimizer = accelerator.prepare(self.model, adamw(self.model, recipe.optim))
        if self.judge is not None:
            self.court, self.judge_optimizer = accelerator.prepare(self.judge, adamw(self.judge, recipe.optim))

    def step(self, audio: Tensor, number: int) -> dict[str, Tensor]:
        """-> the unweighted terms, "loss" (the codec's), "judge" (its judge's)"""
        rate = self.recipe.optim.lr * share(number, self.recipe.optim)
        judged = self.judge is not None and self.recipe.judge is not None and number >= self.recipe.judge.start
        with self._precision():
            output = self.codec(audio, step=number)
        losses = {}
        if judged:
            losses["judge"] = self._judge_learns(output.waveform.detach(), audio, rate)
        with self._precision():
            terms = self._terms(output, audio, judged)
        self._learn(self.model, self.codec_optimizer, terms["loss"], rate)
        return {k: v.detach() for k, v in (terms | losses).items()}

    def _judge_learns(self, fake: Tensor, audio: Tensor, rate: float) -> Tensor:
        with self._precision():
            scores, _ = self.court(torch.cat([audio, fake]))                # one forward: DDP counts them
            real, made = zip(*(s.chunk(2) for s in scores))
            loss = discriminator_loss(made, real)
        self._learn(self.judge, self.judge_optimizer, loss, rate)
        return loss.detach()

    def _terms(self, output: XCodecOutput, audio: Tensor, judged: bool) -> dict[str, Tensor]:
        if not judged:
            weights = self.recipe.weights
            return generator_losses(output, audio, self.bank, weights)
        for parameter in self.judge.parameters():
            parameter.requires_grad_(False)
        try:
            with torch.no_grad():
                real = self.judge(audio)
            return generator_losses(output, audio, self.bank, self.recipe.weights, self.judge(output.waveform), real)
        finally:
            for parameter in self.judge.parameters():
                parameter.requires_grad_(True)

    def _learn(self, model: Any, optimizer: Any, loss: Tensor, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(model.parameters(), self.recipe.optim.clip)
        optimizer.step()

    def _precision(self) -> Any:
        if self.recipe.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, torch.bfloat16)

    def state_dict(self) -> dict[str, Any]:
        state = {"model": self.model.state_dict(), "codec_optimizer": self.codec_optimizer.state_dict()}
        if self.judge is None:
            return state
        return state | {"judge": self.judge.state_dict(), "judge_optimizer": self.judge_optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, saved in state.items():
            getattr(self, name).load_state_dict(saved)


def adamw(model: Any, how: Optim) -> torch.optim.Optimizer:
    learns = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(learns, lr=how.lr, betas=(how.betas[0], how.betas[1]), eps=how.eps, weight_decay=how.weight_decay)


def share(step: int, how: Optim) -> float:
    """Of the learning rate at a 0-based step: a linear warm-up times gamma ** step."""
    warm = min(1.0, (step + 1) / how.warmup) if how.warmup else 1.0
    return warm * how.gamma ** step
