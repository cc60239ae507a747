"""What every adapter shares: the contract, and reading one vision layer's queries and keys through hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmcompress.compat import check_seam
from mmcompress.errors import SignalError, UnsupportedModelError
from mmcompress.tokens import ImageLayout, LayerState


@dataclass(frozen=True, eq=False)
class Encoded:
    """What the vision tower and projector made of the pictures of a call, in placeholder order.

    `features` holds (N_i, D) per picture, packed as the language model reads them. `vision` holds, per captured layer,
    the state of all tiles end to end: query (tiles, H, d), keys (tiles, S, H, d).
    """

    features: Sequence[Tensor]
    vision: Mapping[int, tuple[Tensor, Tensor]]

    def state(self, layouts: Sequence[ImageLayout], items: Sequence[int]) -> dict[int, LayerState]:
        """The captured layers for some pictures of equal layout, batched."""
        starts, total = [], 0
        for layout in layouts:
            starts.append(total)
            total += layout.tiles
        tiles = layouts[items[0]].tiles
        out = {}
        for layer, (query, keys) in self.vision.items():
            if len(keys) != total:
                raise SignalError(f"the vision tower saw {len(keys)} tiles where the layouts have {total}; "
                                  f"report this with the model's config")
            pick = lambda x: torch.stack([x[starts[i]:starts[i] + tiles] for i in items])  # noqa: E731
            out[layer] = LayerState(query=pick(query), keys=pick(keys))
        return out


class Adapter(ABC):
    """One model family. Holds no state beyond the model; never changes it."""

    encoder_inputs: ClassVar[tuple[str, ...]]       # what get_image_features takes; dropped once the pictures are encoded

    def __init__(self, model: Any) -> None:
        check_seam(model)
        self.model = model
        self.config = model.config

    @property
    def image_token_id(self) -> int:
        """The placeholder that stands for one image token in `input_ids`."""
        return self.config.image_token_id

    @property
    def has_vision_cls(self) -> bool:
        """Whether the vision tower puts a [CLS] token before its patches, as far as its configuration tells."""
        return any(hasattr(m, name) for m in self.model.model.vision_tower.modules()
                   for name in ("class_embedding", "cls_token"))

    @property
    def decoder_layers(self) -> Any:
        """The language model's decoder layers, in order."""
        return self.model.model.language_model.layers

    @property
    def depth(self) -> int:
        """How many decoder layers the language model has."""
        return self.config.get_text_config().num_hidden_layers

    def rotary(self, hidden: Tensor, position_ids: Tensor) -> Any:
        """Rotary embeddings (cos, sin), each (B, L, d), of position ids (B, L)."""
        return self.model.model.language_model.rotary_emb(hidden, position_ids=position_ids)

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        pixels = inputs.get("pixel_values")
        return pixels is not None and len(pixels) > 0

    @abstractmethod
    def layouts(self, inputs: Mapping[str, Any]) -> list[ImageLayout]:
        """The layout of each picture, in placeholder order, from shapes and sizes alone."""

    def encode(self, inputs: Mapping[str, Any], layers: Sequence[int] = ()) -> Encoded:
        """Run tower and projector as the stock model does, capturing the named vision layers on the way."""
        strategy = inputs.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        if strategy == "full" and self.has_vision_cls:
            raise UnsupportedModelError("vision_feature_select_strategy='full' with a [CLS] vision tower puts [CLS] among "
                                        "the image tokens, where it has no place in a layout; set it to 'default'")
        with self.capture(layers) as vision:
            out = self.model.model.get_image_features(
                **{k: inputs[k] for k in self.encoder_inputs if inputs.get(k) is not None}, return_dict=True)
        return Encoded(features=list(out.pooler_output), vision=vision)

    def outputs(self, features: Sequence[Tensor]) -> dict[str, Any]:
        """Features per prompt, each (K, D) -> the `mm_encoder_outputs` that `forward` and `generate` take."""
        pooled: Any = list(features)                # transformers annotates a tensor, and takes a list from this family
        return {"image": BaseModelOutputWithPooling(pooler_output=pooled)}

    @contextmanager
    def capture(self, layers: Sequence[int]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
        """Fill the yielded dict with {layer: (first token's query, keys)} while the vision tower runs."""
        got: dict[int, tuple[Tensor, Tensor]] = {}
        handles, queries = [], {}
        try:
            for layer in layers:
                q_proj, k_proj, heads = vision_projections(self.model.model.vision_tower, layer)

                def take_query(_m: Any, _i: Any, out: Tensor, layer: int = layer, heads: int = heads) -> None:
                    queries[layer] = out[:, 0].detach().unflatten(-1, (heads, -1))

                def take_keys(_m: Any, _i: Any, out: Tensor, layer: int = layer, heads: int = heads) -> None:
                    got[layer] = (queries[layer], out.detach().unflatten(-1, (heads, -1)))

                handles += [q_proj.register_forward_hook(take_query), k_proj.register_forward_hook(take_keys)]
            yield got
        finally:
            for handle in handles:
                handle.remove()
        if missing := sorted(set(layers) - set(got)):
            raise SignalError(f"the hooks on vision layers {missing} never ran; a tower compiled before it was hooked "
                              f"ignores them: compile the language model instead, or use a reducer without [CLS] scores")


def vision_projections(tower: Any, layer: int) -> tuple[nn.Module, nn.Module, int]:
    """Query and key projections of one vision layer's attention, and its number of heads."""
    count = getattr(tower.config, "num_hidden_layers", 0)
    stacks = [m for name, m in tower.named_modules()
              if isinstance(m, nn.ModuleList) and name.rpartition(".")[2] in ("layers", "layer") and len(m) == count]
    if not stacks:
        raise SignalError(f"{type(tower).__name__}: no list of {count} vision layers found to read [CLS] attention from; "
                          f"use a reducer that does without (AveragePool, Uniform, Random)")
    if not -count <= layer < count:
        raise SignalError(f"vision layer {layer}: the tower has {count} layers, counted from 0, or from the end by -1")
    block = stacks[0][layer]
    for q_name, k_name in (("q_proj", "k_proj"), ("query", "key")):
        for module in block.modules():
            if hasattr(module, q_name) and hasattr(module, k_name):
                return getattr(module, q_name), getattr(module, k_name), tower.config.num_attention_heads
    raise SignalError(f"{type(tower).__name__}: its attention has no separate query and key projections to read; "
                      f"use a reducer that does without [CLS] scores (AveragePool, Uniform, Random)")


def tile_tokens(config: Any) -> tuple[int, int]:
    """Token rows and columns that the vision tower makes of one tile."""
    vision = config.vision_config
    side = lambda x: (x, x) if isinstance(x, int) else tuple(x)  # noqa: E731
    (height, width), (ph, pw) = side(vision.image_size), side(vision.patch_size)
    return height // ph, width // pw

