"""The claim of the audio reducers: how many words a Whisper gets wrong when its decoder reads fewer encoder states.

    python benchmarks/speech.py make corpus
    python benchmarks/audio_wer.py corpus --model whisper-tiny.en --out out/audio_wer.csv

Every reducer that needs no question, at equal counts; clips are encoded once (but for reducers that work inside the encoder),
greedy decoding of one window. Differences are paired over clips. Words are few, so the finer measure stands beside them: the
Kullback-Leibler divergence of the decoder's next-token distribution from that with all states, along the stock transcript, in
thousandths of a nat a token. `--log` keeps every finished setting, so that a run can go on. Writes CSV, and PNG beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import positive, print_table, versions, write_csv
from speech import RATE, Clip, Errors, difference, encode, read_corpus, transcribe, word_error_rate, word_errors
from torch import Tensor
from tqdm import tqdm

import mmcompress
from mmcompress.adapters import adapter_for
from mmcompress.config import WrapConfig
from mmcompress.registry import build, reducer_class
from mmcompress.seq2seq import encoded_states

KEEPS = (0.75, 0.5, 0.33, 0.25, 0.15)
BASELINES = ("stride", "mean_pool")
COLUMNS = ("method", "keep", "clips", "n", "words", "wer", "low", "high", "states", "sub", "del", "ins", "vs_all", "vs_all_pm",
           *(f"vs_{name}{pm}" for name in BASELINES for pm in ("", "_pm")), "kl", "kl_pm")
SHOWN = tuple(c for c in COLUMNS if c not in ("clips", "n", "words", "states", "sub", "del", "ins"))


class Found(NamedTuple):
    """What one setting made of the clips."""
    errors: list[Errors]
    kl: list[tuple[float, int]]             # nats, tokens
    said: list[str]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Whisper checkpoint with its processor")
    parser.add_argument("--methods", help="names, comma-separated, or YAML mappings a line; default: all without a question")
    parser.add_argument("--keep", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--every", type=positive, default=1, help="take every n-th clip")
    parser.add_argument("--first", type=int, default=0, help="and of these begin with this one")
    parser.add_argument("--states", type=Path, help="file that keeps the encoder's states between runs")
    parser.add_argument("--log", type=Path, help="file that keeps each setting's errors (JSON lines)")
    parser.add_argument("--out", type=Path, default=Path("out/audio_wer.csv"))
    options = parser.parse_args(argv)
    import transformers

    transformers.utils.logging.set_verbosity_error()                # generate() warns of what Whisper's own does
    model = transformers.WhisperForConditionalGeneration.from_pretrained(options.model).eval()
    processor = transformers.WhisperProcessor.from_pretrained(options.model)
    everything = read_corpus(options.corpus)
    states, _ = encode(model, processor, everything, cache=options.states)
    chosen = slice(options.first, None, options.every)
    clips, states = everything[chosen], states[chosen]
    settings = [(m, k) for m in chosen_methods(options.methods) for k in options.keep]
    found = measure(model, processor, clips, states, settings, options.log)
    rows = table(found, clips)
    write_csv(options.out, [{**row, **versions(model.device, model.dtype)} for row in rows])
    print_table(f"word error rate, {options.model.name}, greedy", [r for r in rows if r["clips"] == "all"], SHOWN)
    draw(rows, options.out.with_suffix(".png"))
    print(f"{options.out}\n{options.out.with_suffix('.png')}")


def chosen_methods(text: str | None) -> list[Any]:
    """Names or mappings of reducers."""
    import yaml

    if text is None:
        return [name for name in mmcompress.available("audio") if not reducer_class("audio", name).reads_question]
    return yaml.safe_load(text) if text.lstrip().startswith(("-", "[")) else [name.strip() for name in text.split(",")]


def named(method: Any) -> str:
    """A method in the table: its name, and the options that were given."""
    if isinstance(method, str):
        return method
    options = ", ".join(f"{key}={value}" for key, value in method.items() if key != "name")
    return f"{method['name']} ({options})"


def measure(model: Any, processor: Any, clips: Sequence[Clip], states: Tensor, settings: Iterable[tuple[Any, float]],
            log: Path | None) -> dict[tuple[str, float], Found]:
    """(method, keep) -> what was found; keep 1 is the stock model."""
    names = [c.file for c in clips]
    out = {key: found for key, found in _logged(log, names)}
    said = None
    for method, keep in tqdm([("all", 1.0), *settings], unit="setting", desc="score"):
        name = named(method)
        if (name, keep) in out:
            said = out[name, keep].said if method == "all" else said
            continue
        reduced = states if method == "all" else reduce_states(model, processor, clips, states, method, keep)
        texts = transcribe(model, processor, reduced, order=[len(c.text) for c in clips])
        said = texts if said is None else said
        errors = [word_errors(c.text, text) for c, text in zip(clips, texts)]
        found = Found(errors, divergences(model, processor, states, reduced, said), texts)
        if log is not None:
            with log.open("a") as file:
                print(json.dumps({"method": name, "keep": keep, "clips": names, **found._asdict()}), file=file)
        out[name, keep] = found
    return {key: out[key] for key in [("all", 1.0), *((named(m), k) for m, k in settings)]}


def _logged(log: Path | None, names: list[str]) -> Iterator[tuple[tuple[str, float], Found]]:
    if log is not None and log.is_file():
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            if entry["clips"] == names:
                yield (entry["method"], entry["keep"]), Found(
                    [Errors(*e) for e in entry["errors"]], [(nats, tokens) for nats, tokens in entry["kl"]], entry["said"])


@torch.inference_mode()
def divergences(model: Any, processor: Any, states: Tensor, reduced: Tensor, said: Sequence[str], batch: int = 8
                ) -> list[tuple[float, int]]:
    """Divergence from the decoder over all states, summed along each stock transcript, and its tokens."""
    from transformers.modeling_outputs import BaseModelOutput

    out = []
    for i in range(0, len(said), batch):
        ids = [torch.tensor(processor.tokenizer(text).input_ids) for text in said[i:i + batch]]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        log_p, log_q = (model(encoder_outputs=BaseModelOutput(last_hidden_state=x[i:i + batch]), decoder_input_ids=padded
                              ).logits.log_softmax(-1) for x in (states, reduced))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)                                                 # (B, L)
        for row, one in zip(kl, ids):                           # the last token is the end, behind which nothing is said
            out.append((float(row[1:len(one) - 1].sum()), max(1, len(one) - 2)))
    return out


@torch.inference_mode()
def reduce_states(model: Any, processor: Any, clips: Sequence[Clip], states: Tensor, method: Any, keep: float, batch: int = 8
                  ) -> Tensor:
    """What a reducer leaves of the states of every clip. -> (n, K, D)"""
    reducer = build("audio", {**({"name": method} if isinstance(method, str) else method), "keep": keep})
    config, out = WrapConfig(audio=reducer), []
    for i in range(0, len(clips), batch):
        audio = [c.audio() for c in clips[i:i + batch]]
        mel = processor(audio, sampling_rate=RATE, return_tensors="pt").input_features
        if reducer.in_encoder:
            with mmcompress.wrap(model, config):
                out.append(model.get_encoder()(mel).last_hidden_state)
        else:
            out.append(encoded_states(adapter_for(model), mel, states[i:i + batch], config)[0])
    return torch.cat(out)


def table(found: dict[tuple[str, float], Found], clips: Sequence[Clip]) -> list[dict[str, Any]]:
    """A row for each setting over all clips, and over those of each source."""
    errors = {key: held.errors for key, held in found.items()}
    rows = []
    groups = {"all": range(len(clips))}
    groups |= {source: [i for i, c in enumerate(clips) if c.source == source] for source in sorted({c.source for c in clips})}
    for group, which in groups.items():
        pick = lambda some: [some[i] for i in which]  # noqa: B023, E731
        for (method, keep), held in errors.items():
            mine = pick(held)
            rate = word_error_rate(mine)
            total = [sum(e[i] for e in mine) for i in range(4)]
            row = {"method": method, "keep": keep, "clips": group, "n": rate.n, "words": total[3], "wer": 100 * rate.value,
                   "low": 100 * rate.low, "high": 100 * rate.high, "states": int(1500 * keep + 1e-9), "sub": total[0],
                   "del": total[1], "ins": total[2]}
            for name, other in (("all", ("all", 1.0)), *((b, (b, keep)) for b in BASELINES)):
                more = difference(mine, pick(errors[other])) if other in errors else None
                row[f"vs_{name}"] = None if more is None else 100 * more.value
                row[f"vs_{name}_pm"] = None if more is None else 50 * (more.high - more.low)
            row["kl"], row["kl_pm"] = mean_divergence(pick(found[method, keep].kl))
            rows.append(row)
    return rows


def mean_divergence(kl: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Thousandths of a nat a token, and half the width of a 95 % interval over clips (ratio estimator)."""
    sums, tokens = torch.tensor(kl, dtype=torch.float64).T
    mean = sums.sum() / tokens.sum()
    error = (sums - mean * tokens).square().sum().sqrt() / tokens.sum()
    return float(1000 * mean), float(1960 * error)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Word error rate over states kept, a line a method."""
    from mmcompress.viz.figure import INK, SOFT, new_figure, quiet, save

    figure = new_figure(8.6, 4.8)
    ax = figure.add_axes((0.08, 0.12, 0.63, 0.84))
    shown = [r for r in rows if r["clips"] == "all"]
    [stock] = [r for r in shown if r["method"] == "all"]
    ax.axhline(stock["wer"], color=INK, linewidth=1, linestyle=":")
    ax.text(0.01, stock["wer"] / 1.02, "all states", color=INK, fontsize=8, va="top", transform=ax.get_yaxis_transform())
    for method in dict.fromkeys(r["method"] for r in shown if r["method"] != "all"):
        mine = sorted((r for r in shown if r["method"] == method), key=lambda r: r["keep"])
        [line] = ax.plot([r["keep"] for r in mine], [r["wer"] for r in mine], marker="o", markersize=3.5, linewidth=1.4,
                         label=method, linestyle="--" if method in (*BASELINES, "random") else "-")
        ax.fill_between([r["keep"] for r in mine], [r["low"] for r in mine], [r["high"] for r in mine], alpha=0.08,
                        color=line.get_color(), linewidth=0)
    ax.set_xlabel("share of the encoder's states kept", color=SOFT, fontsize=9)
    ax.set_ylabel(f"word error rate, % ({stock['n']} clips, {stock['words']} words)", color=SOFT, fontsize=9)
    ax.set_yscale("log")
    ticks = [t for t in (2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100) if t >= 0.8 * stock["wer"]]
    ax.set_yticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    quiet(ax)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, path)


if __name__ == "__main__":
    main()
