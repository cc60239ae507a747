"""What differs between the codecs of transformers: how each is called, its rate, its books, and how far a code sees.

Read in transformers 5.23. Every recording is encoded as if alone. Models that take any samples get whole frames, zeros behind
the recording; X-Codec 2 and NeuCodec get what their own feature extractors make of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from .reach import Reach, centred, field, upward_field


class Codec:
    """A transformers model of audio codes. Sounds go in as (n,) tensors at `sample_rate`, all of one `padded` length."""

    def __init__(self, model: Any):
        self.model, self.config = model, model.config
        self.sample_rate = self.output_rate = int(getattr(self.config, "sampling_rate", 0) or self.config.sample_rate)
        self.hop = int(self.config.hop_length)                          # samples of a frame
        self.output_hop = self.hop

    @property
    def rate(self) -> float:
        """Frames per second; the configurations round it up."""
        return self.sample_rate / self.hop

    def frames(self, samples: int) -> int:
        """Frames that `samples` come to."""
        return -(-samples // self.hop)

    def padded(self, samples: int) -> int:
        """Samples that the model hears of a recording of `samples`."""
        return self.frames(samples) * self.hop

    def batch(self, sounds: Sequence[Tensor]) -> Tensor:
        """(B, 1, padded), on the model's device."""
        most = self.padded(len(sounds[0]))
        x = torch.stack([nn.functional.pad(sound, (0, most - len(sound))) for sound in sounds])
        weight = next(self.model.parameters())
        return x[:, None].to(weight.device, weight.dtype)

    vocab: tuple[int, ...]                                              # of all its books

    def encode(self, sounds: Sequence[Tensor], n_q: int) -> Tensor:
        """(B, at least n_q, T) int64"""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, n_q, T) -> (B, about T * output_hop)"""
        return self.model.decode(audio_codes=codes).audio_values.flatten(1)

    def encoder_reach(self) -> Reach:
        return None

    def decoder_reach(self) -> Reach:
        return None

    def check_books(self, book: Tensor) -> None:
        if not book.any():
            raise ValueError(f"the codebooks of this {type(self.model).__name__} are all zero, so that it gives one code "
                             "everywhere: transformers makes them so. Load a checkpoint by from_pretrained, or fill them")


class XCodec(Codec):
    """`encode` refuses every bandwidth that its configuration does not list, so it is asked for the largest and cut."""

    def __init__(self, model: Any):
        super().__init__(model)
        quantizer = model.quantizer
        self.check_books(quantizer.quantizers[0].codebook.embed)
        self.largest = max(self.config.target_bandwidths)               # kbps
        books = min(len(quantizer.quantizers), quantizer.get_num_quantizers_for_bandwidth(self.largest))
        self.vocab = (self.config.codebook_size,) * books

    def encode(self, sounds: Sequence[Tensor], n_q: int) -> Tensor:
        return self.model.encode(self.batch(sounds), bandwidth=self.largest).audio_codes

    def decoder_reach(self) -> Reach:
        return centred(upward_field(self.model.acoustic_decoder, self.hop), self.hop)


class Mimi(Codec):
    """Causal: no code hears what comes later. Its first book is semantic, and the others refine one another, not it."""

    def __init__(self, model: Any):
        self.model, self.config = model, model.config
        self.sample_rate = self.output_rate = int(self.config.sampling_rate)
        self.hop = self.output_hop = round(self.config.sampling_rate / self.config.frame_rate)
        if self.config.audio_channels != 1:
            raise UnsupportedModelError(f"Mimi of {self.config.audio_channels} channels: only mono codecs are tokenized")
        self.check_books(model.quantizer.semantic_residual_vector_quantizer.layers[0].codebook.embed_sum)
        self.vocab = (self.config.codebook_size,) * self.config.num_quantizers

    def encode(self, sounds: Sequence[Tensor], n_q: int) -> Tensor:
        n_q = max(n_q, self.config.num_semantic_quantizers)             # it refuses fewer
        return self.model.encode(self.batch(sounds), num_quantizers=n_q).audio_codes

    def decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes).audio_values.flatten(1)

    def _attends(self) -> int:
        """Steps of its transformer, half a frame each, that its layers see backwards."""
        return self.config.num_hidden_layers * (self.config.sliding_window - 1)

    def encoder_reach(self) -> Reach:
        step = self.hop // self.config.latent_stride                    # samples
        samples = field(self.model.encoder.encoder_seanet) + self._attends() * step + (2 * self.config.latent_stride - 1) * step
        return -(-samples // self.hop), 0

    def decoder_reach(self) -> Reach:
        stride = self.config.latent_stride
        step = self.hop // stride
        samples = upward_field(self.model.decoder.decoder_seanet, step) + (self._attends() + 2 * stride) * step
        return -(-samples // self.hop), 0


class DAC(Codec):
    """Convolutions alone, so that a code hears some hundredths of a second. Where a stride is odd the decoder gives some
    samples less than whole frames (8 at descript/dac_16khz and 24khz)."""

    def __init__(self, model: Any):
        super().__init__(model)
        self.vocab = (self.config.codebook_size,) * self.config.n_codebooks

    def encode(self, sounds: Sequence[Tensor], n_q: int) -> Tensor:
        return self.model.encode(self.batch(sounds), n_quantizers=n_q).audio_codes

    def encoder_reach(self) -> Reach:
        return centred(field(self.model.encoder), self.hop)

    def decoder_reach(self) -> Reach:
        return centred(upward_field(self.model.decoder, self.hop), self.hop)


class EnCodec(Codec):
    """The causal mono one (24 kHz). That of 48 kHz scales each second by its loudness, which codes alone do not hold."""

    def __init__(self, model: Any):
        super().__init__(model)
        config = self.config
        if config.normalize or config.chunk_length_s is not None or config.audio_channels != 1:
            raise UnsupportedModelError(f"EnCodec with audio_channels={config.audio_channels}, normalize={config.normalize}, "
                                        f"chunk_length_s={config.chunk_length_s}: its sound needs scales beside the codes; use "
                                        "facebook/encodec_24khz")
        self.check_books(model.quantizer.layers[0].codebook.embed)
        self.largest = max(config.target_bandwidths)
        books = min(len(model.quantizer.layers), model.quantizer.get_num_quantizers_for_bandwidth(self.largest))
        self.vocab = (config.codebook_size,) * books

    def encode(self, sounds: Sequence[Tensor], n_q: int) -> Tensor:
        return self.model.encode(self.batch(sounds), bandwidth=self.largest).audio_codes[0]

    def decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes[None], [None]).audio_values.flatten(1)


class XCodec2(Codec):
    """One book of finite scalars. Its extractor adds a sample before it pads: a frame more where there were whole ones."""

    def __init__(self, model: Any):
        super().__init__(model)
        self.vocab = (math.prod(self.config.quantization_levels),)
        self.extractor = self._extractor()

    def _extractor(self) -> Any:
        from transformers import Xcodec2FeatureExtractor
        return Xcodec2FeatureExtractor(hop_length=self.hop, sampling_rate=self.sample_rate)

    def padded(self, samples: int) -> int:
        return (samples // self.hop + 1) * self.hop

    def encode(self, sounds: Sequence[Tensor], n_q: int) -> Tensor:
        inputs = self.extractor([s.numpy() for s in sounds], sampling_rate=self.sample_rate, return_tensors="pt")
        weight = next(self.model.parameters())
        heard = (inputs[key].to(weight.device, weight.dtype) for key in ("input_values", "input_features"))
        return self.model.encode(*heard, input_features_mask=inputs["input_features_mask"].to(weight.device)).audio_codes


class NeuCodec(XCodec2):
    """X-Codec 2 whose decoder gives 24 kHz; the unfilled last frame has no code."""

    def __init__(self, model: Any):
        self.model, self.config = model, model.config
        self.sample_rate, self.output_rate = int(self.config.input_sampling_rate), int(self.config.output_sampling_rate)
        self.hop, self.output_hop = int(self.config.encoder_hop_length), int(self.config.hop_length)
        self.vocab = (math.prod(self.config.quantization_levels),)
        self.extractor = self._extractor()

    def _extractor(self) -> Any:
        from transformers import NeuCodecFeatureExtractor
        return NeuCodecFeatureExtractor(hop_length=self.hop, sampling_rate=self.sample_rate)

    def frames(self, samples: int) -> int:
        return samples // self.hop


FAMILIES: dict[str, type[Codec]] = {"dac": DAC, "encodec": EnCodec, "mimi": Mimi, "neucodec": NeuCodec, "xcodec": XCodec,
                                    "xcodec2": XCodec2}


def codec_of(model: Any) -> Codec:
    """The adapter of a transformers model. Raises UnsupportedModelError for another, ValueError for one that is training."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise UnsupportedModelError(f"no codec adapter for model_type {kind!r}; known: {', '.join(FAMILIES)}")
    if model.training:
        raise ValueError(f"this {type(model).__name__} is in training mode, where dropout changes its codes: call model.eval()")
    return FAMILIES[kind](model)
