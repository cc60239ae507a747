"""Sound as discrete tokens, by the neural codecs of transformers: X-Codec, X-Codec 2, Mimi, DAC, EnCodec, NeuCodec.

    tokens = tokenize(model, sound, kbps=2)         # codec.py: any number of books, batches of different lengths
    sound, = detokenize(model, tokens)
    tokenize_chunked(model, "hours.flac")           # chunked.py: bounded memory
    arrange(tokens, "delay").restore()              # layouts.py: sequences for language models, and back
    collapse(tokens.prefix(1)).expand()             # runs.py: runs of one code, and back
    usage(tokens), choose(errors, tokens, kbps=2)   # worth.py: what each book carries and repairs
"""

from .chunked import detokenize_chunked, sound_blocks, tokenize_chunked
from .codec import detokenize, tokenize
from .layouts import Sequence, arrange
from .runs import Runs, collapse
from .tokens import AudioTokens
from .worth import Usage, choose, gains, prefix_errors, relative_error, semantic_error, spectral_error, usage

__all__ = ["AudioTokens", "Runs", "Sequence", "Usage", "arrange", "choose", "collapse", "detokenize", "detokenize_chunked",
           "gains", "prefix_errors", "relative_error", "semantic_error", "sound_blocks", "spectral_error", "tokenize",
           "tokenize_chunked", "usage"]
