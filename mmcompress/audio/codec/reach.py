"""How far a codec sees: (left, right) frames on which a code, or a frame of sound, depends beyond its own.

None stands for all of them: HuBERT and w2v-BERT attend everywhere (and HuBERT's group norm, w2v-BERT's normalised mel
spectrogram and the group norms of X-Codec 2's decoder take statistics over the whole recording), and EnCodec has an LSTM. It
follows from kernels, strides and windows, not from weights, and is a bound: what lies further cannot matter, what lies nearer
may.
"""

from __future__ import annotations

from torch import nn

Reach = tuple[int, int] | None


def field(encoder: nn.Module) -> int:
    """Samples beside its own that a step of a chain of convolutions hears, both sides together."""
    samples, step = 0, 1
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv1d):
            samples += (layer.kernel_size[0] - 1) * layer.dilation[0] * step
            step *= layer.stride[0]
    return samples


def upward_field(decoder: nn.Module, step: int) -> int:
    """The same of a decoder whose steps are `step` samples, in samples."""
    samples = 0
    for layer in decoder.modules():
        if isinstance(layer, nn.ConvTranspose1d):
            samples += (-(-layer.kernel_size[0] // layer.stride[0])) * step
            step //= layer.stride[0]
        elif isinstance(layer, nn.Conv1d):
            samples += (layer.kernel_size[0] - 1) * layer.dilation[0] * step
    return samples


def centred(samples: int, hop: int) -> Reach:
    """Of convolutions padded alike on both sides: half of their field on each, and a frame for odd strides."""
    side = -(-samples // (2 * hop)) + 1
    return side, side
