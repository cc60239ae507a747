"""The command line: demo, run, list, eval pico, viz, train. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

if TYPE_CHECKING:
    pass

DEFAULT = "global_rank"                 # the method of demo, eval and viz

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
                  pretty_exceptions_enable=False, help="Fewer image tokens in stock transformers models.")
eval_app = typer.Typer(no_args_is_help=True, help="What a reducer costs in accuracy.")
app.add_typer(eval_app, name="eval")

Name = Annotated[str, typer.Option("--method", help="A name that `mmcompress list` shows.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
Keep = Annotated[str, typer.Option(help="Share of the picture's tokens in (0, 1], or a count without a dot, such as 186.")]
Options = Annotated[list[str] | None, typer.Option("--option", help="A field of the reducer, key=value; repeatable.")]
Model = Annotated[str, typer.Option(help="Hub id or folder of a supported checkpoint, or 'pico', which is embedded.")]
Device = Annotated[str, typer.Option(help="'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1', 'mps'.")]
Dtype = Annotated[str, typer.Option(help="'auto' (the checkpoint's; float32 on a CPU), 'float32', 'bfloat16', 'float16'.")]
Where = Annotated[str | None, typer.Option("--positions", help="'closed' or 'original'; default: what the method is made for.")]
Attn = Annotated[str, typer.Option(help="attn_implementation: 'sdpa', 'eager', 'flash_attention_2'.")]


@app.callback()
def _main(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False) -> None:
    """Fewer image tokens in stock transformers models."""


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
def run(model: Model, image: Annotated[list[Path], typer.Option(help="A picture; repeatable.")],
        prompt: Annotated[str, typer.Option(help="The question, without image placeholders.")],
        image_reducer: Annotated[str | None, typer.Option(help="As `mmcompress list` shows; default global_rank.")] = None,
        layers: Annotated[str | None, typer.Option(
            help="Reducers inside the language model, as YAML: fastv, or '{name: fastv, layer: 2, keep: 0.5}'.")] = None,
        keep: Annotated[str | None, typer.Option(help="A share in (0, 1], or a count without a dot; default 0.25.")] = None,
        option: Options = None,
        config: Annotated[Path | None, typer.Option(help="A YAML file instead of the reducer's options.")] = None,
        positions: Where = None, max_new_tokens: int = 128, device: Device = "auto", dtype: Dtype = "auto", attn: Attn = "sdpa",
        plot: Annotated[Path | None, typer.Option(help="Write the kept tokens of the first picture here.")] = None,
        as_json: Json = False) -> None:
    """Ask a checkpoint about pictures with fewer image tokens; print the answer and what it saved."""
    import yaml

    from .checkpoint import chat, load, open_picture
    from .config import WrapConfig, build_layers
    from .wrap import wrap

    if config is not None and (image_reducer, layers, keep, option, positions) != (None, None, None, None, None):
        raise ValueError("pass either --config or --image-reducer, --layers, --keep, --option and --positions, not both")
    alone = layers is not None and (image_reducer, keep, option) == (None, None, None)
    chosen = WrapConfig.load(config) if config is not None else WrapConfig(
        image=None if alone else reducer_of(image_reducer or DEFAULT, keep or "0.25", option),
        layers=build_layers(yaml.safe_load(layers) if layers else ()), positions=cast("Any", positions))
    pictures = [open_picture(path) for path in image]
    loaded, processor = load(model, device, dtype, attn)
    inputs = processor(images=pictures, text=chat(processor, prompt, len(pictures)), return_tensors="pt")
    with wrap(loaded, chosen) as w:
        ids = w.generate(**inputs.to(loaded.device, loaded.dtype), max_new_tokens=max_new_tokens, do_sample=False)
        report = w.report
        if plot is not None:
            from .viz import save

            save(w.plot(pictures[0]), plot)
    answer = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()
    if as_json:
        return emit({"model": model, "prompt": prompt, "answer": answer, "report": report.to_dict(),
                     "plot": None if plot is None else str(plot)})
    print(f"{answer}\n\n{report}" + ("" if plot is None else f"\n{plot}"))


@app.command("list")
def list_methods(markdown: Annotated[bool, typer.Option("--markdown", help="The table of README.md.")] = False,
                 as_json: Json = False) -> None:
    """Every registered reducer with its options."""
    from .docs import methods, methods_table
    from .tables import methods_shown

    if as_json:
        return emit({"methods": [vars(m) for m in methods()]})
    if markdown:
        return print(methods_table(), end="")
    Console().print(methods_shown(methods()))


@eval_app.command("pico")
def eval_pico(methods: Annotated[str, typer.Option(
                  help="Names or 'all' (image reducers) or 'layers', by commas; options as fastv:layer=2")] = DEFAULT,
              keep: Annotated[str, typer.Option(help="Budgets, comma-separated.")] = "0.1,0.25,0.5",
              n: Annotated[int, typer.Option(help="Questions.")] = 500, seed: str = "eval", positions: Where = None,
              out: Annotated[Path, typer.Option(help="Folder for the CSV and the plot.")] = Path("out/eval-pico"),
              against: Annotated[str | None, typer.Option(help="Also show paired differences to this method.")] = None,
              model_path: Annotated[str, typer.Option("--model", help="'pico', or a folder of `mmcompress train`.")] = "pico",
              batch: int = 16, device: Device = "auto", dtype: Dtype = "auto", as_json: Json = False) -> None:
    """Accuracy of the embedded model on fresh scenes under each method and budget, with 95 % intervals.

    Tokens are what a decoder layer reads, averaged over the layers. Methods without a keep run once, as their options say.
    """
    from .checkpoint import device_name, load
    from .config import WrapConfig
    from .eval import ALL_TOKENS, evaluate, write_csv
    from .registry import available
    from .tables import accuracies, differences
    from .viz import plot_pareto, save

    model, processor = load(model_path, device, dtype, "sdpa")
    depth = model.config.get_text_config().num_hidden_layers
    reducers: dict[str, Any] = {ALL_TOKENS: None}
    groups = {"all": available("image"), "layers": [m for m in available("layers") if m != "in_layer"]}
    for method in [m for part in _split(methods) for m in groups.get(part, [part])]:
        name, *options = _split(method, ":")
        if name in available("layers"):
            reducers.update(_layer_configs(method, name, options, _split(keep), depth))
            continue
        reducers.update({f"{method}@{k}": WrapConfig(image=reducer_of(name, k, options), positions=cast("Any", positions))
                         for k in _split(keep)})
    if against is not None and not any(label.partition("@")[0] == against for label in reducers):
        raise ValueError(f"--against {against}: not among --methods {methods}")
    rows = evaluate(model, processor, reducers, n, seed, batch)
    write_csv(rows, out / "pico.csv", device=device_name(model), seed=seed)
    kinds = [k for k in ("cards", "receipt") if any(r.kind == k for r in rows)]
    save(plot_pareto(rows, kinds), out / "pico.png")
    files = [str(out / "pico.csv"), str(out / "pico.png")]
    if as_json:
        return emit({"rows": [r.to_dict() for r in rows], "seed": seed, "device": device_name(model), "files": files})
    print(f"exact answers in % and 95 % interval, pico ({device_name(model)})")
    Console().print(accuracies(rows))
    if against is not None:
        print(f"\npoints ahead of {against} on the same questions, with 95 % intervals")
        Console().print(differences(rows, against))
    print("", *files, sep="\n")


def _layer_configs(method: str, name: str, options: list[str], keeps: list[str], depth: int) -> dict[str, Any]:
    """Label -> configuration of a layer reducer at each budget, or once if it has no keep of its own."""
    from dataclasses import fields

    from . import registry
    from .config import WrapConfig

    cls: Any = registry.reducer_class("layers", name)
    if any(f.name == "keep" for f in fields(cls)):
        return {f"{method}@{k}": WrapConfig(layers=(reducer_of(name, k, options, "layers"),)) for k in keeps}
    if not options and hasattr(cls, "for_depth"):
        return {method: WrapConfig(layers=(cls.for_depth(depth),))}
    return {method: WrapConfig(layers=(reducer_of(name, None, options, "layers"),))}


def _split(text: str, at: str = ",") -> list[str]:
    """Split at a character, but not within brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == at and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


@app.command()
def viz(image: Annotated[Path, typer.Option(help="A picture.")], out: Annotated[Path, typer.Option(help="The PNG to write.")],
        method: Name = DEFAULT, keep: Keep = "0.25",
        option: Options = None, model: Model = "pico",
        prompt: Annotated[str, typer.Option(help="For methods that read the question.")] = "describe the picture.",
        device: Device = "auto", dtype: Dtype = "auto", attn: Attn = "sdpa", as_json: Json = False) -> None:
    """Draw which tokens of a picture a method keeps; the language model does not run."""
    import torch

    from .adapters import adapter_for
    from .checkpoint import chat, load, open_picture
    from .config import WrapConfig
    from .pipeline import reduce_inputs
    from .registry import label
    from .viz import plot_kept, save

    picture, reducer = open_picture(image), reducer_of(method, keep, option)
    loaded, processor = load(model, device, dtype, attn)
    inputs = processor(images=[picture], text=chat(processor, prompt, 1), return_tensors="pt")
    with torch.inference_mode():
        done = reduce_inputs(adapter_for(loaded), inputs.to(loaded.device, loaded.dtype), WrapConfig(image=reducer))
    [item] = done.items
    save(plot_kept(picture, item), out)
    if as_json:
        return emit({"reducer": repr(reducer), "tokens_before": item.before, "tokens_after": item.after, "files": [str(out)]})
    print(f"{label(reducer)}: {item.before} -> {item.after} tokens\n{out}")


@app.command()
def train(recipe: Annotated[Path, typer.Argument(help="A YAML file such as configs/pico-small.yaml.")],
          out: Annotated[Path | None, typer.Option(help="Folder for checkpoints, log and plots; default out/NAME.")] = None,
          resume: Annotated[bool, typer.Option("--resume", help="Go on from --out's checkpoint, if there is one.")] = False,
          changes: Annotated[list[str] | None, typer.Option("--set", help="key=value, as optim.lr=1e-3; repeatable.")] = None,
          as_json: Json = False) -> None:
    """Train by a recipe, from scratch or from weights; several processes by `accelerate launch -m mmcompress train ...`."""
    import transformers

    from .tables import answers_by_kind
    from .train.loop import train as run_recipe
    from .train.recipe import Recipe

    transformers.utils.logging.disable_progress_bar()                   # ours remains
    result = run_recipe(Recipe.load(recipe, changes or ()), out or Path("out") / recipe.stem, resume)
    if not result.pop("main"):                                         # another process prints
        return None
    if as_json:
        return emit(result)
    print(f"{result['steps']} steps, {result['seconds']:.0f} s, {result['tokens'] / result['seconds']:.0f} tokens/s")
    Console().print(answers_by_kind(result["eval"]))
    print("", *result["files"], sep="\n")


# what the commands share


def emit(result: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(result, indent=2, ensure_ascii=False))


def parse_keep(text: str) -> float | int:
    """"0.25" -> a share, "186" -> a count; raises ValueError on anything else."""
    try:
        return int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ValueError(f"--keep {text}: a share such as 0.25, or a count such as 186") from None


def reducer_of(name: str, keep: str | None, options: list[str] | None = None, slot: str = "image") -> Any:
    """A registered reducer from what the command line says; values of options are read as YAML."""
    import yaml

    from . import registry

    fields: dict[str, Any] = {} if keep is None else {"keep": parse_keep(keep)}
    for option in options or ():
        key, equals, value = option.partition("=")
        if not equals or not key or key in ("name", "keep"):
            raise ValueError(f"--option {option}: key=value with a field of the reducer; the budget is --keep")
        fields[key] = yaml.safe_load(value)
    return registry.build(slot, {"name": name, **fields})


def main() -> None:
    """Entry point of the `mmcompress` command."""
    app()
