"""`mmcompress demo`: pico answers questions with all and with few image tokens, side by side."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median
from typing import Any

from . import pico
from .checkpoint import PICO, device_name, load
from .image import Uniform
from .pipeline import Item
from .registry import label
from .viz import contact_sheet, plot_kept, save
from .wrap import wrap

SCENES = (("cards", 336, 336), ("cards", 168, 504), ("receipt", 336, 336))       # kind, height, width
SEED, QUESTIONS = "demo", 2                                                      # of each picture


def run_demo(reducer: Any, out: Path) -> dict[str, Any]:
    """Ask, time and draw. -> answers, median milliseconds per stage and the files written, as plain data.

    Answers called "stock" are the model's before any wrap. Its stages are timed through a wrap that keeps everything,
    which runs the same modules on the same tokens.
    """
    model, processor = load(PICO, "auto", "auto", "sdpa")
    asked = [(image, q, a) for image, pairs in _scenes() for q, a in pairs]
    prompts = [processor(images=image, text=pico.prompt(q), return_tensors="pt").to(model.device, model.dtype)
               for image, q, _ in asked]

    def answer(inputs: Any) -> str:
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()

    def answer_with(image: Any, inputs: Any) -> tuple[str, dict[str, float], Item]:
        with wrap(model, image=image) as w:
            return answer(inputs), w.report.milliseconds, w.last[0]

    everything = Uniform(keep=1.0)
    answer_with(reducer, prompts[0]), answer_with(everything, prompts[0])        # warms up
    stock = [answer(inputs) for inputs in prompts]
    runs = [(answer_with(everything, inputs), answer_with(reducer, inputs)) for inputs in prompts]
    milliseconds = {side: _median([run[i][1] for run in runs]) for i, side in enumerate(("stock", "wrapped"))}
    wrapped, items = [run[1][0] for run in runs], [run[1][2] for run in runs]

    files, shown = [], range(0, len(asked), QUESTIONS)
    for number, i in enumerate(shown, 1):
        files.append(out / f"kept-{number}.png")
        save(plot_kept(asked[i][0], items[i]), files[-1])
    notes = [[(asked[j][1], wrapped[j], wrapped[j] == asked[j][2]) for j in range(i, i + QUESTIONS)] for i in shown]
    files.append(out / "sheet.png")
    save(contact_sheet([asked[i][0] for i in shown], [items[i] for i in shown], notes, label(reducer)), files[-1])
    answers = [{"question": q, "truth": a, "stock": s, "wrapped": t, "tokens_before": item.before, "tokens_after": item.after}
               for (_, q, a), s, t, item in zip(asked, stock, wrapped, items)]
    return {"reducer": label(reducer), "device": device_name(model), "answers": answers, "milliseconds": milliseconds,
            "files": [str(f) for f in files]}


def _scenes() -> list[tuple[Any, list[tuple[str, str]]]]:
    """(image, [(question, answer), ...]) of each scene, the same in every run."""
    out = []
    for i, (kind, height, width) in enumerate(SCENES):
        rng = random.Random(f"{SEED}/{i}")
        _, image, objects = pico.scenes.scene(rng, height, width, kind)
        pairs: dict[str, str] = {}
        while len(pairs) < QUESTIONS:
            pairs.update(pico.scenes.questions(rng, kind, objects, 1))
        out.append((image, list(pairs.items())))
    return out


def _median(times: list[dict[str, float]]) -> dict[str, float]:
    """Median over the questions of each stage and of their total."""
    totals = [{**t, "total": sum(t.values())} for t in times]
    return {stage: median(t[stage] for t in totals) for stage in totals[0]}
