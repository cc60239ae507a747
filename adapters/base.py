"""What every adapter shares: the contract, and the way from a call's inputs to features and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmcompress.compat import check_seam
from mmcompress.errors import SignalError, UnsupportedModelError
from mmcompress.layout import AudioLayout
from mmcompress.prompt import Found, find_placeholders
from mmcompress.tokens import ImageLayout, LayerState, Reduction, VideoLayout

from .vision import Captures, VisionLayer, capture

Layouts = Sequence[ImageLayout] | Sequence[VideoLayout] | Sequence[ImageLayout | VideoLayout]


@dataclass(frozen=True, eq=False)
class Encoded:
    """What tower and projector made of the pictures (or clips, or recordings) of a call, in placeholder order.

    `features` holds (N_i, D) per item, packed as the language model reads them. `vision` holds the captured layers, None
    where the tower cannot give them. `grid` are the tower's patch rows and columns where features were pooled after it. `mel`
    gives (N_i, bins) per recording, its log-mel spectrogram by token, when called; `reductions`, one of a batch of one per
    recording, are what a reducer inside the encoder did, and `features` then what it left.
    """

    features: Sequence[Tensor]
    vision: Mapping[int, VisionLayer | None]
    grid: tuple[int, int] | None = None
    mel: Callable[[], Sequence[Tensor]] | None = None
    reductions: Sequence[Reduction] = ()

    def spectrogram(self, items: Sequence[int]) -> Tensor | None:
        """The spectrograms of some recordings of equal layout, batched. (B, N, bins)"""
        if self.mel is None:
            return None
        mel = self.mel()
        return torch.stack([mel[i] for i in items])

    def state(self, layouts: Layouts, items: Sequence[int]) -> dict[int, LayerState | None]:
        """The captured layers for some items of equal layout, batched."""
        if not self.vision:
            return {}
        starts, total = [], 0
        for layout in layouts:
            starts.append(total)
            total += layout.tiles
        tiles = layouts[items[0]].tiles
        out: dict[int, LayerState | None] = {}
        for layer, held in self.vision.items():
            if held is None:
                out[layer] = None
                continue
            if len(held.keys) != total:
                raise SignalError(f"the vision tower saw {len(held.keys)} tiles where the layouts have {total}; "
                                  f"report this with the model's config")
            pick = lambda x: torch.stack([x[starts[i]:starts[i] + tiles] for i in items])  # noqa: E731
            received = None if held.received is None else pick(held.received)
            out[layer] = LayerState(query=pick(held.query), keys=pick(held.keys), grid=self.grid, received=received)
        return out


class Adapter(ABC):
    """One model family. Holds no state beyond the model; never changes its weights or modules."""

    encoder_inputs: ClassVar[tuple[str, ...]]       # what get_image_features takes; dropped once the pictures are encoded
    video_inputs: ClassVar[tuple[str, ...]] = ()    # what get_video_features takes; (): the family reads no videos
    reads_clips: ClassVar[bool] = False             # clips that come without inputs of their own (InternVL)
    audio_inputs: ClassVar[tuple[str, ...]] = ()    # what belongs to recordings; (): the family does not hear
    raw_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_images", "pixel_values_videos", "input_features")
    mrope: ClassVar[bool] = False                   # multi-dimensional rotary positions, see `positions`
    seq2seq: ClassVar[bool] = False                 # a decoder that attends to the encoder's states (Whisper)
    takes_features: ClassVar[bool] = True           # `forward` has mm_encoder_outputs
    masks_loss: ClassVar[bool] = False              # `forward` cuts its logits by the prompt's mask before it takes the loss

    def __init__(self, model: Any) -> None:
        check_seam(model, self.takes_features)
        self.model = model
        self.config = model.config

    @property
    def image_token_id(self) -> int:
        """The placeholder that stands for one image token in `input_ids`."""
        return self.config.image_token_id

    @property
    def video_token_id(self) -> int:
        """The placeholder that stands for one video token."""
        return self.config.video_token_id

    @property
    def audio_token_id(self) -> int:
        """The placeholder that stands for one token of a recording."""
        return self.config.audio_token_id

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Every token that stands for a picture's, a clip's or a recording's."""
        slots = ((self.encoder_inputs, "image_token_id"), (self.video_inputs, "video_token_id"),
                 (self.audio_inputs, "audio_token_id"))
        return tuple(getattr(self, name) for inputs, name in slots if inputs)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Inputs that the language model no longer takes once everything is encoded."""
        return tuple(dict.fromkeys((*self.encoder_inputs, *self.video_inputs, *self.audio_inputs)))

    def tower(self, modality: str) -> Any:
        """The tower that sees pictures, or the frames of clips, or hears recordings."""
        return self.model.model.audio_tower if modality == "audio" else self.model.model.vision_tower

    @property
    def has_vision_cls(self) -> bool:
        """Whether the vision tower puts a [CLS] token before its patches, as far as its configuration tells."""
        return any(hasattr(m, name) for m in self.tower("image").modules() for name in ("class_embedding", "cls_token"))

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

    def reads(self, modality: str) -> bool:
        """Whether the family takes pictures ("image"), clips ("video") or recordings ("audio")."""
        return {"image": bool(self.encoder_inputs), "video": bool(self.video_inputs) or self.reads_clips,
                "audio": bool(self.audio_inputs)}[modality]

    # what a call holds --------------------------------------------------------------------------------------------

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        return _given(inputs, "pixel_values")

    def has_videos(self, inputs: Mapping[str, Any]) -> bool:
        return bool(self.video_inputs) and _given(inputs, "pixel_values_videos")

    def has_audio(self, inputs: Mapping[str, Any]) -> bool:
        return bool(self.audio_inputs) and _given(inputs, "input_features")

    def pixels(self, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The tensors that the towers read; the same objects mean the same features."""
        return tuple(inputs.get(name) for name in ("pixel_values", "pixel_values_videos", "input_features"))

    @abstractmethod
    def layouts(self, inputs: Mapping[str, Any]) -> list[ImageLayout]:
        """The layout of each picture, in placeholder order, from shapes and sizes alone."""

    def audio_layouts(self, inputs: Mapping[str, Any], ids: Tensor) -> list[AudioLayout]:
        """The layout of each recording, in placeholder order, from lengths alone. ids (B, L) on the host"""
        raise UnsupportedModelError(f"{type(self.model).__name__} does not hear recordings")

    def video_layouts(self, inputs: Mapping[str, Any]) -> list[VideoLayout]:
        """The layout of each clip, in placeholder order, from shapes and sizes alone."""
        raise UnsupportedModelError(f"{type(self.model).__name__} reads no videos")

    def find(self, inputs: Mapping[str, Any], ids: Tensor) -> list[Found]:
        """Every picture, then every clip, then every recording of a call, each in placeholder order. ids (B, L) on the host."""
        found: list[Found] = []
        for modality, layouts, token_id in self._held(inputs, ids):
            places = find_placeholders(ids, token_id, [x.tokens for x in layouts], modality)
            found += [Found(modality, row, columns, layout) for layout, (row, columns) in zip(layouts, places)]
        return found

    def _held(self, inputs: Mapping[str, Any], ids: Tensor) -> Iterator[tuple[str, Sequence[Any], int]]:
        """What the family can read: modality, the layouts of the call's items, their placeholder."""
        if self.encoder_inputs:
            yield "image", self.layouts(inputs) if self.has_images(inputs) else [], self.image_token_id
        if self.video_inputs:
            yield "video", self.video_layouts(inputs) if self.has_videos(inputs) else [], self.video_token_id
        if self.audio_inputs:
            yield "audio", self.audio_layouts(inputs, ids) if self.has_audio(inputs) else [], self.audio_token_id

    # from pixels to features, and back into the model -------------------------------------------------------------

    def encode(self, inputs: Mapping[str, Any], layers: Sequence[int] = (), receives: Sequence[int] = ()) -> Encoded:
        """Run tower and projector on the pictures as the stock model does, capturing the named vision layers on the way."""
        self._check_strategy(inputs)
        with self.capture(layers, receives) as vision:
            out = self.model.model.get_image_features(**named(inputs, self.encoder_inputs), return_dict=True)
        return Encoded(features=list(out.pooler_output), vision=vision, grid=self.vision_grid("image"))

    def encode_video(self, inputs: Mapping[str, Any], layers: Sequence[int] = (), receives: Sequence[int] = ()) -> Encoded:
        """The same for the clips. -> (N_i, D) per clip, frame by frame"""
        self._check_strategy(inputs)
        with self.capture(layers, receives, "video") as vision:
            out = self.model.model.get_video_features(**named(inputs, self.video_inputs), return_dict=True)
        features = [x.flatten(0, -2) for x in out.pooler_output]        # some versions keep frames and cells apart
        return Encoded(features=features, vision=vision, grid=self.vision_grid("video"))

    def encode_audio(self, inputs: Mapping[str, Any], layouts: Sequence[AudioLayout], merging: Any = None) -> Encoded:
        """The same for the recordings. -> (N_i, D) per recording, and its spectrogram; merging: a reducer inside the encoder"""
        raise UnsupportedModelError(f"{type(self.model).__name__} does not hear recordings")

    def encode_all(self, inputs: Mapping[str, Any], found: Sequence[Found], captures: Mapping[str, Captures]
                   ) -> dict[str, Encoded]:
        """Everything that the call holds, by modality."""
        out: dict[str, Encoded] = {}
        if recordings := [item.layout for item in found if item.modality == "audio"]:
            out["audio"] = self.encode_audio(inputs, recordings, captures.get("audio", Captures()).merging)
        for modality, encode in (("image", self.encode), ("video", self.encode_video)):
            if any(item.modality == modality for item in found):
                read = captures.get(modality, Captures())
                out[modality] = encode(inputs, read.layers, read.receives)
        return out

    def vision_grid(self, modality: str) -> tuple[int, int] | None:
        """Patch rows and columns of one tile in the tower, where the language model reads fewer; None: it reads them all."""
        return None

    def _check_strategy(self, inputs: Mapping[str, Any]) -> None:
        default = getattr(self.config, "vision_feature_select_strategy", None)
        if (inputs.get("vision_feature_select_strategy") or default) == "full" and self.has_vision_cls:
            raise UnsupportedModelError("vision_feature_select_strategy='full' with a [CLS] vision tower puts [CLS] among "
                                        "the image tokens, where it has no place in a layout; set it to 'default'")

    def outputs(self, parts: Sequence[tuple[Found, Tensor]]) -> dict[str, Any]:
        """Each item's features (K, D) -> `mm_encoder_outputs` for `generate`.

        One tensor a prompt and modality, as a list: transformers then repeats the right features for beams.
        """
        rows: dict[str, dict[int, list[tuple[int, Tensor]]]] = {}
        for item, features in parts:
            rows.setdefault(self.stream(item.modality), {}).setdefault(item.row, []).append((int(item.columns[0]), features))
        together = lambda some: torch.cat([f for _, f in sorted(some, key=lambda x: x[0])]) if len(some) > 1 else some[0][1]  # noqa: E731
        out: dict[str, Any] = {}
        for stream, held in rows.items():
            pooled: Any = [together(held[row]) for row in sorted(held)]     # transformers annotates a tensor, and takes a list
            out[stream] = BaseModelOutputWithPooling(pooler_output=pooled)
        return out

    def stream(self, modality: str) -> str:
        """The key of `mm_encoder_outputs` that carries a modality's features."""
        return modality

    def finish(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """`mm_encoder_outputs` as the family's `forward` takes them: lists of tensors, or one tensor where it wants that."""
        return dict(outputs)

    def take_in(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """A call with `mm_encoder_outputs` as the stock `forward` takes it.

        No family's `forward` takes encoded recordings, so they are put at their placeholders among the input embeddings.
        """
        outputs = self.finish(call["mm_encoder_outputs"])
        sound = outputs.pop("audio", None)
        call = {**call, "mm_encoder_outputs": outputs}
        if not outputs:
            del call["mm_encoder_outputs"]
        if sound is None:
            return call
        embeds = self.model.get_input_embeddings()(call["input_ids"])
        there = (call["input_ids"] == self.audio_token_id).to(embeds.device)[..., None]
        features = torch.cat(list(sound.pooler_output)).to(embeds.device, embeds.dtype)
        return {**call, "inputs_embeds": embeds.masked_scatter(there, features)}

    def first_layer(self) -> tuple[Tensor, Tensor]:
        """Query and key weights of the first decoder layer: (H, d, D) and (H_kv, d, D)."""
        attn = self.decoder_layers[0].self_attn
        return tuple(proj.weight.detach().unflatten(0, (-1, attn.head_dim)) for proj in (attn.q_proj, attn.k_proj))

    # positions of M-RoPE families ---------------------------------------------------------------------------------

    def positions(self, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rotary positions (3, B, L) int64 of the full prompt, and (B, 1) of the text that follows it; both on the host.

        Families with `mrope` tell.
        """
        raise UnsupportedModelError(f"{type(self.model).__name__} has no multi-dimensional rotary positions")

    @property
    def rope_deltas(self) -> Tensor | None:
        """What the model itself adds to a later column's number, (B, 1); it keeps that from call to call."""
        return self.model.model.rope_deltas

    def note_rope_deltas(self, deltas: Tensor) -> None:
        """Set it as the model's own forward does after a prompt, so that decoding by hand goes on at the right position."""
        self.model.model.rope_deltas = deltas

    def capture(self, layers: Sequence[int], receives: Sequence[int] = (), modality: str = "image"
                ) -> AbstractContextManager[dict[int, VisionLayer | None]]:
        """A dict that fills with the named vision layers while the tower runs within the block."""
        return capture(self.tower(modality), layers, receives)


def one_tensor(outputs: Mapping[str, Any], modalities: Sequence[str]) -> dict[str, Any]:
    """`mm_encoder_outputs` with the named modalities' lists joined into one tensor (1, N, D)."""
    out = dict(outputs)
    for modality in modalities:
        held = out.get(modality)
        if held is not None and not isinstance(held.pooler_output, Tensor):
            joined: Any = torch.cat(list(held.pooler_output))[None]
            out[modality] = BaseModelOutputWithPooling(pooler_output=joined)
    return out


def _given(inputs: Mapping[str, Any], name: str) -> bool:
    pixels = inputs.get(name)
    return pixels is not None and len(pixels) > 0


def named(inputs: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: inputs[name] for name in names if inputs.get(name) is not None}


def tile_tokens(config: Any) -> tuple[int, int]:
    """Token rows and columns that the vision tower makes of one tile."""
    vision = config.vision_config
    side = lambda x: (x, x) if isinstance(x, int) else tuple(x)  # noqa: E731
    (height, width), (ph, pw) = side(vision.image_size), side(vision.patch_size)
    return height // ph, width // pw

