"""What `forward` and `generate` of a wrapped model do: reduce what it sees and hears, call the stock method, fit the result.

Calls without pictures pass through, except that a cache which holds a reduced prompt is recognised and its columns mapped, and
that caches are made by the configured plans.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from . import caching, seq2seq
from .compat import check_chunked_prefill, check_decoding, check_gaps_over_cache
from .layers.held import holds_layers, recall_layers, remember_layers
from .layers.run import KEY, LayerRun
from .prompt import PromptMap, as_mask, whole

if TYPE_CHECKING:
    from .pipeline import Run
    from .wrap import Wrapped

_CACHE = "_mmcompress_prompt"   # the PromptMap of a cache's prompt, on the cache


# forward --------------------------------------------------------------------------------------------------------------


def forward(handle: Wrapped, kwargs: dict[str, Any]) -> Any:
    """What `forward` of a wrapped model does with its arguments by name."""
    if handle.timed is None and handle.compresses and kwargs.get("use_cache") and kwargs.get("past_key_values") is None:
        kwargs["past_key_values"] = handle.cache()
    if not handle.reduces(kwargs):
        _fit_mask_to_cache(kwargs)
        pending = handle.pending if kwargs.get("mm_encoder_outputs") is not None else None
        if handle.timed is None and (handle.attached is None or torch.compiler.is_compiling()):
            return through_layers(handle, kwargs, pending)
        if handle.timed is None:
            with caching.noted(handle, kwargs) as record, _timed(record):
                return through_layers(handle, kwargs, pending)
        _mask_for_gaps(kwargs, handle)
        if torch.compiler.is_compiling():
            return through_layers(handle, kwargs, pending)
        with handle.timed.stage("decode" if handle.timed.count("prefill") else "prefill"):
            return through_layers(handle, kwargs, pending)
    if (cache := kwargs.get("past_key_values")) is not None and cache.get_seq_length() > 0:
        raise ValueError("forward() with pictures and a filled cache: let generate() continue the conversation, "
                         "or call forward with a fresh cache")
    run = handle.start(kwargs)
    if run.prompt is not None:
        _note_positions(handle, run.prompt, kwargs.get("attention_mask"))
    with caching.noted(handle, run.inputs, run), _timed(run):
        out = through_layers(handle, run.inputs, run)
    remember(_cache_of(out), run.prompt)
    return out


def _timed(run: Run | None) -> AbstractContextManager[None]:
    return nullcontext() if run is None else run.stopwatch.stage("prefill")


def through_layers(handle: Wrapped, kwargs: dict[str, Any], run: Run | None) -> Any:
    """The stock forward; `run` says what is to be reduced inside the language model, the cache what was."""
    if kwargs.get("mm_encoder_outputs"):
        kwargs = handle.adapter.take_in(kwargs)
    layers = _layer_run(handle, kwargs, run)
    if layers is None:
        return handle.stock["forward"](**kwargs)
    call, labels = {**kwargs, KEY: layers}, None
    if layers.plan is not None and handle.adapter.masks_loss:
        labels = call.pop("labels", None)                       # its loss would cut the logits by the mask that entered
    out = handle.stock["forward"](**call)
    if labels is not None:
        out = _with_loss(out, labels)
    if layers.plan is not None and (cache := _cache_of(out)) is not None:
        remember_layers(cache, layers.hold(handle.adapter.depth, handle.model.device))
    return out


def _with_loss(out: Any, labels: Tensor) -> Any:
    """The output of a forward without labels, with the mean cross-entropy of each next token; -100 does not count."""
    logits = out[0] if isinstance(out, tuple) else out.logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
    if isinstance(out, tuple):
        return (loss, *out)
    return type(out)(**{**out, "loss": loss})


def _layer_run(handle: Wrapped, kwargs: dict[str, Any], run: Run | None) -> LayerRun | None:
    """What the decoder layers must know of this call; None if all of them see the same columns."""
    cache: Any = kwargs.get("past_key_values")
    new = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if new is None or (cache is None and (run is None or run.layers is None)):
        return None
    held = {} if cache is None else recall_layers(cache, len(new))
    plan = None if run is None else run.layers
    if plan is None and not held:
        return None
    if run is not None and plan is not None:
        plan = plan.repeat(len(new) // run.rows).extend(new.shape[1] - plan.columns)
    past = 0 if cache is None else int(cache.get_seq_length())
    mask = _flat_mask(kwargs.get("attention_mask"), len(new), past + new.shape[1])
    implementation = str(getattr(handle.model.config.get_text_config(), "_attn_implementation", ""))
    return LayerRun(plan, held, handle.adapter.rotary, implementation, mask,
                    past, new.shape[1], None if run is None else run.vision, () if run is None else run.items)


def _flat_mask(mask: Any, rows: int, columns: int) -> Tensor | None:
    """The 2-D mask (B, columns) bool of a call; of a 4-D one, which static caches get, what its last query sees."""
    if mask is None:
        return None
    if isinstance(mask, dict):                                  # one for each kind of layer; sliding windows are refused
        mask = mask["full_attention"]
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise ValueError("attention_mask must be 2-D (prompts, length) where layers of the language model see different tokens")
    if mask.ndim == 4:
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return mask[:, :columns].bool().expand(rows, -1)


def _mask_for_gaps(kwargs: dict[str, Any], handle: Wrapped) -> None:
    """Within generate, which drops a mask of ones: gaps without mask and cache would be read as packed sequences."""
    if handle.config.positions == "original" and kwargs.get("attention_mask") is None \
            and kwargs.get("past_key_values") is None and kwargs.get("position_ids") is not None:
        like = kwargs.get("input_ids")
        if like is not None:
            kwargs["attention_mask"] = torch.ones_like(like)


def _fit_mask_to_cache(kwargs: dict[str, Any]) -> None:
    """A caller's own decoding loop goes on with the mask of the full prompt: cut it to the cache's columns."""
    cache: Any = kwargs.get("past_key_values")
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    if mask is None or ids is None or getattr(mask, "ndim", 0) != 2 or (prompt := recall(cache)) is None:
        return
    if mask.shape[1] == cache.get_seq_length() + ids.shape[1] + prompt.full - prompt.reduced:
        kwargs["attention_mask"] = _join_mask(prompt, mask)


def _join_mask(prompt: PromptMap, mask: Tensor) -> Tensor:
    prompt = prompt.repeat(len(mask))
    return torch.cat([prompt.select(mask[:, :prompt.full], 0), mask[:, prompt.full:]], 1)


def _note_positions(handle: Wrapped, prompt: PromptMap, mask: Tensor | None) -> None:
    """Where text goes on behind a reduced prompt, for models with M-RoPE: they add it to the number of a new column."""
    if prompt.rope_deltas is None:
        return
    tokens = prompt.full if mask is None else mask[:, :prompt.full].sum(1, keepdim=True)
    left = (prompt.column >= 0).sum(1, keepdim=True).to(prompt.rope_deltas.device)
    handle.adapter.note_rope_deltas(prompt.rope_deltas + tokens - left)


# caches ---------------------------------------------------------------------------------------------------------------


def remember(cache: Any, prompt: PromptMap | None) -> None:
    """Note on a cache which prompt it holds reduced, so that a next turn can be fitted to it."""
    if cache is not None and prompt is not None:
        setattr(cache, _CACHE, prompt)


def recall(cache: Any) -> PromptMap | None:
    """The reduced prompt that a cache holds; forgotten once the cache was emptied for another one."""
    prompt: PromptMap | None = getattr(cache, _CACHE, None)
    if prompt is not None and int(cache.get_seq_length()) == 0:
        delattr(cache, _CACHE)
        return None
    return prompt


def _cache_of(out: Any) -> Any:
    if isinstance(out, tuple):                                      # return_dict=False
        return next((x for x in out if isinstance(x, Cache)), None)
    return getattr(out, "past_key_values", None)


# generate -------------------------------------------------------------------------------------------------------------


def generate(handle: Wrapped, kwargs: dict[str, Any]) -> Any:
    """What `generate` of a wrapped model does with its arguments by name."""
    if handle.adapter.seq2seq:
        return seq2seq.generate(handle, kwargs)
    model = handle.model
    inputs = kwargs.pop("inputs", None)
    if inputs is not None:
        if kwargs.get("input_ids") is not None:
            raise ValueError("pass the prompt as input_ids or as the first argument, not both")
        kwargs["input_ids"] = inputs
    cache = kwargs.get("past_key_values")
    earlier = recall(cache)
    if (handle.reduces(kwargs) and handle.config.layers) or holds_layers(cache):
        check_decoding(kwargs)
        kwargs["disable_compile"] = True                        # every step has other lengths, layer by layer
    if earlier is None and not handle.reduces(kwargs):
        return _stock(handle, kwargs, None)
    if kwargs.get("input_ids") is None:
        raise ValueError("generate() with pictures needs input_ids; inputs_embeds alone do not tell where they stand")
    if earlier is None and cache is not None and (held := int(cache.get_seq_length())) > 0:
        deltas = handle.adapter.rope_deltas if handle.adapter.mrope else None
        earlier = whole(kwargs["input_ids"][:, :held], deltas)  # turns so far had no picture, or kept theirs whole
    if kwargs.get("prefill_chunk_size", getattr(kwargs.get("generation_config"), "prefill_chunk_size", None)):
        check_chunked_prefill()
        if handle.config.positions == "original":
            check_gaps_over_cache(model, len(kwargs["input_ids"]), "prefill_chunk_size")
    if kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = _infer_mask(kwargs, model.generation_config)
    prompt: PromptMap | None
    begun = None
    with torch.no_grad():
        if earlier is not None:
            call, prompt, begun = _continue(handle, earlier, kwargs)
        else:
            begun = handle.start(kwargs, side="left")           # generation reads the last column of every row
            call, prompt = begun.inputs, begun.prompt
    if prompt is not None:
        _note_positions(handle, prompt, kwargs.get("attention_mask"))
        _fit_lengths(call, prompt, model.generation_config)
        _fit_watchers(call, prompt)
    _repeat_sound(call, model.generation_config)
    out = _stock(handle, call, begun)
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


def _stock(handle: Wrapped, call: dict[str, Any], run: Run | None) -> Any:
    """The stock `generate`; `run` is the record of what was reduced before it."""
    with caching.generating(handle, call, run) as record:
        handle.timed, handle.pending = None if record is None else record.stopwatch, run
        try:
            return handle.stock["generate"](**call)
        finally:
            handle.timed = handle.pending = None


def _continue(handle: Wrapped, earlier: PromptMap, kwargs: dict[str, Any]
              ) -> tuple[dict[str, Any], PromptMap, Run | None]:
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
    if handle.adapter.mrope:
        return _continue_mrope(handle, earlier, kwargs, new)
    run = later = None
    if handle.reduces(kwargs):
        if handle.config.positions == "original":
            check_gaps_over_cache(handle.model, len(ids), "a new picture in a later turn")
        run = handle.start(new, side="left")
        new, later = run.inputs, run.prompt
    prompt = earlier.then(later or whole(ids[:, earlier.full:]))
    call = {**new, "input_ids": prompt.select(ids, 0), "attention_mask": prompt.select(mask, 0)}
    before = earlier.select(positions[:, :earlier.full], 0)         # in the cache already; only their number matters
    call["position_ids"] = torch.cat([before, new["position_ids"]], 1)
    if handle.config.positions == "closed":
        del call["position_ids"]
    return call, prompt, run


def _continue_mrope(handle: Wrapped, earlier: PromptMap, kwargs: dict[str, Any], new: dict[str, Any]
                    ) -> tuple[dict[str, Any], PromptMap, Run | None]:
    """The same for multi-dimensional rotary positions: the new turn's are the model's own, moved behind the earlier ones."""
    ids, mask, adapter = kwargs["input_ids"], kwargs["attention_mask"], handle.adapter
    if earlier.rope_deltas is None:
        raise ValueError("this cache does not know where its rotary positions ended; let generate() of the wrapped model make "
                         "the first turn")
    begun = mask[:, :earlier.full].sum(1, keepdim=True) + earlier.rope_deltas.to(mask.device)           # (B, 1)
    own, after = (x.to(ids.device) for x in adapter.positions(new, new["input_ids"].cpu(), new["attention_mask"].cpu()))
    new["position_ids"] = own + begun                                                                   # (3, B, L)
    run = later = None
    if handle.reduces(kwargs):
        run = handle.start(new, side="left")
        later, positions = run.prompt, run.inputs.get("position_ids", new["position_ids"])[-3:]
        new = {k: v for k, v in run.inputs.items() if k not in adapter.dropped}
    else:
        positions = new["position_ids"]
        new = {k: v for k, v in new.items() if k not in adapter.dropped}
    part = later or whole(ids[:, earlier.full:])
    total = mask.sum(1, keepdim=True)
    prompt = earlier.then(replace(part, rope_deltas=after + begun - total))
    call = {**new, "input_ids": prompt.select(ids, 0), "attention_mask": prompt.select(mask, 0)}
    past = positions.new_zeros(3, len(ids), earlier.reduced)            # in the cache already; only their number matters
    plain = call["attention_mask"].long().cumsum(1).sub(1).clamp_min(0)
    call["position_ids"] = torch.cat([plain[None], torch.cat([past, positions], 2)])
    return call, prompt, run


def _repeat_sound(call: dict[str, Any], default: Any) -> None:
    """Encoded recordings for every beam and sample; transformers repeats those of pictures and clips only."""
    sound = (call.get("mm_encoder_outputs") or {}).get("audio")
    if sound is None:
        return
    config = call.get("generation_config") or default
    times = max(call.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences"))
    again: Any = [features for features in sound.pooler_output for _ in range(times)]
    call["mm_encoder_outputs"] = {**call["mm_encoder_outputs"], "audio": type(sound)(pooler_output=again)}


def _infer_mask(kwargs: dict[str, Any], config: Any) -> Tensor:
    """The mask that transformers infers where none is given: padding tokens, unless they may be an end of sequence."""
    config, ids = kwargs.get("generation_config") or config, kwargs["input_ids"]
    pad, eos = (kwargs.get(name, getattr(config, name)) for name in ("pad_token_id", "eos_token_id"))
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
