"""A codec from scratch around a teacher: its shape, the teacher's weights, and weights that let sound through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, DacConfig, XcodecConfig

from .model import XCodec
from .quantizer import RVQ

EMBEDDED = Path(__file__).parent / "teacher"        # a HuBERT of 2 M parameters, made by benchmarks/teacher.py


def build(teacher: str = "embedded", *, width: int = 64, acoustic: int = 256, decoder: int = 1024, codes: int = 1024,
          books: Sequence[int] = (1, 2, 3, 4, 8), ratios: Sequence[int] = (8, 5, 4, 2), sample_rate: int = 16_000,
          semantic: bool = True, rvq: RVQ | None = None) -> XCodec:
    """An X-Codec to train from scratch; the defaults are the published sizes. Weights are drawn from torch's global state.

    teacher     "embedded"; a folder or Hub id of a HuBERT or WavLM, such as facebook/hubert-base-ls960 or
                microsoft/wavlm-base-plus; or of any model with hidden states of samples. It is frozen
    width       channels of the acoustic encoder's first layer, doubled by each of its strides
    acoustic    channels of what it gives (Da); the semantic part has the teacher's (Ds), and codes Da + Ds
    decoder     channels of the acoustic decoder's first layer, halved by each stride
    codes       of each book, a power of 2
    books       how many a listed bandwidth of the stock model has, ascending; the last is how many there are
    ratios      strides of the acoustic encoder; their product is the hop in samples, as long as the teacher's

    Raises ValueError for sizes that do not fit each other.
    """
    config = codec_config(AutoConfig.from_pretrained(_place(teacher)), width, acoustic, decoder, codes, books, ratios,
                          sample_rate)
    model = XCodec(config, semantic, rvq)
    heard = AutoModel.from_pretrained(_place(teacher), dtype=torch.float32)
    model.semantic_model.load_state_dict(heard.state_dict())
    semantics = (model.encoder_semantic, model.decoder_semantic) if semantic else ()
    for part in (model.acoustic_encoder, model.acoustic_decoder, *semantics):
        scale_to_fan_in(part)
    return model.train()


def codec_config(heard: Any, width: int, acoustic: int, decoder: int, codes: int, books: Sequence[int], ratios: Sequence[int],
                 sample_rate: int) -> XcodecConfig:
    """The stock configuration of these sizes around a teacher's."""
    hop = math.prod(ratios)
    if (stride := math.prod(getattr(heard, "conv_stride", [hop]))) != hop:
        raise ValueError(f"ratios={list(ratios)} make frames of {hop} samples, the teacher's have {stride}: they must agree")
    if codes < 2 or codes & (codes - 1):
        raise ValueError(f"codes={codes}: must be a power of 2, as a bandwidth counts whole bits")
    if not books or min(books) < 1 or list(books) != sorted(set(books)):
        raise ValueError(f"books={list(books)}: give ascending numbers of books, such as [1, 2, 3, 4, 8]")
    one = math.ceil(sample_rate / hop) * (codes.bit_length() - 1) / 1000                    # kbps of a book
    dac = DacConfig(encoder_hidden_size=width, downsampling_ratios=list(ratios), decoder_hidden_size=decoder,
                    sampling_rate=sample_rate)
    dac.hidden_size, dac.upsampling_ratios = acoustic, list(ratios)         # not what DacConfig derives
    config = XcodecConfig(acoustic_model_config=dac.to_dict(), codebook_size=codes, sample_rate=sample_rate,
                          semantic_model_config={**heard.to_dict(), "dtype": "float32"},
                          target_bandwidths=[round(one * n, 6) for n in books])
    if config.num_quantizers != books[-1]:
        raise ValueError(f"{books[-1]} books of {codes} codes: stock transformers counts {config.num_quantizers} at "
                         f"{config.target_bandwidths[-1]} kbps; take another number of codes")
    return config


@torch.no_grad()
def scale_to_fan_in(module: nn.Module) -> None:
    """Convolutions whose outputs are about as large as their inputs, residual units that begin small (their last convolution
    has one tap). Stock's deviation of 0.02 suits wide layers; a narrow codec is silent with it."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d)):
            up = isinstance(layer, nn.ConvTranspose1d)
            fan = layer.weight[:, 0].numel() / layer.stride[0] if up else layer.weight[0].numel()
            layer.weight.normal_(std=(0.3 if layer.kernel_size == (1,) else 1.0) * fan ** -0.5)
            if layer.bias is not None:
                layer.bias.zero_()


def _place(teacher: str) -> str:
    return str(EMBEDDED) if teacher == "embedded" else teacher
