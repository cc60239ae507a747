"""What was saved and what it cost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .flops import prefill_flops
from .layout import VideoLayout

CACHE_STAGES = ("score", "select", "gather", "store")
Mark = Any      # a time.perf_counter() reading, or a CUDA event


class Stopwatch:
    """Milliseconds per stage. On a GPU it records events and waits for them only when the times are read."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.cuda = torch.device(device).type == "cuda"
        self._spans: list[tuple[str, Mark, Mark]] = []
        self._counts: Counter[str] = Counter()

    def _mark(self) -> Mark:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> Mark:
        """Begin a stage that another function ends with `stop`."""
        return self._mark()

    def stop(self, name: str, start: Mark) -> None:
        self._spans.append((name, start, self._mark()))
        self._counts[name] += 1

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if torch.compiler.is_compiling():       # a clock would break the graph
            yield
            return
        start = self._mark()
        try:
            yield
        finally:
            self.stop(name, start)

    def milliseconds(self) -> dict[str, float]:
        """Total per stage, in order of first use."""
        out: dict[str, float] = {}
        if self.cuda and self._spans:
            torch.cuda.synchronize()
        for name, start, end in self._spans:
            out[name] = out.get(name, 0.0) + (start.elapsed_time(end) if self.cuda else 1000 * (end - start))
        return out

    def count(self, name: str) -> int:
        """How often a stage ran."""
        return self._counts[name]


@dataclass(frozen=True)
class ItemReport:
    """One picture, clip or recording. Tokens are what the language model reads, newlines included; patches leave the newlines
    (and the [CLS] tokens of frames) out.

    `nominal` is what papers often call 100 %: every patch of every tile or frame, before padding was cut, without newlines.
    `frames` are the tokens that are left in each frame of a clip (merged ones stand in the frame of their representative),
    `seconds` what a recording lasts (0 for others).
    """

    modality: str
    prompt: int
    tokens_before: int
    tokens_after: int
    patches_before: int
    patches_after: int
    newlines_before: int
    newlines_after: int
    nominal: int
    merged: bool
    frames: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def kept(self) -> float:
        return self.tokens_after / self.tokens_before

    @property
    def kept_nominal(self) -> float:
        return self.patches_after / self.nominal


@dataclass(frozen=True)
class LayerReport:
    """What is left from one decoder layer on: tokens of all pictures, and columns of the prompt."""

    layer: int
    tokens: int
    columns: int


@dataclass(frozen=True)
class CacheReport:
    """What plans did to one key-value cache, as it was when its layers had last been compressed.

    label         the plans
    tokens        that had come in by then, of the longest prompt, padding included and those that reducers dropped before not
    layers        the layers that plans see, numbered from 0; sliding windows are none of them
    slots         memory of each of these layers, in tokens of a prompt: slots of its longest head
    bytes_before  the stock cache's keys and values of the same tokens in these layers, in `dtype`; each beam has its own
    bytes_after   theirs, with scales, masses, columns and validity: all that a layer holds
    peak          the most bytes that they held together while prompts came in
    milliseconds  `score`, `select`, `gather`, `store`: of every compression of this cache
    """

    label: str
    tokens: int
    layers: list[int]
    slots: list[int]
    bytes_before: int
    bytes_after: int
    peak: int
    dtype: str
    milliseconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        low, high = min(self.slots), max(self.slots)
        slots = f"{low:,}" if low == high else f"{low:,} to {high:,} (on average {sum(self.slots) / len(self.slots):,.0f})"
        times = "".join(f"{', ' if i else '; ms: '}{name} {ms:.1f}" for i, (name, ms) in enumerate(self.milliseconds.items()))
        share = f"{self.bytes_after / self.bytes_before:.1%}, bookkeeping included"
        return (f"cache {self.label}: {self.tokens:,} -> {slots} slots a layer, {_sizes(self.bytes_before, self.bytes_after)} "
                f"({share}), at most {_size(self.peak)} on the way{times}")


@dataclass(frozen=True)
class Report:
    """What one call saved and cost.

    Prompt lengths are columns of the batch, padding included. Milliseconds: `plan` (the shorter prompt, on the host),
    `encode` (vision tower and projector), `reduce`, `pack`, `prefill` (the first forward of the language model), `decode`
    (all later ones). KV bytes are those of a full-precision cache of the prompt, and floating-point operations those of the
    language model's prefill (`flops.prefill_flops`), all rows, computed from the configuration and the columns of each layer;
    where plans compressed the cache (`cache` says how), `kv_bytes_after` is what it was measured to hold, each prompt once.
    `tokens_mean` is what a decoder layer reads of the pictures, averaged over its `depth` layers; `layers` says what reducers
    inside the language model left, layer by layer.

    Where a decoder attends to an encoder's states (Whisper), the prompt's lengths are those states' of one window, KV bytes are
    the cross-attention's, and operations what depends on the states: their keys and values, and the attention of every step.
    """

    reducer: str
    items: list[ItemReport] = field(default_factory=list)
    prompt_before: int = 0
    prompt_after: int = 0
    milliseconds: dict[str, float] = field(default_factory=dict)
    decode_steps: int = 0
    kv_bytes_before: int = 0
    kv_bytes_after: int = 0
    flops_before: int = 0
    flops_after: int = 0
    depth: int = 0
    tokens_mean: float = 0.0
    layers: list[LayerReport] = field(default_factory=list)
    cache: CacheReport | None = None

    @property
    def tokens_before(self) -> int:
        return sum(i.tokens_before for i in self.items)

    @property
    def tokens_after(self) -> int:
        return sum(i.tokens_after for i in self.items)

    @property
    def by_modality(self) -> dict[str, tuple[int, int]]:
        """Tokens before and after of all items of each modality."""
        out: dict[str, tuple[int, int]] = {}
        for i in self.items:
            before, after = out.get(i.modality, (0, 0))
            out[i.modality] = before + i.tokens_before, after + i.tokens_after
        return out

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_before": self.tokens_before, "tokens_after": self.tokens_after,
                "by_modality": self.by_modality}

    def __str__(self) -> str:
        if not self.items and self.cache is None:
            return f"{self.reducer}: nothing was reduced (no picture, clip or recording in the last call)"
        lines = [self.reducer]
        for n, i in enumerate(self.items):
            merged = ", merged" if i.merged else ""
            seen = f"; {sum(f > 0 for f in i.frames)} of {len(i.frames)} frames hold tokens" if i.frames else ""
            if i.modality == "audio":
                lines.append(f"  audio {n} (prompt {i.prompt}): {i.tokens_before} -> {i.tokens_after} tokens ({i.kept:.1%}; "
                             f"{i.seconds:.1f} s at {i.tokens_after / i.seconds:.1f} tokens/s{merged})")
                continue
            lines.append(f"  {i.modality} {n} (prompt {i.prompt}): {i.tokens_before} -> {i.tokens_after} tokens "
                         f"({i.kept:.1%}; newlines {i.newlines_before} -> {i.newlines_after}; "
                         f"{i.kept_nominal:.1%} of {i.nominal} nominal patches{seen}{merged})")
        kinds = " and ".join(by := self.by_modality)
        if len(by) > 1:
            lines += [f"  all {modality}: {before} -> {after} tokens ({after / before:.1%})"
                      for modality, (before, after) in by.items()]
        for stage in self.layers:
            lines.append(f"  from layer {stage.layer} of {self.depth}: {stage.tokens} {kinds} tokens, {stage.columns} columns")
        if self.layers:
            lines.append(f"  {self.tokens_mean:.1f} {kinds} tokens on average over the layers")
        lines.append(f"  prompt {self.prompt_before} -> {self.prompt_after} columns, prefill "
                     f"{_flops(self.flops_before)} -> {_flops(self.flops_after)}, "
                     f"KV cache {_size(self.kv_bytes_before)} -> {_size(self.kv_bytes_after)}")
        if self.cache is not None:
            lines.append(f"  {self.cache}")
        times = [f"{name} {ms:.1f}" for name, ms in self.milliseconds.items() if name != "decode"]
        if self.decode_steps:
            times.append(f"decode {self.milliseconds['decode'] / self.decode_steps:.1f} x {self.decode_steps}")
        return "\n".join([*lines, f"  ms: {', '.join(times)}"])


def _flops(count: int) -> str:
    return f"{count / 1e12:.2f} TFLOP" if count >= 1e11 else f"{count / 1e9:.2f} GFLOP"


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def _sizes(before: int, after: int) -> str:
    """Two sizes, the unit once where it is the same."""
    first, second = _size(before), _size(after)
    return f"{first if first[-3:] != second[-3:] else first[:-4]} -> {second}"


def describe_run(run: Any, config: Any, model: Any, depth: int, tally: Any = None) -> Report:
    """The report of one call. run: a `pipeline.Run`; config: a `WrapConfig`; tally: the `cache.Tally` of what it compressed"""
    before, after = [run.columns] * depth, run.columns_by_layer(depth)
    size = lambda columns: kv_bytes(model.config, run.rows, columns, model.dtype)  # noqa: E731
    flops = lambda columns: prefill_flops(model.config, run.rows, columns)  # noqa: E731
    return Report(reducer=config.label, items=[describe_item(i) for i in run.items], prompt_before=run.columns,
                  prompt_after=after[0], milliseconds=run.stopwatch.milliseconds(), decode_steps=run.stopwatch.count("decode"),
                  kv_bytes_before=size(before), kv_bytes_after=size(after) if tally is None else _held(tally, after, size),
                  flops_before=flops(before), flops_after=flops(after), depth=depth,
                  tokens_mean=sum(run.tokens_by_layer(depth)) / depth, layers=describe_layers(run, depth),
                  cache=None if tally is None else describe_cache(tally, config.cache_label))


def describe_cache(tally: Any, label: str) -> CacheReport:
    """What a `cache.Tally` says; waits for the device."""
    layers = sorted(tally.layers)
    found = [tally.layers[i] for i in layers]
    took = tally.stopwatch.milliseconds()
    return CacheReport(label=label, tokens=max(x.seen for x in found), layers=layers, slots=[x.slots for x in found],
                       bytes_before=sum(x.stock_nbytes for x in found), bytes_after=sum(x.nbytes for x in found),
                       peak=tally.peak, dtype=str(found[0].dtype).removeprefix("torch."),
                       milliseconds={stage: took[stage] for stage in CACHE_STAGES if stage in took})


def _held(tally: Any, columns: Sequence[int], size: Any) -> int:
    """Bytes of each prompt once: of compressed layers the share of what they were measured by, of others what stock holds."""
    found = tally.layers
    stock, held = (sum(getattr(x, name) for x in found.values()) for name in ("stock_nbytes", "nbytes"))
    seen = size([found[i].seen if i in found else 0 for i in range(len(columns))])
    return size([0 if i in found else n for i, n in enumerate(columns)]) + seen * held // stock


def describe_item(item: Any) -> ItemReport:
    """The report of one reduced picture, clip or recording; reads its indices, so it waits for the device."""
    layout, index = item.layout, item.index.cpu()
    patches = int(layout.places().is_patch[index].sum())
    return ItemReport(modality=item.modality, prompt=item.row, tokens_before=item.before, tokens_after=item.after,
                      patches_before=layout.patches, patches_after=patches, newlines_before=layout.newline_tokens,
                      newlines_after=item.after - patches, nominal=layout.nominal, merged=item.mass is not None,
                      frames=_frames(layout, index), seconds=getattr(layout, "seconds", 0.0))


def _frames(layout: Any, index: torch.Tensor) -> list[int]:
    """Tokens that stand in each frame of a clip; none for a picture."""
    if not isinstance(layout, VideoLayout):
        return []
    frame = layout.places().frame[index]
    return torch.bincount(frame[frame >= 0], minlength=layout.frames).tolist()


def describe_layers(run: Any, depth: int) -> list[LayerReport]:
    """What each stage inside the language model left; known from the plan, so nothing is read from the device."""
    tokens, stages = run.tokens_by_layer(depth), [] if run.layers is None else run.layers.stages
    return [LayerReport(s.step.layer, tokens[s.step.layer], s.columns) for s in stages]


def kv_bytes(config: Any, rows: int, columns: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of keys and values of `rows` prompts, given the columns of each layer; sliding-window layers hold their window."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None)
    held = sum(min(n, window) if kind == "sliding_attention" and window else n for kind, n in zip(kinds, columns))
    return 2 * rows * held * heads * head_dim * dtype.itemsize
