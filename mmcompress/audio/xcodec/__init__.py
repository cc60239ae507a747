"""X-Codec (arXiv 2408.17175) made trainable: stock transformers' codec with its gradients, codebook learning and losses.

    quantizer.py        straight-through residual quantisation; k-means start, moving averages, revival, dropout of books
    model.py            XCodec: a stock XcodecModel whose forward trains
    pqmf.py             six sub-bands of a sound
    losses.py           what the codec and its judge minimise
    discriminator.py    the judge: six spectrograms, a small convolutional network on each
"""

from .discriminator import MultiFrequencyDiscriminator
from .losses import LossWeights, discriminator_loss, generator_losses
from .model import XCodec, XCodecOutput
from .pqmf import PQMF
from .quantizer import RVQ

__all__ = ["PQMF", "RVQ", "LossWeights", "MultiFrequencyDiscriminator", "XCodec", "XCodecOutput", "discriminator_loss",
           "generator_losses"]
