"""The only file that changes a model instance, and undoes it.

`wrap` replaces `forward` and `generate` on the instance (never on its class). With pictures in the call they reduce
them first and hand the shorter prompt and the precomputed features to the stock methods; without, they pass through.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from . import registry
from .adapters import adapter_for
from .compat import base_of, check_chunked_prefill, check_gaps_over_cache
from .config import Positions, WrapConfig
from .errors import WrapError
from .pipeline import Item, Run, reduce_inputs
from .prompt import PromptMap, as_mask
from .report import Report, Stopwatch, describe_item, kv_bytes

_STATE = "_mmcompress"          # the handle, in the model's __dict__
_CACHE = "_mmcompress_prompt"   # the PromptMap of a cache's prompt, on the cache
_METHODS = ("forward", "generate")


def wrap(model: Any, config: str | Path | WrapConfig | None = None, *, image: Any = None,
         positions: Positions | None = None) -> Wrapped:
    """Make a LLaVA-style transformers model reduce its pictures' tokens; undo it with `remove()` or a `with` block.

    model      a transformers model of a known family, also inside PEFT or with accelerate hooks
    config     a YAML file such as "configs/globalcom2-25.yaml", instead of the keywords
    image      a reducer, its registry name, a dict {"name": ..., fields}, or a YAML file that configures one
    positions  "closed" or "original"; by default what the reducer was made for, see `WrapConfig`
    """
    if isinstance(config, WrapConfig):
        chosen = config
    elif config is not None:
        if image is not None:
            raise ValueError("pass either a configuration file or image=..., not both")
        chosen = WrapConfig.load(config)
    else:
        chosen = WrapConfig(image=_reducer(image), positions=positions)
    return Wrapped(model, chosen)


def from_pretrained(model: Any, folder: str | Path) -> Wrapped:
    """Wrap a model with a configuration that `Wrapped.save_pretrained` wrote."""
    return Wrapped(model, WrapConfig.load(folder))


def unwrap(model: Any) -> Any:
    """Remove the wrap of a model, if it has one, and return the model."""
    state = base_of(model).__dict__.get(_STATE)
    if state is not None:
        state.remove()
    return model


def compress(model: Any, inputs: Any, *, image: Any, positions: Positions | None = None) -> dict[str, Any]:
    """The pure form: processor inputs -> inputs of the stock `forward` or `generate`, with the pictures reduced.

    The result holds input_ids, attention_mask and the like of the shorter prompt, and `mm_encoder_outputs` instead of
    the pixels. `generate` then returns the shorter prompt before its new tokens.
    """
    base = base_of(model)
    adapter = adapter_for(base)
    config = WrapConfig(image=_reducer(image), positions=positions)
    if not adapter.has_images(inputs):
        return dict(inputs)
    return reduce_inputs(adapter, inputs, config).inputs


def _reducer(image: Any) -> Any:
    if isinstance(image, str) and image.endswith((".yaml", ".yml")):
        return WrapConfig.load(image).image
    return None if image is None else registry.build("image", image)


class Wrapped:
    """A model that reduces its pictures' tokens. Call it, or the model itself, as before.

    `report` says what the last call saved and cost, `last` which token of each picture went where.
    """

    def __init__(self, model: Any, config: WrapConfig) -> None:
        base = base_of(model)
        if (held := base.__dict__.get(_STATE)) is not None:
            raise WrapError(f"this model is wrapped already ({registry.label(held.config.image)}); "
                            f"call remove() on that handle, or mmcompress.unwrap(model), first")
        self.outer = model
        self.model = base
        self.config = config
        self.adapter = adapter_for(base)
        self.active = True
        self._run: Run | None = None
        self._timed: Stopwatch | None = None        # while generate runs: its forward calls are timed
        self._held = {name: base.__dict__.get(name) for name in _METHODS}       # accelerate keeps its own there
        self._stock: dict[str, Callable[..., Any]] = {name: getattr(base, name) for name in _METHODS}
        for name, replacement in (("forward", _forward), ("generate", _generate)):
            base.__dict__[name] = MethodType(_with_signature(replacement, self._stock[name]), base)
        base.__dict__[_STATE] = self

    # calling ------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._check_wrapped()
        return self.outer(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self._check_wrapped()
        return self.outer.generate(*args, **kwargs)

    # looking ------------------------------------------------------------------------------------------------------

    @property
    def last(self) -> list[Item]:
        """The pictures of the last reduced call: layout, index, source and mass of each."""
        return [] if self._run is None else self._run.items

    @property
    def prompt(self) -> PromptMap | None:
        """How the columns of the last reduced call lie in the shorter prompt; None if none was dropped."""
        return None if self._run is None else self._run.prompt

    @property
    def report(self) -> Report:
        """What the last reduced call saved and cost."""
        run = self._run
        if run is None:
            return Report(reducer=registry.label(self.config.image))
        after = run.columns if run.prompt is None else run.prompt.reduced
        size = lambda columns: kv_bytes(self.model.config, run.rows, columns, self.model.dtype)  # noqa: E731
        return Report(reducer=registry.label(self.config.image), items=[describe_item(i) for i in run.items],
                      prompt_before=run.columns, prompt_after=after, milliseconds=run.stopwatch.milliseconds(),
                      decode_steps=run.stopwatch.count("decode"),
                      kv_bytes_before=size(run.columns), kv_bytes_after=size(after))

    def plot(self, image: Any, item: int = 0) -> Any:
        """The kept tokens over the picture: a matplotlib Figure. `item` numbers the pictures of the last call."""
        if not self.last:
            raise ValueError("nothing to plot: call the wrapped model with a picture first")
        if not 0 <= item < len(self.last):
            raise ValueError(f"item={item}: the last call had {len(self.last)} pictures, numbered from 0")
        from .viz.overlay import plot_kept

        return plot_kept(image, self.last[item])

    # keeping and undoing ------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the configuration, not the model, to `folder`/mmcompress.json."""
        self.config.save(folder)

    @contextmanager
    def disable(self) -> Iterator[Wrapped]:
        """The stock model within the block; the wrap stays in place."""
        before, self.active = self.active, False
        try:
            yield self
        finally:
            self.active = before

    def remove(self) -> Any:
        """Put everything back as it was and return the model. Doing it twice is fine."""
        state = self.model.__dict__
        if state.get(_STATE) is not self:
            return self.outer
        for name in _METHODS:
            place = name if _is_ours(state.get(name)) else f"_old_{name}"       # accelerate hooks added since the wrap
            if not _is_ours(state.get(place)):
                raise WrapError(f"{type(self.model).__name__}.{name} was replaced after the wrap by "
                                f"{state.get(name)!r}; undo that first, then call remove()")
            if place != name:
                state[place] = self._stock[name]
            elif self._held[name] is None:
                del state[name]
            else:
                state[name] = self._held[name]
        del state[_STATE]
        return self.outer

    def __enter__(self) -> Wrapped:
        self._check_wrapped()
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return (f"Wrapped({type(self.model).__name__}, image={registry.label(self.config.image)}, "
                f"positions={self.config.positions!r})")

    def _check_wrapped(self) -> None:
        if self.model.__dict__.get(_STATE) is not self:
            raise WrapError("this wrap was removed; call mmcompress.wrap(model, ...) again")

    # what the replaced methods do ---------------------------------------------------------------------------------

    def reduces(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call has pictures to reduce."""
        return self.active and self.adapter.has_images(kwargs)

    def start(self, kwargs: dict[str, Any], side: Any = None) -> Run:
        """Reduce a call; the handle keeps its record, not its tensors."""
        run = reduce_inputs(self.adapter, kwargs, self.config, side)
        self._run = replace(run, inputs={})
        return run

    @cached_property
    def forward_names(self) -> list[str]:
        """Names of forward's parameters, in order."""
        return list(inspect.signature(self._stock["forward"]).parameters)


def _is_ours(method: Any) -> bool:
    return isinstance(method, MethodType) and getattr(method.__func__, _STATE, False)


def _with_signature(replacement: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of `replacement` that shows the stock method's signature, which transformers and PEFT inspect."""
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(self, *args, **kwargs)

    signature = inspect.signature(stock)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__name__, method.__doc__ = replacement.__name__.lstrip("_"), stock.__doc__
    method.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])  # type: ignore[attr-defined]
    setattr(method, _STATE, True)
    return method


# forward --------------------------------------------------------------------------------------------------------------


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    handle: Wrapped = model.__dict__[_STATE]
    kwargs = {**dict(zip(handle.forward_names, args)), **kwargs}
    stock = handle._stock["forward"]
    if not handle.reduces(kwargs):
        _fit_mask_to_cache(kwargs)
        _mask_for_gaps(kwargs, handle)
        if handle._timed is None or torch.compiler.is_compiling():
            return stock(**kwargs)
        with handle._timed.stage("decode" if handle._timed.count("prefill") else "prefill"):
            return stock(**kwargs)
    if (cache := kwargs.get("past_key_values")) is not None and cache.get_seq_length() > 0:
        raise ValueError("forward() with pictures and a filled cache: let generate() continue the conversation, "
                         "or call forward with a fresh cache")
    run = handle.start(kwargs)
    with run.stopwatch.stage("prefill"):
        out = stock(**run.inputs)
    remember(_cache_of(out), run.prompt)
    return out


def _mask_for_gaps(kwargs: dict[str, Any], handle: Wrapped) -> None:
    """Positions with gaps, no mask and no cache would be read as packed sequences: give the mask."""
    if handle.config.positions == "original" and kwargs.get("attention_mask") is None \
            and kwargs.get("past_key_values") is None and kwargs.get("position_ids") is not None:
        like = kwargs.get("input_ids")
        if like is not None:
            kwargs["attention_mask"] = torch.ones_like(like)


def _fit_mask_to_cache(kwargs: dict[str, Any]) -> None:
    """A caller's own decoding loop goes on with the mask of the full prompt: cut it to the cache's columns."""
    cache: Any = kwargs.get("past_key_values")
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    prompt: PromptMap | None = getattr(cache, _CACHE, None)
    if prompt is None or mask is None or ids is None or getattr(mask, "ndim", 0) != 2:
        return
    if mask.shape[1] == cache.get_seq_length() + ids.shape[1] + prompt.full - prompt.reduced:
        kwargs["attention_mask"] = _join_mask(prompt, mask)


def _join_mask(prompt: PromptMap, mask: Tensor) -> Tensor:
    prompt = prompt.repeat(len(mask))
    return torch.cat([prompt.select(mask[:, :prompt.full], 0), mask[:, prompt.full:]], 1)


# caches ---------------------------------------------------------------------------------------------------------------


def remember(cache: Any, prompt: PromptMap | None) -> None:
    """Note on a cache which prompt it holds reduced, so that a next turn can be fitted to it."""
    if cache is not None and prompt is not None:
        setattr(cache, _CACHE, prompt)


def _cache_of(out: Any) -> Any:
    return getattr(out, "past_key_values", None)


# generate -------------------------------------------------------------------------------------------------------------


def _generate(model: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    handle: Wrapped = model.__dict__[_STATE]
    stock = handle._stock["generate"]
    if args:
        names = list(inspect.signature(stock).parameters)[1:]
        kwargs.update(zip(names, args))
    if inputs is not None:
        if kwargs.get("input_ids") is not None:
            raise ValueError("pass the prompt as input_ids or as the first argument, not both")
        kwargs["input_ids"] = inputs
    cache = kwargs.get("past_key_values")
    earlier: PromptMap | None = getattr(cache, _CACHE, None)
    if earlier is None and not handle.reduces(kwargs):
        return stock(**kwargs)
    if earlier is None and cache is not None and cache.get_seq_length() > 0:
        raise ValueError("pictures together with a cache that was filled before the wrap: generate the whole "
                         "conversation from scratch, or start it wrapped")
    if kwargs.get("input_ids") is None:
        raise ValueError("generate() with pictures needs input_ids; inputs_embeds alone do not tell where they stand")
    if kwargs.get("prefill_chunk_size", getattr(kwargs.get("generation_config"), "prefill_chunk_size", None)):
        check_chunked_prefill()
        if handle.config.positions == "original":
            check_gaps_over_cache(model, len(kwargs["input_ids"]), "prefill_chunk_size")
    if kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = _infer_mask(kwargs["input_ids"], model.generation_config)
    prompt: PromptMap | None
    with torch.no_grad():
        if earlier is not None:
            call, prompt = _continue(handle, earlier, kwargs)
        else:
            begun = handle.start(kwargs, side="left")           # generation reads the last column of every row
            call, prompt = begun.inputs, begun.prompt
    if prompt is not None:
        _fit_lengths(call, prompt, model.generation_config)
        _fit_watchers(call, prompt)
    handle._timed = None if handle._run is None else handle._run.stopwatch
    try:
        out = stock(**call)
    finally:
        handle._timed = None
    if prompt is None:
        return out
    sequences = out if isinstance(out, Tensor) else out.sequences
    restored = prompt.restore(sequences)
    used = _cache_of(out) if not isinstance(out, Tensor) else cache
    remember(used, prompt.repeat(len(sequences)))
    if isinstance(out, Tensor):
        return restored
    out.sequences = restored
    return out


def _continue(handle: Wrapped, earlier: PromptMap, kwargs: dict[str, Any]) -> tuple[dict[str, Any], PromptMap]:
    """A later turn on a reduced cache: the columns it knows are mapped as before, new pictures are reduced."""
    ids, mask = kwargs["input_ids"], as_mask(kwargs)
    assert mask is not None
    earlier = earlier.repeat(len(ids)) if len(ids) % len(earlier.input_ids) == 0 else earlier
    if len(ids) != len(earlier.input_ids) or ids.shape[1] <= earlier.full \
            or not torch.equal(ids[:, :earlier.full].cpu(), earlier.input_ids.cpu()):
        raise ValueError("input_ids do not begin with the prompt that this cache was made for; pass the sequences that "
                         "generate returned, followed by the new turn")
    positions = mask.long().cumsum(1).sub(1).clamp_min(0)
    new = {**kwargs, "input_ids": ids[:, earlier.full:], "attention_mask": mask[:, earlier.full:],
           "position_ids": positions[:, earlier.full:]}
    later = None
    if handle.reduces(kwargs):
        if handle.config.positions == "original":
            check_gaps_over_cache(handle.model, len(ids), "a new picture in a later turn")
        run = handle.start(new, side="left")
        new, later = run.inputs, run.prompt
    if later is None:                                       # no new picture, or one that is kept whole
        column = torch.arange(ids.shape[1] - earlier.full).expand(len(ids), -1)
        later = PromptMap(ids[:, earlier.full:], column)
    prompt = earlier.then(later)
    call = {**new, "input_ids": prompt.select(ids, 0), "attention_mask": prompt.select(mask, 0)}
    before = earlier.select(positions[:, :earlier.full], 0)         # in the cache already; only their number matters
    call["position_ids"] = torch.cat([before, new["position_ids"]], 1)
    if handle.config.positions == "closed":
        del call["position_ids"]
    return call, prompt


def _infer_mask(ids: Tensor, config: Any) -> Tensor:
    """The mask that transformers infers where none is given: padding tokens, unless they may be an end of sequence."""
    pad, eos = config.pad_token_id, config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    return ids.ne(pad).long()


def _fit_lengths(call: dict[str, Any], prompt: PromptMap, default: Any) -> None:
    """`max_length` and `min_length` count the caller's prompt; the stock method will count the shorter one."""
    config = call.get("generation_config") or default
    for name, other in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = call.get(name, getattr(config, name, None))
        if value and not call.get(other, getattr(config, other, None)):
            call[name] = max(0, value - prompt.full + prompt.reduced)


def _fit_watchers(call: dict[str, Any], prompt: PromptMap) -> None:
    """Streamers and stopping criteria see the caller's prompt."""
    if call.get("streamer") is not None:
        call["streamer"] = _PromptStreamer(call["streamer"], prompt)
    if call.get("stopping_criteria"):
        criteria = call["stopping_criteria"]
        call["stopping_criteria"] = type(criteria)(_restoring(c, prompt) for c in criteria)


def _restoring(criterion: Callable[..., Any], prompt: PromptMap) -> Callable[..., Any]:
    def restored(input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return criterion(prompt.restore(input_ids), scores, **kwargs)

    return restored


class _PromptStreamer:
    """Hands a streamer the caller's prompt in place of the reduced one, then passes everything on."""

    def __init__(self, streamer: Any, prompt: PromptMap) -> None:
        self.streamer, self.prompt, self.begun = streamer, prompt, False

    def put(self, value: Tensor) -> None:
        if not self.begun:
            self.begun, value = True, self.prompt.restore(value)
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()
