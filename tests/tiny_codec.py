"""Codecs of a few thousand random weights, made from configurations; their codebooks filled with noise."""

from functools import lru_cache

import torch
from transformers import (
    DacConfig,
    DacModel,
    EncodecConfig,
    EncodecModel,
    HubertConfig,
    MimiConfig,
    MimiModel,
    NeuCodecConfig,
    NeuCodecModel,
    Wav2Vec2BertConfig,
    Xcodec2Config,
    Xcodec2Model,
    XcodecConfig,
    XcodecModel,
)

from mmcompress.audio.codec.families import codec_of
from mmcompress.audio.reading import as_sound

RATIOS = [8, 5, 4, 2]                   # 320 samples a frame
FAMILIES = ("xcodec", "mimi", "dac", "encodec", "xcodec2", "neucodec")
RVQ = FAMILIES[:4]


def wake(module, gain=1.0):
    """Weights so large that the sound reaches the codes: random ones of their own size give one code everywhere."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)):
                up = isinstance(layer, torch.nn.ConvTranspose1d)
                fan = layer.weight[:, 0].numel() / layer.stride[0] if up else layer.weight[0].numel()
                layer.weight.normal_(std=gain * fan ** -0.5)


def fill(books):
    for book in books:
        book.normal_()


def xcodec():
    acoustic = DacConfig(encoder_hidden_size=4, downsampling_ratios=RATIOS, decoder_hidden_size=32, codebook_size=16)
    semantic = HubertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                            conv_dim=[8] * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    acoustic.hidden_size, acoustic.upsampling_ratios = 8, RATIOS
    model = XcodecModel(XcodecConfig(acoustic_model_config=acoustic.to_dict(), semantic_model_config=semantic.to_dict(),
                                     codebook_size=1024))
    wake(model.acoustic_encoder)
    wake(model.acoustic_decoder, 0.5)
    fill(q.codebook.embed for q in model.quantizer.quantizers)
    return model


def mimi(window=5, semantic=1):
    model = MimiModel(MimiConfig(hidden_size=16, num_filters=4, codebook_size=64, codebook_dim=8, num_quantizers=6,
                                 vector_quantization_hidden_dimension=8, num_hidden_layers=2, intermediate_size=32,
                                 num_attention_heads=2, num_key_value_heads=2, head_dim=8, upsample_groups=16,
                                 sliding_window=window, num_semantic_quantizers=semantic,
                                 upsampling_ratios=[8, 6, 5, 4], layer_scale_initial_scale=1.0))
    wake(model.encoder)
    wake(model.decoder)
    wake(model.quantizer)
    quantizer = model.quantizer
    for part in (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer):
        fill(layer.codebook.embed_sum for layer in part.layers)
    return model


def dac(ratios=(2, 4, 5, 8), rate=16_000):
    model = DacModel(DacConfig(encoder_hidden_size=4, downsampling_ratios=list(ratios), decoder_hidden_size=32, n_codebooks=5,
                               codebook_size=64, codebook_dim=4, sampling_rate=rate))
    wake(model)
    wake(model.decoder, 0.7)            # else its sines make the last bit of a float heard
    return model


def encodec(**options):
    model = EncodecModel(EncodecConfig(**{**dict(hidden_size=16, num_filters=4, codebook_size=1024, upsampling_ratios=RATIOS,
                                                 target_bandwidths=[1.5, 3.0, 6.0], num_lstm_layers=1), **options}))
    fill(layer.codebook.embed for layer in model.quantizer.layers)
    with torch.no_grad():
        model.encoder.layers[-1].conv.parametrizations.weight.original0.mul_(20)       # its LSTM is quiet
    return model


def _fsq(config, model):
    semantic = Wav2Vec2BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                                  feature_projection_input_dim=160, conv_depthwise_kernel_size=3)
    model = model(config(hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                        num_key_value_heads=2, head_dim=32, encoder_hidden_size=2, quantization_dim=80,
                        semantic_model_config=semantic.to_dict()))
    wake(model)
    with torch.no_grad():
        for layer in (model.quantizer.project_in, model.fc_encoder, model.acoustic_decoder.head.linear):
            layer.weight.normal_(std=layer.in_features ** -0.5)
    return model


def xcodec2():
    return _fsq(Xcodec2Config, Xcodec2Model)


def neucodec():
    return _fsq(NeuCodecConfig, NeuCodecModel)


def build(family, **options):
    """The same random model every time, ready to encode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return globals()[family](**options).eval()


def noise(seconds, rate=16_000, seed=0):
    """(T,) float32: noise whose loudness wanders, so that codes change."""
    g = torch.Generator().manual_seed(seed)
    n = round(seconds * rate)
    x = torch.randn(n, generator=g)
    loud = torch.randn(max(2, round(seconds * 20)), generator=g).abs()
    return 0.2 * x * torch.nn.functional.interpolate(loud[None, None], n, mode="linear")[0, 0]


@lru_cache
def model_of(family):
    return build(family)


def clip(family, frames, seed=0):
    """A Sound of so many frames of a family's codec; 0.5: half a frame."""
    codec = codec_of(model_of(family))
    rate = codec.sample_rate
    return as_sound(noise(frames * codec.hop / rate, rate, seed), rate, rate)
