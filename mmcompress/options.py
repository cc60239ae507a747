"""The options that commands share, and how the text after them becomes values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT = "global_rank"                     # the method of demo and eval pico

Name = Annotated[str, typer.Option("--method", help="A name that `mmcompress list` shows.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
Keep = Annotated[str, typer.Option(help="Share of the picture's tokens in (0, 1], or a count without a dot, such as 186.")]
Own = Annotated[str | None, typer.Option("--keep", help="Share of the tokens of each picture, clip or recording in "
                                         "(0, 1], or a count without a dot; default: the method's own, mostly 0.25.")]
Options = Annotated[list[str] | None, typer.Option("--option", help="A field of the reducer, key=value; repeatable.")]
Video = Annotated[Path | None, typer.Option(help="A video file, read by --frames or --fps from --start to --end.")]
Frames = Annotated[int | None, typer.Option(help="Frames of the video, evenly spaced; default 32.")]
Fps = Annotated[float | None, typer.Option(help="Or frames per second.")]
Audio = Annotated[Path | None, typer.Option(help="A sound file, or a video for its audio track, from --start to --end.")]
Start = Annotated[float | None, typer.Option(help="Seconds into the video and the audio; default 0.")]
End = Annotated[float | None, typer.Option(help="Seconds into the video and the audio; default its end.")]
Model = Annotated[str, typer.Option(help="Hub id or folder of a supported checkpoint, or 'pico', which is embedded.")]
Device = Annotated[str, typer.Option(help="'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1', 'mps'.")]
Dtype = Annotated[str, typer.Option(help="'auto' (the checkpoint's; float32 on a CPU), 'float32', 'bfloat16', 'float16'.")]
Where = Annotated[str | None, typer.Option("--positions", help="'closed' or 'original'; default: what the method is made for.")]
Attn = Annotated[str, typer.Option(help="attn_implementation: 'sdpa', 'eager', 'flash_attention_2'.")]


def parse_keep(text: str, option: str = "--keep") -> float | int:
    """"0.25" -> a share, "186" -> a count; raises ValueError on anything else."""
    try:
        return int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ValueError(f"{option} {text}: a share such as 0.25, or a count such as 186") from None


def from_yaml(option: str, text: str) -> Any:
    """What a piece of YAML says; raises ValueError where it is none."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ValueError(f"{option} {text}: not valid YAML ({getattr(e, 'problem', None) or e})") from None


def split(text: str, at: str = ",") -> list[str]:
    """Split at a character, but not within brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == at and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def emit(result: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(result, indent=2, ensure_ascii=False))


def reducer_of(name: str, keep: str | None, options: list[str] | None = None, slot: str = "image") -> Any:
    """A registered reducer from what the command line says; values of options are read as YAML."""
    from . import registry

    fields: dict[str, Any] = {} if keep is None else {"keep": parse_keep(keep)}
    for option in options or ():
        key, equals, value = option.partition("=")
        if not equals or not key or key in ("name", "keep"):
            raise ValueError(f"--option {option}: key=value with a field of the reducer; the budget is --keep")
        fields[key] = from_yaml("--option", value)
    return registry.build(slot, {"name": name, **fields})
