"""The only file that changes a model instance, and undoes it.

`wrap` replaces `forward` and `generate` on the instance (never on its class). With pictures, clips or recordings in the call
they reduce them first and hand the shorter prompt and the precomputed features to the stock methods; else they pass through.
What keeps the cache small is attached and detached by `cache.attach`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

from torch import Tensor

from . import caching, calls, seq2seq
from .adapters import Encoded, adapter_for
from .checking import check
from .compat import base_of
from .config import Positions, WrapConfig, build_cache, build_layers, given_reducers
from .errors import WrapError
from .layers.run import enter_layer
from .pipeline import Items, Run, captures_of, reduce_inputs
from .prompt import PromptMap
from .report import Report, Stopwatch, describe_run

_STATE = "_mmcompress"          # the handle, in the model's __dict__
_METHODS = ("forward", "generate")


def wrap(model: Any, config: str | Path | WrapConfig | None = None, *, image: Any = None, video: Any = None, audio: Any = None,
         layers: Any = (), cache: Any = (), budget: float | int | None = None, floor: float | int | None = None,
         positions: Positions | None = None) -> Wrapped:
    """Make a LLaVA-style transformers model, or Whisper, reduce the tokens of its pictures, clips and recordings, or any
    transformers model that generates keep its key-value cache small.

    Undo it with `remove()` or a `with` block.

    model      a transformers model of a known family, also inside PEFT or with accelerate hooks; for `cache` alone of any
    config     a YAML file such as "configs/globalcom2-25.yaml", instead of the keywords
    image      a reducer, its registry name, a dict {"name": ..., fields}, or a YAML file that configures one
    video      the same for clips
    audio      the same for recordings
    layers     reducers inside the language model, such as [FastV(2, 0.5)]; one or several, names and dicts as well
    cache      plans for the key-value cache, such as SnapKV(keep=0.25): one or several that follow one another, names and dicts
               as well. `generate` makes such caches, so does `forward` with `use_cache=True`, and `Wrapped.cache`
    budget     what the pictures, clips and recordings of a prompt may cost together: tokens (int) or a share of them (float),
               divided by how much each has to say; `floor` is what each keeps at least (5 % of its tokens). The reducers' own
               `keep` does not count then
    positions  "closed" or "original"; by default what the reducer was made for, see `WrapConfig`
    """
    if isinstance(config, WrapConfig):
        chosen = config
    elif config is not None:
        if any(x is not None for x in (image, video, audio, budget)) or build_layers(layers) or build_cache(cache):
            raise ValueError("pass either a configuration file or image=..., video=..., audio=..., layers=..., cache=... and "
                             "budget=..., not both")
        chosen = WrapConfig.load(config)
    else:
        chosen = WrapConfig(**given_reducers(image=image, video=video, audio=audio), layers=build_layers(layers), cache=cache,
                            positions=positions, budget=budget, floor=WrapConfig.floor if floor is None else floor)
    return Wrapped(model, chosen)


def from_pretrained(model: Any, folder: str | Path) -> Wrapped:
    """Wrap a model with a configuration that `Wrapped.save_pretrained` wrote."""
    return Wrapped(model, WrapConfig.load(folder))


def handle_of(model: Any) -> Wrapped | None:
    """The handle of a wrapped model; None if it is not wrapped."""
    return base_of(model).__dict__.get(_STATE)


def unwrap(model: Any) -> Any:
    """Remove the wrap of a model, if it has one, and return the model."""
    if (handle := handle_of(model)) is not None:
        handle.remove()
    return model


class Wrapped:
    """A model that reduces what it sees and hears, or its cache. Call it, or the model itself, as before.

    `report` says what the last call saved and cost, `last` which token of each item went where.
    """

    def __init__(self, model: Any, config: WrapConfig) -> None:
        base = base_of(model)
        if (held := base.__dict__.get(_STATE)) is not None:
            raise WrapError(f"this model is wrapped already ({held.config.label}); "
                            f"call remove() on that handle, or mmcompress.unwrap(model), first")
        self.outer = model
        self.model = base
        self.config = config
        self.adapter = adapter_for(base, text=bool(config.cache) and not config.before and not config.layers)
        self.active = True
        self.pending: Run | None = None            # while generate runs: what its prefill is to do inside the language model
        self.only_training = False                 # evaluation mode sees all tokens, as training schedules want
        self.watch: Callable[[Run], None] | None = None        # told of every reduced call
        self._encoded: list[tuple[Any, dict[str, Encoded]]] | None = None   # within encoding_shared(): pixels, what they gave
        self._hooks: list[Any] = []
        self.begun: Run | None = None              # while generate of a seq2seq model runs: the record of all its windows
        self.mark: Any = None                      # when its encoder began
        self.merging: Any = None                   # while it runs: what a reducer does inside it
        self.attached: Any = None                  # the cache.Attached whose plans are in the model
        self.tally: Any = None                     # the cache.Tally of what the last reduced call compressed
        check(base, self.adapter, config)
        self.run: Run | None = None                # the record of the last reduced call
        self.ids: Tensor | None = None             # its input_ids
        self.timed: Stopwatch | None = None        # while generate runs: its forward calls are timed
        caching.follow(self)                       # raises where a model has no generate, or attention of another kind
        self._held = {name: base.__dict__.get(name) for name in _METHODS}       # accelerate keeps its own there
        self.stock: dict[str, Callable[..., Any]] = {name: getattr(base, name) for name in _METHODS}
        self.names = {name: list(inspect.signature(stock).parameters) for name, stock in self.stock.items()}
        hears = self.adapter.reads("audio") and not self.adapter.takes_features and not self.adapter.seq2seq
        for name, replacement in (("forward", _forward), ("generate", _generate)):
            more = hears and name == "forward"
            base.__dict__[name] = MethodType(_with_signature(replacement, self.stock[name], more), base)
        base.__dict__[_STATE] = self
        if config.layers:
            self._hook_layers()
        if self.adapter.seq2seq:
            self._hooks += seq2seq.hook_encoder(self)

    def configure(self, config: WrapConfig) -> None:
        """Reduce differently from the next call on, as training schedules do; caches made before stay valid."""
        check(self.model, self.adapter, config)
        self.config = config
        if self.active:
            caching.follow(self, None if self.attached is None else self.attached.plan)
        if config.layers and not self._hooks:
            self._hook_layers()

    def _hook_layers(self) -> None:
        for number, layer in enumerate(self.adapter.decoder_layers):
            self._hooks.append(layer.register_forward_pre_hook(partial(enter_layer, number), with_kwargs=True))

    # calling ------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._check_wrapped()
        return self.outer(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self._check_wrapped()
        return self.outer.generate(*args, **kwargs)

    def cache(self) -> Any:
        """An empty cache that the configured plans keep small, for a conversation: `generate(..., past_key_values=w.cache())`.

        A stock one under `disable` and, where `only_training` says so, in evaluation. Raises ValueError if there is no plan.
        """
        self._check_wrapped()
        return caching.make(self)

    # looking ------------------------------------------------------------------------------------------------------

    @property
    def last(self) -> Items:
        """The pictures, then the clips, then the recordings of the last reduced call: layout, index, source and mass of each.

        `last.spans` are the time spans of the recordings' tokens, in seconds.
        """
        return Items() if self.run is None else self.run.items

    @property
    def prompt(self) -> PromptMap | None:
        """How the columns of the last reduced call lie in its logits; None if none was dropped.

        After `generate` with reducers inside the language model: as if `forward` had been called on the prompt.
        """
        return None if self.run is None or self.ids is None else self.run.final(self.ids)

    @property
    def report(self) -> Report:
        """What the last reduced call saved and cost."""
        run = self.run
        if run is None:
            return Report(reducer=self.config.label)
        if self.adapter.seq2seq:
            return seq2seq.report(self)
        return describe_run(run, self.config, self.model, self.adapter.depth, self.tally)

    def plot(self, image: Any, item: int = 0, layer: int | None = None, **options: Any) -> Any:
        """The kept tokens over the picture, a strip of a clip's frames or a recording's spectrogram: a matplotlib Figure.

        image    the picture; of a clip its frames: (T, H, W, 3) uint8, a list of pictures, or what `video.read` gave; of a
                 recording what `audio.load` gave, or its samples (T,) with `sample_rate=`
        item     numbers the pictures, clips and recordings of the last call, as `last` lists them
        layer    what this decoder layer still saw; None: what entered the language model
        options  of `viz.plot_strip` for clips, of `viz.plot_spans` for recordings
        """
        if not self.last:
            raise ValueError("nothing to plot: call the wrapped model with a picture, a clip or a recording first")
        if not 0 <= item < len(self.last):
            raise ValueError(f"item={item}: the last call had {len(self.last)} pictures, clips and recordings, numbered from 0")
        shown = self.last[item]
        kept = shown if layer is None else shown.at(layer)
        if shown.modality == "video":
            from .viz.strip import plot_strip

            return plot_strip(image, kept, **options)
        if shown.modality == "audio":
            from .viz.spectrogram import plot_spans

            return plot_spans(image, kept, **options)
        from .viz.overlay import plot_kept

        return plot_kept(image, kept, **options)

    # keeping and undoing ------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the configuration, not the model, to `folder`/mmcompress.json."""
        self.config.save(folder)

    @contextmanager
    def disable(self) -> Iterator[Wrapped]:
        """The stock model within the block; the wrap stays in place."""
        before, self.active = self.active, False
        try:
            with caching.paused(self) if before else nullcontext():
                yield self
        finally:
            self.active = before

    def remove(self) -> Any:
        """Put everything back as it was and return the model. Doing it twice is fine."""
        state = self.model.__dict__
        if not self.in_place:
            return self.outer
        for name in _METHODS:
            place = name if _is_ours(state.get(name)) else f"_old_{name}"       # accelerate hooks added since the wrap
            if not _is_ours(state.get(place)):
                raise WrapError(f"{type(self.model).__name__}.{name} was replaced after the wrap by "
                                f"{state.get(name)!r}; undo that first, then call remove()")
            if place != name:
                state[place] = self.stock[name]
            elif self._held[name] is None:
                del state[name]
            else:
                state[name] = self._held[name]
        del state[_STATE]
        caching.leave(self)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        return self.outer

    def __enter__(self) -> Wrapped:
        self._check_wrapped()
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Wrapped({type(self.model).__name__}, {self.config.label}, positions={self.config.positions!r})"

    @property
    def in_place(self) -> bool:
        """Whether the model is still wrapped by this handle."""
        return self.model.__dict__.get(_STATE) is self

    def _check_wrapped(self) -> None:
        if not self.in_place:
            raise WrapError("this wrap was removed; call mmcompress.wrap(model, ...) again")

    # what the replaced methods do ---------------------------------------------------------------------------------

    def reduces(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call has pictures, clips or recordings to reduce."""
        if not self.listens:
            return False
        if self.adapter.seq2seq:
            return False                                        # its encoder's hook does
        held = {"image": self.adapter.has_images, "video": self.adapter.has_videos, "audio": self.adapter.has_audio}
        return any((slot in self.config.before or bool(self.config.layers)) and holds(kwargs) for slot, holds in held.items())

    @property
    def listens(self) -> bool:
        """Whether the wrap does anything now; of seq2seq models, whether what the encoder hears is reduced."""
        return self.active and (self.model.training or not self.only_training)

    @property
    def compresses(self) -> bool:
        """Whether caches that are made now are kept small."""
        return bool(self.config.cache) and self.listens

    def start(self, kwargs: dict[str, Any], side: Any = None, encoded: Mapping[str, Encoded] | Encoded | None = None) -> Run:
        """Reduce a call; the handle keeps its record, not its tensors."""
        if encoded is None and self._encoded is not None:
            encoded = self._encode_once(kwargs)
        run = reduce_inputs(self.adapter, kwargs, self.config, side, encoded)
        self.run, self.ids, self.tally = replace(run, inputs={}, vision=None), kwargs["input_ids"], None
        if self.watch is not None:
            self.watch(run)
        return run

    @contextmanager
    def encoding_shared(self) -> Iterator[None]:
        """Calls within the block that see the same pixels share the vision tower's work, gradients included.

        The first of them decides which vision layers are captured, so it must be the one whose reducers read them.
        """
        self._encoded = []
        try:
            yield
        finally:
            self._encoded = None

    def _encode_once(self, kwargs: dict[str, Any]) -> dict[str, Encoded]:
        assert self._encoded is not None
        pixels = self.adapter.pixels(kwargs)
        for seen, encoded in self._encoded:
            if all(a is b for a, b in zip(seen, pixels)):
                return encoded
        found = self.adapter.find(kwargs, kwargs["input_ids"].cpu())
        encoded = self.adapter.encode_all(kwargs, found, captures_of(self.config, self.adapter))
        self._encoded.append((pixels, encoded))
        return encoded


def _is_ours(method: Any) -> bool:
    return isinstance(method, MethodType) and getattr(method.__func__, _STATE, False)


def _with_signature(replacement: Callable[..., Any], stock: Callable[..., Any], features: bool = False) -> Callable[..., Any]:
    """A copy of `replacement` that shows the stock method's signature, which transformers and PEFT inspect.

    features  show `mm_encoder_outputs` too, so that `generate` hands encoded recordings on
    """
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(self, *args, **kwargs)

    signature = inspect.signature(stock)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__name__, method.__doc__ = replacement.__name__.lstrip("_"), stock.__doc__
    more = [inspect.Parameter("mm_encoder_outputs", inspect.Parameter.KEYWORD_ONLY, default=None)] if features else []
    own = list(signature.parameters.values())
    at = len(own) - any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own)
    method.__signature__ = signature.replace(parameters=[first, *own[:at], *more, *own[at:]])  # type: ignore[attr-defined]
    setattr(method, _STATE, True)
    return method


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    handle: Wrapped = model.__dict__[_STATE]
    return calls.forward(handle, {**dict(zip(handle.names["forward"], args)), **kwargs})


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    handle: Wrapped = model.__dict__[_STATE]
    return calls.generate(handle, {**dict(zip(handle.names["generate"], args)), **kwargs})
