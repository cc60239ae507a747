"""X-Codec (Ye et al., "Codec Does Matter", arXiv 2408.17175, AAAI 2025): a codec whose first books carry what is said.

Stock transformers has the inference of it; `XCodec` is that model, key for key, with a forward pass that trains:

    acoustic = DAC encoder(audio)                   (B, Da, N), N frames of `hop_length` samples
    semantic = semantic encoder(teacher(audio))     (B, Ds, N); the teacher is a frozen HuBERT, mean of all hidden states
    q = RVQ(fc([acoustic ; semantic]))              (B, Da + Ds, N), straight-through
    waveform = DAC decoder(fc2(q))                  (B, 1, T)
    semantic loss = MSE(semantic decoder(fc1(q)), teacher(audio))

What the released code (zhenye234/xcodec, models/soundstream_semantic.py) does otherwise: its DAC layers are trained under
weight norm (call `apply_weight_norm()` before training and `remove_weight_norm()` before saving for that, both stock); it
runs the codec a second time for the discriminator's step, so that its codebooks move twice a step. See also quantizer.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import XcodecConfig, XcodecModel
from transformers import initialization as init
from transformers.models.xcodec.modeling_xcodec import XcodecEuclideanCodebook

from .quantizer import RVQ, residual_quantize


@dataclass(frozen=True, eq=False)
class XCodecOutput:
    """One training pass over audio (B, 1, T). Losses are float32 with gradients; n_q is the number of books used."""

    waveform: Tensor            # (B, 1, T)
    codes: Tensor               # (B, n_q, N) int64
    quantized: Tensor           # (B, Da + Ds, N)
    teacher: Tensor             # (B, Ds, N) what the semantic decoder should say, no gradient; zeros without semantics
    semantic: Tensor            # (B, Ds, N) what it says; zeros without semantics
    commit: Tensor              # (n_q) of each book
    commit_loss: Tensor         # their mean
    semantic_loss: Tensor       # mean squared error; 0 without semantics


class XCodec(XcodecModel):      # type: ignore[misc, unused-ignore]
    """A stock `XcodecModel` that trains; state dict, `encode`, `decode`, `from_pretrained` and `save_pretrained` are stock.

    config      stock
    semantic    False: the ablation at equal size. Same modules, books and bit rate, but the codec is never given the
                teacher: its semantic encoder is zero and frozen, so a stock XcodecModel that loads the result encodes the
                same codes; the semantic decoder is idle. For training from the start, not for a published
                checkpoint; pass it again to train on.
    rvq         how codebooks learn

    `forward` takes audio, step and n_q in place of stock's arguments; any number of books will do, listed bandwidth or not.
    A fresh model's codebooks begin with the first training step (k-means); encode nothing before. Keep weights in float32.
    """

    def __init__(self, config: XcodecConfig, semantic: bool = True, rvq: RVQ | None = None) -> None:
        super().__init__(config)
        self.semantic, self.rvq = semantic, rvq or RVQ()
        bandwidths = [self.quantizer.get_num_quantizers_for_bandwidth(b) for b in config.target_bandwidths]
        self.books = self.rvq.books or tuple(bandwidths)
        self._check_books(max(self.books))
        self._freeze()
        if not semantic:
            for weight in self.encoder_semantic.parameters():
                init.zeros_(weight)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, XcodecEuclideanCodebook):
            init.zeros_(module.inited)                          # stock marks its zeros as a learned codebook

    def train(self, mode: bool = True) -> XCodec:
        """As ever, but the teacher stays in eval: a stock model would give it dropout and masked spans."""
        super().train(mode)
        self._freeze()                  # again: `from_pretrained` makes new parameters, then calls eval()
        return self

    def _freeze(self) -> None:
        self.semantic_model.eval().requires_grad_(False)
        if not self.semantic:
            for module in (self.encoder_semantic, self.decoder_semantic, self.fc1):
                module.requires_grad_(False)

    def forward(self, audio: Tensor, step: int | None = None, n_q: int | None = None) -> XCodecOutput:  # type: ignore[override, unused-ignore]
        """audio (B, 1, T) in [-1, 1] at config.sample_rate, T a multiple of config.hop_length -> XCodecOutput

        step    number of the training step, needed in training only, where codebooks learn: it seeds what is drawn
        n_q     books to use; None: in training drawn from `books`, otherwise all
        """
        if audio.dim() != 3 or audio.shape[1] != 1:
            raise ValueError(f"audio of shape {tuple(audio.shape)}: must be (B, 1, T); average channels first")
        if audio.shape[2] == 0 or audio.shape[2] % self.config.hop_length:
            raise ValueError(f"{audio.shape[2]} samples are no multiple of {self.config.hop_length}: crop or pad the audio")
        if self.training and step is None:
            raise ValueError("training needs the step's number: model(audio, step=...); or call model.eval()")
        if n_q is None:
            n_q = self.rvq.draw(step, self.books) if self.training and step is not None else self.quantizer.num_quantizers
        self._check_books(n_q)
        teacher = self._extract_semantic_features(audio).transpose(1, 2)                        # (B, Ds, N)
        both = torch.cat([self._acoustic(audio, teacher.shape[2]), self.encoder_semantic(teacher)], 1)
        q = residual_quantize(self.quantizer.quantizers[:n_q], self.fc(both.transpose(1, 2)).transpose(1, 2),
                              self.rvq if self.training else None, step or 0)
        rows = q.values.transpose(1, 2)                                                         # (B, N, Da + Ds)
        waveform = self.acoustic_decoder(self.fc2(rows).transpose(1, 2))[..., :audio.shape[2]]
        said = self.decoder_semantic(self.fc1(rows).transpose(1, 2)) if self.semantic else torch.zeros_like(teacher)
        return XCodecOutput(waveform, q.codes, q.values, teacher, said, q.commit, q.commit.mean(),
                            F.mse_loss(said.float(), teacher.float()))

    def _acoustic(self, audio: Tensor, frames: int) -> Tensor:
        """(B, Da, frames), padded by half a hop on either side where that gives the teacher's length, as stock `encode`."""
        if self._get_conv1d_output_lengths(audio.shape[2], self.acoustic_encoder) != frames:
            audio = F.pad(audio, (self.pad, self.pad))
        return self.acoustic_encoder(audio)

    def _extract_semantic_features(self, input_values: Tensor) -> Tensor:
        """(B, 1, T) -> (B, N, Ds) without gradient: the teacher's mean hidden state; zeros without semantics."""
        if self.semantic:
            return super()._extract_semantic_features(input_values)
        padded = torch.tensor(input_values.shape[2] + 2 * self.pad)
        frames = int(self.semantic_model._get_feat_extract_output_lengths(padded))
        return input_values.new_zeros(len(input_values), frames, self.config.semantic_hidden_size)

    def _check_books(self, n_q: int) -> None:
        if not 1 <= n_q <= self.quantizer.num_quantizers:
            raise ValueError(f"{n_q} books: this codec has {self.quantizer.num_quantizers}, and needs 1 at least")
