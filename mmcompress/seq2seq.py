"""Models whose decoder attends to an encoder's states (Whisper): the states are reduced where they leave the encoder.

A hook on the encoder does it (or, where the reducer works inside it, hooks on its layers while it runs), so that `forward`,
`generate` over one window or many, fallback, beams and language detection all read the shorter states, and the
cross-attention's cache holds no more than they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .adapters import Captures
from .config import WrapConfig
from .errors import UnsupportedModelError
from .pipeline import Item, Items, Run, captures_of
from .prompt import Found
from .reducing import check_features, reduce_items, reducers_of
from .report import Report, Stopwatch, describe_item

if TYPE_CHECKING:
    from .wrap import Wrapped


def hook_encoder(handle: Wrapped) -> list[Any]:
    """Hook the encoder; the removable handles."""
    encoder = handle.adapter.encoder
    return [encoder.register_forward_pre_hook(partial(_before, handle), with_kwargs=True),
            encoder.register_forward_hook(partial(_behind, handle), with_kwargs=True, always_call=True)]


def generate(handle: Wrapped, kwargs: dict[str, Any]) -> Any:
    """What `generate` of a wrapped model does: the stock method, whose every window is noted in one record."""
    if not handle.listens:
        return handle.stock["generate"](**kwargs)
    config = kwargs.get("generation_config") or handle.model.generation_config
    if kwargs.get("return_token_timestamps", getattr(config, "return_token_timestamps", None)):
        raise ValueError("return_token_timestamps reads the cross-attention of all 1500 states, which a wrapped model does not "
                         "have; return_timestamps=True works, or use `with w.disable():`")
    handle.begun = handle.run = Run(rows=0, columns=0, stopwatch=Stopwatch(handle.model.device))
    handle.timed = handle.run.stopwatch
    try:
        return handle.stock["generate"](**kwargs)
    finally:
        handle.begun = handle.timed = None


def reduce_inputs(adapter: Any, inputs: Mapping[str, Any], config: WrapConfig) -> dict[str, Any]:
    """The pure form: `encoder_outputs` in place of `input_features`."""
    mel = inputs["input_features"]
    with (merging := plan_merging(adapter, mel, config)) or nullcontext():
        out = adapter.encoder(mel, return_dict=True)
    shorter, _ = encoded_states(adapter, mel, out.last_hidden_state, config, merging)
    return {**{k: v for k, v in inputs.items() if k != "input_features"},
            "encoder_outputs": type(out)(**{**out, "last_hidden_state": shorter})}


def plan_merging(adapter: Any, mel: Tensor, config: WrapConfig) -> Any:
    """What a reducer inside the encoder is to do with spectrograms (B, bins, T); None if there is none, or nothing to do."""
    reducer = captures_of(config, adapter).get("audio", Captures()).merging
    inputs = {"input_features": mel}
    return None if reducer is None else adapter.plan_merging(reducer, inputs, adapter.audio_layouts(inputs))


def encoded_states(adapter: Any, mel: Tensor, states: Tensor, config: WrapConfig, merging: Any = None) -> tuple[Tensor, Items]:
    """Reduce encoder states (B, N, D) of spectrograms (B, bins, T). -> (B, K, D), and which state went where

    merging  what a reducer did inside the encoder; `states` are what it left
    """
    encoded = {"audio": adapter.encoded(mel, states, merging)}
    layouts = adapter.audio_layouts({"input_features": mel})
    found = [Found("audio", row, torch.arange(layout.tokens), layout) for row, layout in enumerate(layouts)]
    features = check_features(encoded, found)
    reduced = reduce_items(adapter, encoded, found, features, reducers_of(config, found, features), None)
    items = Items(Item("audio", item.row, item.layout, index, source, mass)
                  for item, (_, index, source, mass) in zip(found, reduced))
    return torch.stack([tokens for tokens, *_ in reduced]), items


def _before(handle: Wrapped, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not handle.listens:
        return
    if torch.compiler.is_compiling():
        if getattr(handle.config.audio, "in_encoder", False):
            raise UnsupportedModelError(f"{type(handle.config.audio).__name__} hooks the encoder's layers while it runs, which "
                                        f"torch.compile cannot trace; compile the decoder alone")
        return
    if handle.begun is None:                                    # a forward of its own
        handle.run = Run(rows=0, columns=0, stopwatch=Stopwatch(handle.model.device))
    assert handle.run is not None
    handle.merging = plan_merging(handle.adapter, args[0] if args else kwargs["input_features"], handle.config)
    handle.mark = handle.run.stopwatch.start()
    if handle.merging is not None:
        handle.merging.start()


def _behind(handle: Wrapped, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    merging, handle.merging = handle.merging, None
    if merging is not None:
        merging.stop()
    if out is None or not handle.listens:                       # None: the encoder raised
        return None
    mel = args[0] if args else kwargs["input_features"]
    states = out[0] if isinstance(out, tuple) else out.last_hidden_state
    run = handle.run
    assert run is not None
    if merging is not None:
        merging.check()
    if handle.mark is not None:
        run.stopwatch.stop("encode", handle.mark)
    with run.stopwatch.stage("reduce"):
        shorter, items = encoded_states(handle.adapter, mel, states, handle.config, merging)
    run.rows, run.columns = run.rows + len(states), handle.adapter.tokens(mel.shape[-1])
    run.items.extend(items)
    if isinstance(out, tuple):
        return (shorter, *out[1:])
    return type(out)(**{**out, "last_hidden_state": shorter})


def report(handle: Wrapped) -> Report:
    """What the last call saved and cost; see `Report` for what is counted."""
    run = handle.run
    assert run is not None
    config, depth = handle.model.config, handle.adapter.depth
    after = run.items[0].after if run.items else run.columns
    steps = max(1, run.stopwatch.count("prefill") + run.stopwatch.count("decode"))
    size = lambda n: 2 * run.rows * n * depth * config.d_model * handle.model.dtype.itemsize  # noqa: E731
    flops = lambda n: run.rows * depth * n * config.d_model * (4 * config.d_model + 4 * steps)  # noqa: E731
    return Report(reducer=handle.config.label, items=[describe_item(i) for i in run.items], prompt_before=run.columns,
                  prompt_after=after, milliseconds=run.stopwatch.milliseconds(), decode_steps=run.stopwatch.count("decode"),
                  kv_bytes_before=size(run.columns), kv_bytes_after=size(after), flops_before=flops(run.columns),
                  flops_after=flops(after), depth=depth, tokens_mean=sum(i.after for i in run.items))


__all__ = ["encoded_states", "generate", "hook_encoder", "report"]
