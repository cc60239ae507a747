"""The key-value cache of a wrapped model: its plans put into the model and taken out, told what reducers dropped, and noted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .pipeline import Run
from .report import Stopwatch

if TYPE_CHECKING:
    from .wrap import Wrapped


def follow(handle: Wrapped, plan: Any = None) -> None:
    """Put the configured plans into the model, or `plan` where none is configured; what was there goes."""
    from .cache import attach, chain

    plan = chain(handle.config.cache) if handle.config.cache else plan
    if plan is None:
        return
    leave(handle)
    handle.attached = attach(handle.model, plan)


def leave(handle: Wrapped) -> None:
    """Take the plans out of the model."""
    if handle.attached is not None:
        handle.attached.detach()
        handle.attached = None


@contextmanager
def paused(handle: Wrapped) -> Iterator[None]:
    """Stock caches and stock attention within the block."""
    plan = None if handle.attached is None else handle.attached.plan
    leave(handle)
    try:
        yield
    finally:
        if handle.in_place:
            follow(handle, plan)


def make(handle: Wrapped) -> Any:
    """An empty cache: what `Wrapped.cache` promises."""
    if not handle.config.cache:
        raise ValueError("no cache plan is configured: pass one to wrap, for example cache=SnapKV(keep=0.25); without it "
                         "generate() makes a stock cache")
    if handle.attached is None or not handle.compresses:
        return DynamicCache(config=handle.model.config.get_text_config(decoder=True))
    return handle.attached.cache()


def holds(cache: Any) -> bool:
    """Whether a cache is one of ours."""
    from .cache import CompressedCache, StaticCompressedCache

    return isinstance(cache, (CompressedCache, StaticCompressedCache))


@contextmanager
def generating(handle: Wrapped, call: Mapping[str, Any], run: Run | None) -> Iterator[Run | None]:
    """Around the stock `generate`, as `noted`; all stock where plans rest, unless the call brings a cache of ours."""
    if handle.attached is not None and not handle.compresses and not holds(call.get("past_key_values")):
        with paused(handle):
            yield run
        return
    with noted(handle, call, run) as record:
        yield record


@contextmanager
def noted(handle: Wrapped, call: Mapping[str, Any], run: Run | None = None) -> Iterator[Run | None]:
    """Around a stock call: tell its cache what reducers dropped, and make what plans compressed the report's.

    run  the record of a call that had something to reduce. -> it, or one that the call is to be timed by; None where no plan
         is in the model
    """
    attached, given = handle.attached, cast("Any", call.get("past_key_values"))
    if attached is None:
        yield run
        return
    ours = holds(given)
    if run is not None and (counts := dropped(run)) is not None:
        if ours:
            given.miss(counts)
        elif given is None:
            attached.missing = counts
    before = _done(given.tally if ours else attached.tally)
    record = _record(handle, call) if run is None else run
    try:
        yield record
    finally:
        attached.missing = None
    tally = given.tally if ours else attached.tally
    if _done(tally) not in (before, None):
        handle.tally = tally
        if run is None:
            handle.run, handle.ids = record, call.get("input_ids")


def dropped(run: Run) -> Tensor | None:
    """Tokens that reducers took from each prompt of a call, by modality (`cache.TAGS`). (B, 4) int64 on the host; None: none"""
    from .cache import TAGS

    counts = torch.zeros(run.rows, len(TAGS), dtype=torch.long)
    for item in run.items:
        counts[item.row, TAGS.index(item.modality)] += item.before - item.after
    return counts if bool(counts.any()) else None


def _done(tally: Any) -> tuple[int, tuple[Any, ...]] | None:
    """What tells a tally before a call from after one that compressed; None: nothing was compressed yet."""
    return None if tally is None or not tally.layers else (id(tally), tuple(tally.layers.items()))


def _record(handle: Wrapped, call: Mapping[str, Any]) -> Run:
    """The record of a call in which nothing is there for reducers."""
    new = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
    rows, columns = (0, 0) if new is None else new.shape[:2]
    return Run(rows=rows, columns=columns, stopwatch=Stopwatch(handle.model.device))
