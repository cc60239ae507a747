"""The only file here that changes a model instance, and undoes it."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ..compat import base_of
from ..errors import UnsupportedModelError, WrapError
from .attention import STOCK, name_of, register
from .cache import CompressedCache
from .chain import Chain, chain
from .filling import FillingCache
from .layer import SlotLayer
from .plan import CachePlan
from .tally import Tally
from .timeline import PADDING
from .view import TAGS

_HANDLE, _PREPARE, _PREFILL = "_mmcompress_cache", "_prepare_cache_for_generation", "_prefill"


class Attached:
    """A model whose `generate` keeps its cache small. Undo it with `detach()`, or use it as a context manager.

    tally    what the last call with a compressed cache saved and took; None before the first
    missing  (B, 4) int64: tokens of the next prompt that a reducer drops before the language model, by modality; the cache that
             `generate` makes is told (`CompressedCache.miss`); None: none
    """

    def __init__(self, model: Any, plan: CachePlan | Chain) -> None:
        self.model, self.plan = model, plan
        self.tally: Tally | None = None
        self.missing: Tensor | None = None
        self.config = model.config.get_text_config(decoder=True)
        self.stock: str = self.config._attn_implementation
        self._hooks: list[Any] = []

    def cache(self) -> CompressedCache:
        """An empty cache, to pass as `past_key_values` to `forward` or `generate`. `generate` makes one where none is given."""
        return CompressedCache(self.config, self.plan, self.model.device)

    def detach(self) -> None:
        """Make the model what it was. Caches made for it that have dropped something are of no use afterwards."""
        if vars(self.model).get(_HANDLE) is not self:
            return
        for hook in self._hooks:
            hook.remove()
        self.config._attn_implementation = self.stock
        for name in (_HANDLE, _PREPARE, _PREFILL):
            del vars(self.model)[name]

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.detach()


def attach(model: Any, plan: CachePlan | Chain | Sequence[CachePlan]) -> Attached:
    """Let a model's attention look at slots, and its `generate` make caches that `plan` keeps small.

    Several plans follow one another. This instance only, and others that were built around the very same config object. Raises
    WrapError where one is attached already, UnsupportedModelError for attention other than SDPA, eager and FlashAttention 2 and
    3 (these tested with a stand-in).
    """
    model = base_of(model)
    if _HANDLE in vars(model):
        raise WrapError(f"{type(model).__name__} has a compressed cache already; detach(model) first")
    handle = Attached(model, plan := chain(plan))
    if handle.stock not in STOCK:
        raise UnsupportedModelError(f"attn_implementation={handle.stock!r}: a compressed cache stands on {', '.join(STOCK)}; "
                                    f"load the model with attn_implementation='sdpa'")
    if not hasattr(model, _PREPARE):
        raise UnsupportedModelError(f"{type(model).__name__} does not generate; attach to the model with a language head")
    register()
    handle.config._attn_implementation = name_of(handle.stock)
    handle._hooks = _hooks(model, plan)
    vars(model)[_HANDLE] = handle
    vars(model)[_PREPARE], vars(model)[_PREFILL] = MethodType(_prepare, model), MethodType(_prefill, model)
    return handle


def detach(model: Any) -> None:
    """Undo `attach`; nothing where nothing is attached."""
    handle: Attached | None = vars(base_of(model)).get(_HANDLE)
    if handle is not None:
        handle.detach()


def _prepare(model: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any) -> None:
    """In place of the stock method of this name: where it would make a dynamic cache, one of ours."""
    handle: Attached = vars(model)[_HANDLE]
    given = model_kwargs.get("past_key_values")
    if generation_mode == "assisted_generation":
        raise ValueError("assistant_model or prompt_lookup_num_tokens: guesses come in with the prompt, and would be "
                         "compressed with it before they are checked; leave them out, or detach(model)")
    asked = generation_config.cache_implementation
    if given is None and asked not in (None, "dynamic", "static"):
        raise ValueError(f"cache_implementation={asked!r} with a compressed cache attached: leave it out, pass 'static' for "
                         f"room laid out in advance for max_new_tokens, or detach(model)")
    if given is None and asked == "static" and handle.plan.every is not None:
        raise ValueError(f"cache_implementation='static' with every={handle.plan.every}: the plan compresses while decoding, "
                         f"which a static cache does not; leave one of them out")
    if generation_config.prefill_chunk_size and not handle.plan.again:
        raise ValueError(f"prefill_chunk_size={generation_config.prefill_chunk_size}: the plan would compress the first chunk "
                         f"alone; pass again=True to {type(handle.plan).__name__}")
    if given is None:
        generation_config.cache_implementation = None       # the stock cache made here is thrown away: a small one
    getattr(type(model), _PREPARE)(model, generation_config, model_kwargs, generation_mode, *args)
    generation_config.cache_implementation = asked
    if given is None and model_kwargs.get("past_key_values") is not None:
        if asked == "static":
            columns = max(args[-1] + 1, generation_config.max_cache_len or 0)
            cache: CompressedCache = FillingCache(handle.config, handle.plan, model.device, columns)
        else:
            cache = handle.cache()
        model_kwargs["past_key_values"] = cache
        if handle.missing is not None:
            cache.miss(handle.missing)


def _prefill(model: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any,
             **kwargs: Any) -> Any:
    """In place of the stock method of this name.

    A prompt that comes in chunks is announced to the cache as a whole; for `cache_implementation="static"` the cache that the
    prompt filled gives way to its static form.
    """
    cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
    if isinstance(cache, FillingCache):
        cache.promised = False
    if generation_config.prefill_chunk_size and isinstance(cache, CompressedCache):
        length = getattr(generation_config, "_mask_length", input_ids.shape[1]) if mask is None else mask.shape[1]
        cache.announce(torch.ones(len(input_ids), length, dtype=torch.long) if mask is None else mask)
        if placeholders(model.config):
            cache.tag(tags_of(model.config, input_ids[:, int(cache.get_seq_length()) - length:]))
    out = getattr(type(model), _PREFILL)(model, input_ids, generation_config, model_kwargs, *args, **kwargs)
    if isinstance(cache, FillingCache):
        out.past_key_values = model_kwargs["past_key_values"] = cache.frozen()
    return out


def _hooks(model: Any, plan: CachePlan | Chain) -> list[Any]:
    """What a plan has to be told and a cache cannot see: hidden states, and where the placeholders of a prompt stand."""
    hooks = [model.register_forward_pre_hook(_note_call, with_kwargs=True)]
    if "hidden" in plan.needs:
        layers = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "num_key_value_groups")]
        hooks += [m.register_forward_pre_hook(_note_hidden, with_kwargs=True) for m in layers]
    if placeholders(model.config):
        hooks.append(getattr(model, model.base_model_prefix).register_forward_pre_hook(_note_tags, with_kwargs=True))
    return hooks


def _note_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if isinstance(cache := kwargs.get("past_key_values"), CompressedCache):
        vars(model)[_HANDLE].tally = cache.tally
        setattr(cache, PADDING, kwargs.get("attention_mask", args[1] if len(args) > 1 else None))


def _note_hidden(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    if isinstance(cache, CompressedCache) and isinstance(layer := cache.layers[module.layer_idx], SlotLayer):
        layer.hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _note_tags(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache, ids = kwargs.get("past_key_values"), kwargs.get("input_ids", args[0] if args else None)
    if isinstance(cache, CompressedCache) and ids is not None and ids.shape[1] > 1:
        cache.tag(tags_of(module.config, ids))


def placeholders(config: Any) -> dict[int, int]:
    """Placeholder ids that a multimodal config names -> their tags; empty for a model of text."""
    names = {"image": ("image_token_id", "image_token_index"), "video": ("video_token_id", "video_token_index"),
             "audio": ("audio_token_id", "audio_token_index")}
    found = {tag: getattr(config, next((n for n in options if hasattr(config, n)), ""), None) for tag, options in names.items()}
    return {number: TAGS.index(tag) for tag, number in found.items() if number is not None}


def tags_of(config: Any, input_ids: Tensor) -> Tensor:
    """The modality of each token of a prompt, from its placeholders. (B, n) -> (B, n) int64"""
    tags = torch.zeros_like(input_ids)
    for number, tag in placeholders(config).items():
        tags = tags.masked_fill(input_ids == number, tag)
    return tags
