"""X-Codec (arXiv 2408.17175) made trainable: stock transformers' codec with its gradients, codebook learning and losses.

    quantizer.py        straight-through residual quantisation; k-means start, moving averages, revival, dropout of books
    model.py            XCodec: a stock XcodecModel whose forward trains
    pqmf.py             six sub-bands of a sound
    losses.py           what the codec and its judge minimise
    discriminator.py    the judge: six spectrograms, a small convolutional network on each
    teacher.py          build(): a codec from scratch around a teacher's weights
    teacher/            weights of a HuBERT of 2 M parameters (README.md there)

`mmcompress train configs/xcodec-tiny.yaml` trains one; train/codec/ is the loop.
"""

from .discriminator import MultiFrequencyDiscriminator
from .losses import LossWeights, discriminator_loss, generator_losses
from .model import XCodec, XCodecOutput
from .pqmf import PQMF
from .quantizer import RVQ
from .teacher import build

__all__ = ["PQMF", "RVQ", "LossWeights", "MultiFrequencyDiscriminator", "XCodec", "XCodecOutput", "build",
           "discriminator_loss", "generator_losses"]
