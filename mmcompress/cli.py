"""The command line: demo, run, list, eval, viz, train, tokenize. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from .evaluating import eval_app
from .options import (
    DEFAULT,
    Attn,
    Audio,
    Device,
    Dtype,
    End,
    Fps,
    Frames,
    Json,
    Keep,
    Model,
    Name,
    Options,
    Own,
    Start,
    Video,
    Where,
    emit,
    from_yaml,
    parse_keep,
    reducer_of,
)

DEFAULTS = {"image": DEFAULT, "video": "spatio_temporal_merge", "audio": "adaptive_spectral_pool"}      # of run and viz
QUESTIONS = {"image": "describe the picture.", "video": "describe the clip.", "audio": "what is to be heard?"}      # of viz

err = Console(stderr=True, highlight=False, soft_wrap=True)


class _Group(TyperGroup):
    """Ends what the user can mend (a wrong value, a lost file, an unknown model) as one line, with exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        from .errors import SignalError, WrapError

        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, ImportError, SignalError, WrapError) as e:
            if ctx.params.get("debug"):
                raise
            err.print(f"error: {_one_line(e)}", style="red", markup=False)
            raise typer.Exit(2) from e


def _one_line(e: Exception) -> str:
    if isinstance(e, ModuleNotFoundError) and e.name == "matplotlib":
        return 'this needs matplotlib: pip install "mmcompress[viz]"'
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return lines[0] if lines else type(e).__name__


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
                  pretty_exceptions_enable=False, help="Fewer image, video and audio tokens in stock transformers models.")
app.add_typer(eval_app, name="eval")


@app.callback()
def _main(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False) -> None:
    """Fewer image, video and audio tokens in stock transformers models."""


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Folder for the PNGs.")] = Path("out/demo"), keep: Keep = "0.25",
         method: Name = DEFAULT, as_json: Json = False) -> None:
    """Six questions about three pictures, answered by pico with all and with few image tokens, offline."""
    from .demo import run_demo

    result = run_demo(reducer_of(method, keep), out)
    if as_json:
        return emit(result)
    table = Table()
    for name in ("question", "truth", "stock", "wrapped"):
        table.add_column(name)
    table.add_column("tokens", justify="right")
    for a in result["answers"]:
        table.add_row(a["question"], a["truth"], *(_marked(a[side], a["truth"]) for side in ("stock", "wrapped")),
                      f"{a['tokens_before']} → {a['tokens_after']}")
    times = Table()
    times.add_column("")
    for stage in result["milliseconds"]["stock"]:
        times.add_column(stage, justify="right")
    for side, ms in result["milliseconds"].items():
        times.add_row(side, *(f"{value:.1f}" for value in ms.values()))
    print(f"pico with all tokens, and with {result['reducer']}")
    Console().print(table)
    print(f"\nmilliseconds a question, median of {len(result['answers'])} ({result['device']})")
    Console().print(times)
    print("six questions are an anecdote; `mmcompress eval pico` measures", "", *result["files"], sep="\n")


def _marked(answer: str, truth: str) -> str:
    return f"[green]{answer}[/green]" if answer == truth else f"[red]{answer}[/red]"


@app.command()
def run(model: Model,
        prompt: Annotated[str | None, typer.Option(
            help="The question, without placeholders of pictures, clips and recordings; Whisper takes none.")] = None,
        image: Annotated[list[Path] | None, typer.Option(help="A picture; repeatable.")] = None, video: Video = None,
        audio: Audio = None, frames: Frames = None, fps: Fps = None, start: Start = None, end: End = None,
        image_reducer: Annotated[str | None, typer.Option(
            help="As `mmcompress list` shows, or as YAML: '{name: globalcom2, keep: 0.5}'; default global_rank.")] = None,
        video_reducer: Annotated[str | None, typer.Option(
            help="The same for the clip; default spatio_temporal_merge. Where one of the three is given, only that is "
                 "reduced.")] = None,
        audio_reducer: Annotated[str | None, typer.Option(
            help=f"The same for the recording; default {DEFAULTS['audio']}.")] = None,
        layers: Annotated[str | None, typer.Option(
            help="Reducers inside the language model, as YAML: fastv, or '{name: fastv, layer: 2, keep: 0.5}'.")] = None,
        cache: Annotated[str | None, typer.Option(
            help="Plans for the key-value cache, as YAML: snapkv, or '{name: snapkv, keep: 0.25}', or a list of them.")] = None,
        keep: Own = None, option: Options = None,
        budget: Annotated[str | None, typer.Option(
            help="Instead of --keep: tokens of all together, a share or a count, divided by how much each has to say.")] = None,
        config: Annotated[Path | None, typer.Option(help="A YAML file instead of the reducers and their options.")] = None,
        positions: Where = None,
        max_new_tokens: Annotated[int | None, typer.Option(
            help="Of the answer; default 128, and for Whisper what its configuration says.")] = None,
        device: Device = "auto", dtype: Dtype = "auto", attn: Attn = "sdpa",
        plot: Annotated[Path | None, typer.Option(
            help="Write the kept tokens of the recording, else of the clip, else of the first picture.")] = None,
        as_json: Json = False) -> None:
    """Ask a checkpoint about pictures, a clip, a recording, with fewer of their tokens; print the answer and what it saved."""
    from .asking import ask, check_prompt, open_shown
    from .checkpoint import hearing_rate, load
    from .config import WrapConfig, build_cache, build_layers

    given = {"image": image_reducer, "video": video_reducer, "audio": audio_reducer}
    if config is not None and (*given.values(), layers, cache, keep, option, budget, positions) != (None,) * 9:
        raise ValueError("pass either --config or --image-reducer, --video-reducer, --audio-reducer, --layers, --cache, "
                         "--keep, --option, --budget and --positions, not both")
    if keep is not None and budget is not None:
        raise ValueError("--keep and --budget: the budget decides what each keeps; pass one of them")
    rate = 0 if audio is None else hearing_rate(model)
    shown = open_shown(image or (), video, frames, fps, start, end, audio, rate)
    default = (layers, cache) == (None, None) or (keep, option, budget) != (None,) * 3
    chosen = WrapConfig.load(config) if config is not None else WrapConfig(
        **reducers_of(given, shown.slots, keep, option, default),
        layers=build_layers(from_yaml("--layers", layers) if layers else ()),
        cache=build_cache(from_yaml("--cache", cache) if cache else ()), positions=cast("Any", positions),
        budget=None if budget is None else parse_keep(budget, "--budget"))
    if plot is not None and not chosen.before and not chosen.layers:
        raise ValueError(f"--plot {plot}: only the cache is made smaller, and the language model reads every token; add "
                         f"--{shown.slots[-1]}-reducer to draw what it keeps")
    check_prompt(model, prompt)
    loaded, processor = load(model, device, dtype, attn, video=video is not None)
    answer, report = ask(loaded, processor, shown, prompt, chosen, max_new_tokens, plot)
    if as_json:
        return emit({"model": model, "prompt": prompt, "answer": answer, **shown.facts(), "report": report.to_dict(),
                     "plot": None if plot is None else str(plot)})
    print(f"{answer}\n\n{report}" + ("" if plot is None else f"\n{plot}"))


@app.command("list")
def list_methods(markdown: Annotated[bool, typer.Option("--markdown", help="The table of README.md.")] = False,
                 as_json: Json = False) -> None:
    """Every registered reducer and cache plan with its options."""
    from .docs import methods, methods_table
    from .tables import methods_shown

    if as_json:
        return emit({"methods": [vars(m) for m in methods()]})
    if markdown:
        return print(methods_table(), end="")
    Console().print(methods_shown(methods()))


@app.command()
def viz(out: Annotated[Path, typer.Option(help="The PNG to write.")],
        image: Annotated[Path | None, typer.Option(help="A picture.")] = None, video: Video = None, audio: Audio = None,
        frames: Frames = None, fps: Fps = None, start: Start = None, end: End = None,
        method: Annotated[str | None, typer.Option(
            help=f"As `mmcompress list` shows; default {DEFAULTS['image']}, {DEFAULTS['video']} for a video, "
                 f"{DEFAULTS['audio']} for a recording.")] = None,
        keep: Own = None, option: Options = None, model: Model = "pico",
        prompt: Annotated[str | None, typer.Option(help="For methods that read the question.")] = None,
        device: Device = "auto", dtype: Dtype = "auto", attn: Attn = "sdpa", as_json: Json = False) -> None:
    """Draw which tokens of a picture, a clip or a recording a method keeps; the language model does not run."""
    from .asking import draw, open_shown, reduced
    from .checkpoint import hearing_rate, load
    from .config import WrapConfig
    from .registry import label

    if sum(file is not None for file in (image, video, audio)) > 1:
        raise ValueError("--image, --video and --audio: one is drawn at a time; pass one of them")
    rate = 0 if audio is None else hearing_rate(model)
    shown = open_shown([] if image is None else [image], video, frames, fps, start, end, audio, rate)
    [slot] = shown.slots
    reducer = reducer_of(method or DEFAULTS[slot], keep, option, slot)
    loaded, processor = load(model, device, dtype, attn, video=video is not None)
    item = reduced(loaded, processor, shown, prompt or QUESTIONS[slot], WrapConfig(**{slot: reducer}))
    draw(shown, item, out)
    if as_json:
        return emit({"reducer": repr(reducer), "tokens_before": item.before, "tokens_after": item.after,
                     **shown.facts(), "files": [str(out)]})
    print(f"{label(reducer)}: {item.before} -> {item.after} tokens\n{out}")


@app.command()
def train(recipe: Annotated[Path, typer.Argument(help="A YAML file such as configs/pico-small.yaml.")],
          out: Annotated[Path | None, typer.Option(help="Folder for checkpoints, log and plots; default out/NAME.")] = None,
          resume: Annotated[bool, typer.Option("--resume", help="Go on from --out's checkpoint, if there is one.")] = False,
          changes: Annotated[list[str] | None, typer.Option("--set", help="key=value, as optim.lr=1e-3; repeatable.")] = None,
          as_json: Json = False) -> None:
    """Train by a recipe, from scratch or from weights; several processes by `accelerate launch -m mmcompress train ...`."""
    import transformers

    from .tables import answers_by_kind, codec_measured
    from .train.kinds import load

    transformers.utils.logging.disable_progress_bar()                   # ours remains
    kind, what, run_recipe = load(recipe, changes or ())
    result = run_recipe(what, out or Path("out") / recipe.stem, resume)
    if not result.pop("main"):                                         # another process prints
        return None
    if as_json:
        return emit(result)
    heard = f"{result['heard']:.0f} s of sound" if kind == "xcodec" else f"{result['tokens'] / result['seconds']:.0f} tokens/s"
    print(f"{result['steps']} steps, {result['seconds']:.0f} s, {heard}")
    Console().print(codec_measured(result["eval"]) if kind == "xcodec" else answers_by_kind(result["eval"]))
    print("", *result["files"], sep="\n")


@app.command()
def tokenize(files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Sound files, and folders to search.")],
             model: Annotated[str, typer.Option(
                 help="Hub id or folder of a codec: dac, encodec, mimi, neucodec, xcodec or xcodec2.")],
             out: Annotated[Path, typer.Option(help="Folder for the code files; the same command goes on in it.")],
             n_q: Annotated[int | None, typer.Option("--n-q", help="Books to keep; default all.")] = None,
             kbps: Annotated[float | None, typer.Option(help="Or the most books within a nominal rate.")] = None,
             tokens_per_second: Annotated[float | None, typer.Option(help="Or within so many tokens a second.")] = None,
             workers: Annotated[int, typer.Option(help="Processes on the CPU, each with the model.")] = 1,
             device: Device = "auto",
             chunk: Annotated[float, typer.Option(help="Seconds encoded at once.")] = 60.0,
             context: Annotated[float | None, typer.Option(
                 help="Seconds heard before and behind each chunk; default as far as the codec sees, or 5.")] = None,
             as_json: Json = False) -> None:
    """Sound files to discrete tokens by a neural codec, a .safetensors each, with a manifest; what is done is skipped."""
    from .tokenizing import tokenize_files

    rates = {"--n-q": n_q, "--kbps": kbps, "--tokens-per-second": tokens_per_second}
    if len(given := [name for name, value in rates.items() if value is not None]) > 1:
        raise ValueError(f"{' and '.join(given)}: each says how many books to keep; pass one of them")
    result = tokenize_files(files, model, out, n_q=n_q, kbps=kbps, tokens_per_second=tokens_per_second, workers=workers,
                            device=device, chunk=chunk, context=context)
    for failure in result.failures:
        named = "" if failure["source"] in failure["reason"] else f"{failure['source']}: "
        err.print(f"failed: {named}{failure['reason']}", style="red", markup=False)
    if result.interrupted:
        err.print("interrupted: the same command goes on", style="red")
    if as_json:
        emit(result.to_dict())
    else:
        print(result)
    raise typer.Exit(result.exit_code)


# what the commands share


def reducers_of(given: dict[str, str | None], slots: tuple[str, ...], keep: str | None, options: list[str] | None,
                default: bool) -> dict[str, Any]:
    """Slot -> reducer from what the command line says of each slot: a name, a YAML mapping, or None.

    slots     what there is to reduce
    keep      of the reducers that are named; `options` of the only one that is
    default   where no slot is given, take each one's default
    """
    from . import registry

    for slot, text in given.items():
        if text is not None and slot not in slots:
            raise ValueError(f"--{slot}-reducer {text}: there is nothing to reduce without --{slot}")
    said = {slot: from_yaml(f"--{slot}-reducer", text) for slot, text in given.items() if text is not None}
    if not said and default:
        said = {slot: DEFAULTS[slot] for slot in slots}
    named = [slot for slot, value in said.items() if isinstance(value, str)]
    if options and len(named) > 1:
        last = named[-1]
        raise ValueError(f"--option {options[0]}: of the {' or of the '.join(named)} reducer? Write them as YAML, such as "
                         f"--{last}-reducer '{{name: {said[last]}, keep: 0.25}}'")
    if said and not named and (keep or options):
        raise ValueError("--keep and --option are for reducers given by name; write them into the YAML")
    return {slot: reducer_of(value, keep, options, slot) if slot in named else registry.build(slot, value)
            for slot, value in said.items()}


def main() -> None:
    """Entry point of the `mmcompress` command."""
    app()
