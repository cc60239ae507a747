"""Which reducers there are: name -> "module:Class", imported only when asked for.

Outsiders add theirs with `register("image", "mine", "package.module:Class")`, or as an entry point named
"image.mine" in the group "mmcompress.reducers". Tests, the command line and the README's table read this list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

ENTRY_POINTS = "mmcompress.reducers"

_REDUCERS: dict[str, dict[str, str]] = {
    "image": {
        "global_rank": "mmcompress.image.global_rank:GlobalRank",
        "globalcom2": "mmcompress.image.globalcom2:GlobalCom2",
        "visionzip": "mmcompress.image.visionzip:VisionZip",
        "cls_topk": "mmcompress.image.cls_topk:ClsTopK",
        "average_pool": "mmcompress.image.average_pool:AveragePool",
        "uniform": "mmcompress.image.uniform:Uniform",
        "random": "mmcompress.image.random:Random",
    },
    "video": {
        "spatio_temporal_merge": "mmcompress.video.spatio_temporal_merge:SpatioTemporalMerge",
        "holitom": "mmcompress.video.holitom:HoliTom",
        "fastvid": "mmcompress.video.fastvid:FastVID",
        "vidcom2": "mmcompress.video.vidcom2:VidCom2",
        "dycoke": "mmcompress.video.dycoke:DyCoke",
        "evs": "mmcompress.video.evs:EVS",
        "uniform_frames": "mmcompress.video.uniform_frames:UniformFrames",
        "frame_pool": "mmcompress.video.frame_pool:FramePool",
        "random": "mmcompress.video.random:Random",
    },
    "audio": {
        "adaptive_spectral_pool": "mmcompress.audio.adaptive_spectral_pool:AdaptiveSpectralPool",
        "spectral_pool": "mmcompress.audio.spectral_pool:SpectralPool",
        "atome": "mmcompress.audio.atome:ATome",
        "speech_prune": "mmcompress.audio.speech_prune:SpeechPrune",
        "silence_prune": "mmcompress.audio.silence_prune:SilencePrune",
        "energy_prune": "mmcompress.audio.energy_prune:EnergyPrune",
        "mean_pool": "mmcompress.audio.mean_pool:MeanPool",
        "stride": "mmcompress.audio.stride:Stride",
        "random": "mmcompress.audio.random:Random",
    },
    "layers": {
        "fastv": "mmcompress.layers.fastv:FastV",
        "pyramid_drop": "mmcompress.layers.pyramid_drop:PyramidDrop",
        "stage_pool": "mmcompress.layers.stage_pool:StagePool",
        "in_layer": "mmcompress.layers.in_layer:InLayer",
        "fastadasp": "mmcompress.audio.fastadasp:FastAdaSP",
    },
    "cache": {
        "snapkv": "mmcompress.cache.snapkv:SnapKV",
        "h2o": "mmcompress.cache.h2o:H2O",
        "streaming_llm": "mmcompress.cache.streaming_llm:StreamingLLM",
        "razor_attention": "mmcompress.cache.razor_attention:RazorAttention",
        "ems": "mmcompress.cache.ems:EMS",
        "kvmerger": "mmcompress.cache.kvmerger:KVMerger",
        "minicache": "mmcompress.cache.minicache:MiniCache",
        "mikv": "mmcompress.cache.mikv:MiKV",
        "knorm": "mmcompress.cache.knorm:KNorm",
        "keydiff": "mmcompress.cache.keydiff:KeyDiff",
        "random": "mmcompress.cache.random:Random",
        "recent": "mmcompress.cache.recent:Recent",
    },
}
SLOTS = tuple(_REDUCERS)
SHOWN = ("layer", "keep", "stride", "bits")     # fields that are said even where they are the default
_IS = {     # what makes an instance a reducer of a slot
    "image": ("count", "__call__"),
    "video": ("count", "__call__"),
    "audio": ("count", "__call__"),
    "layers": ("steps",),
    "cache": ("scores", "__call__"),
}


def register(slot: str, name: str, target: str) -> None:
    """Add a reducer under `name`. `target` is "package.module:Class", a dataclass whose fields are its configuration."""
    _check_slot(slot)
    known = available(slot)
    if name in known and known[name] != target:
        raise ValueError(f"{slot} reducer {name!r} is {known[name]} already; choose another name")
    _REDUCERS[slot][name] = target


def available(slot: str) -> dict[str, str]:
    """Name -> "module:Class" of every reducer for a slot, entry points included."""
    _check_slot(slot)
    return {**_from_entry_points(slot), **_REDUCERS[slot]}


@cache
def _from_entry_points(slot: str) -> dict[str, str]:
    prefix = f"{slot}."
    return {e.name[len(prefix):]: e.value for e in entry_points(group=ENTRY_POINTS) if e.name.startswith(prefix)}


def reducer_class(slot: str, name: str) -> type:
    """The class registered under a name."""
    known = available(slot)
    if name not in known:
        raise ValueError(f"no {slot} reducer named {name!r}; known: {', '.join(sorted(known))}")
    module, _, attribute = known[name].partition(":")
    return getattr(import_module(module), attribute)


def build(slot: str, config: Any) -> Any:
    """A reducer from what the user gave: a reducer itself, a name, or a dict with `name` and the fields."""
    if isinstance(config, str):
        return reducer_class(slot, config)()
    if isinstance(config, dict):
        options = dict(config)
        if "name" not in options:
            raise ValueError(f"{slot}: {config!r} needs a 'name'; known: {', '.join(sorted(available(slot)))}")
        cls = reducer_class(slot, options.pop("name"))
        if unknown := sorted(set(options) - {f.name for f in fields(cls)}):
            raise ValueError(f"{cls.__name__} has no option {', '.join(unknown)}; "
                             f"it has {', '.join(f.name for f in fields(cls))}")
        return cls(**options)
    if not isinstance(config, type) and all(callable(getattr(config, name, None)) for name in _IS[slot]):
        return config
    raise ValueError(f"{slot}={config!r}: pass a reducer (an instance with {' and '.join(f'{n}()' for n in _IS[slot])}), its "
                     f"name, or a dict")


def describe(slot: str, reducer: Any) -> dict[str, Any]:
    """The inverse of `build`: {"name": ..., fields that differ from their defaults or say how much is kept}."""
    target = f"{type(reducer).__module__}:{type(reducer).__qualname__}"
    names = [name for name, known in available(slot).items() if known == target]
    if not names or not is_dataclass(reducer) or isinstance(reducer, type):
        raise ValueError(f"{target} is not registered, so its configuration cannot be saved; "
                         f"call mmcompress.register({slot!r}, NAME, {target!r}) first")
    said = {f.name: getattr(reducer, f.name) for f in fields(reducer)
            if f.name in SHOWN or getattr(reducer, f.name) != f.default}
    return {"name": names[0], **{k: describe("image", v) if is_dataclass(v) else _plain(v) for k, v in said.items()}}


def _plain(value: Any) -> Any:
    """Tuples as lists and mappings as dicts, which YAML and JSON know."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def label(reducer: Any) -> str:
    """A reducer in short: its class, where and how much, and the fields that differ from their defaults."""
    if not is_dataclass(reducer) or isinstance(reducer, type):
        return repr(reducer)
    shown = [(f.name, getattr(reducer, f.name)) for f in fields(reducer)
             if f.name in SHOWN or getattr(reducer, f.name) != f.default]
    return f"{type(reducer).__name__}({', '.join(f'{name}={label(value)}' for name, value in shown)})"


def _check_slot(slot: str) -> None:
    if slot not in _REDUCERS:
        raise ValueError(f"no slot {slot!r}; known: {', '.join(_REDUCERS)}")
