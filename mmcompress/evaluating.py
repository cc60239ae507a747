"""The commands `mmcompress eval pico` and `mmcompress eval clips`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from .options import DEFAULT, Device, Dtype, Json, Where, emit, reducer_of, split

eval_app = typer.Typer(no_args_is_help=True, help="What a reducer costs in accuracy.")

Methods = Annotated[str, typer.Option(help="Names or 'all' (image reducers) or 'layers', by commas; options as fastv:layer=2")]
Budgets = Annotated[str, typer.Option("--keep", help="Budgets, comma-separated.")]
Asked = Annotated[int, typer.Option("--n", help="Questions.")]
Folder = Annotated[Path, typer.Option("--out", help="Folder for the CSV and the plot.")]
Against = Annotated[str | None, typer.Option(help="Also show paired differences to this method.")]


@eval_app.command("pico")
def eval_pico(methods: Methods = DEFAULT, keep: Budgets = "0.1,0.25,0.5", n: Asked = 500, seed: str = "eval",
              positions: Where = None, out: Folder = Path("out/eval-pico"), against: Against = None,
              model_path: Annotated[str, typer.Option("--model", help="'pico', or a folder of `mmcompress train`.")] = "pico",
              batch: int = 16, device: Device = "auto", dtype: Dtype = "auto", as_json: Json = False) -> None:
    """Accuracy of the embedded model on fresh scenes under each method and budget, with 95 % intervals.

    Tokens are what a decoder layer reads, averaged over the layers. Methods without a keep run once, as their options say.
    """
    from .checkpoint import load
    from .config import WrapConfig
    from .eval import ALL_TOKENS, evaluate
    from .registry import available

    model, processor = load(model_path, device, dtype, "sdpa")
    depth = model.config.get_text_config().num_hidden_layers
    reducers: dict[str, Any] = {ALL_TOKENS: None}
    groups = {"all": available("image"), "layers": [m for m in available("layers") if m != "in_layer"]}
    for method in [m for part in split(methods) for m in groups.get(part, [part])]:
        name, *options = split(method, ":")
        if name in available("layers"):
            reducers.update(_layer_configs(method, name, options, split(keep), depth))
            continue
        reducers.update({f"{method}@{k}": WrapConfig(image=reducer_of(name, k, options), positions=cast("Any", positions))
                         for k in split(keep)})
    _check_against(against, reducers, methods)
    rows = evaluate(model, processor, reducers, n, seed, batch)
    _show(rows, "pico", ("cards", "receipt"), model, seed, out, against, as_json)


@eval_app.command("clips")
def eval_clips(methods: Annotated[str, typer.Option(help="Names of video reducers, or 'all'; options as evs:x=1")] = "all",
               keep: Budgets = "0.05,0.1,0.25,0.5", n: Asked = 200, seed: str = "eval", positions: Where = None,
               out: Folder = Path("out/eval-clips"), against: Against = None,
               frames: Annotated[int, typer.Option(help="Frames of a clip.")] = 16, batch: int = 8, device: Device = "auto",
               dtype: Dtype = "auto", as_json: Json = False) -> None:
    """Accuracy of the embedded model on fresh clips under each video reducer and budget, with 95 % intervals."""
    from .checkpoint import load
    from .config import WrapConfig
    from .eval import ALL_TOKENS, evaluate_clips
    from .registry import available

    model, processor = load("pico", device, dtype, "sdpa", video=True)
    reducers: dict[str, WrapConfig | None] = {ALL_TOKENS: None}
    for method in [m for part in split(methods) for m in (available("video") if part == "all" else [part])]:
        name, *options = split(method, ":")
        for k in split(keep):
            reducer = reducer_of(name, k, options, "video")
            reducers[f"{method}@{k}"] = WrapConfig(video=reducer, positions=cast("Any", positions))
    _check_against(against, reducers, methods)
    rows = evaluate_clips(model, processor, reducers, n, seed, batch, frames)
    _show(rows, "clips", ("order", "count", "change"), model, seed, out, against, as_json)


def _check_against(against: str | None, reducers: dict[str, Any], methods: str) -> None:
    if against is not None and not any(label.partition("@")[0] == against for label in reducers):
        raise ValueError(f"--against {against}: not among --methods {methods}")


def _show(rows: list[Any], name: str, kinds: tuple[str, ...], model: Any, seed: str, out: Path, against: str | None,
          as_json: bool) -> None:
    """Write the rows and their plot, and print them."""
    from .checkpoint import device_name
    from .eval import write_csv
    from .tables import accuracies, differences
    from .viz import plot_pareto, save

    files = [str(out / f"{name}.csv"), str(out / f"{name}.png")]
    write_csv(rows, files[0], device=device_name(model), seed=seed)
    save(plot_pareto(rows, [k for k in kinds if any(r.kind == k for r in rows)]), files[1])
    if as_json:
        return emit({"rows": [r.to_dict() for r in rows], "seed": seed, "device": device_name(model), "files": files})
    what = "pico" if name == "pico" else f"pico on {name}"
    print(f"exact answers in % and 95 % interval, {what} ({device_name(model)})")
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
