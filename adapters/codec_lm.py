"""Codec tokens in a stock causal language model, read and written: `CodecLM(lm, vocab=tokens.vocab)`.

    model = CodecLM(AutoModelForCausalLM.from_pretrained(name), tokens.vocab, layout="delay")
    rows = [[*tokenizer("Say it again:").input_ids, model.audio_token_id, *answer]]
    out = model(**model.expand(rows, tokens, labels=rows), tokens=tokens)           # out.loss.backward()
    model.generate_text(**model.expand(prompts, tokens, side="left"), tokens=tokens, max_new_tokens=20, num_beams=4)
    model.continue_sound(tokens, seconds=2.0)                                       # AudioTokens, for detokenize

The language model is used as it is: its own embeddings, forward, head and generate; LoRA, checkpointing, dtypes and saving are
its own too. Around it stand an embedding of sound symbols and a head for each book (codec_symbols.py). Layouts:

    parallel  a frame a column: the embeddings of its codes are summed, the next frame's are predicted independently
    delay     the same, but book k is k columns late and predicted knowing the books before it (MusicGen 2306.05284)
    flatten   a code a column, frame by frame
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import ModelOutput

from mmcompress.audio.codec import AudioTokens

from .codec_continue import continue_sound
from .codec_symbols import LAYOUTS, Layout, SoundSymbols, Symbols, check_places, expand, symbols, which

CONFIG, WEIGHTS = "codec_lm.json", "codec_lm.safetensors"


@dataclass
class CodecLMOutput(ModelOutput):       # type: ignore[misc, unused-ignore]
    """loss: text_loss, plus sound_weight times the weighted mean of book_losses (n_q,), as far as there are such.

    logits (B, T, V) of text are the language model's own. For each book, code_logits (N, K) and code_targets (N,) of every code
    that was predicted, in order of recordings and frames. Book 0 has one class more, the end, behind each recording that ends.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    text_loss: Tensor | None = None
    book_losses: Tensor | None = None
    code_logits: tuple[Tensor, ...] | None = None
    code_targets: tuple[Tensor, ...] | None = None


class CodecLM(nn.Module):
    """A causal language model that reads and writes codes among text.

    lm              any causal language model of transformers that takes inputs_embeds, PEFT-wrapped or not
    vocab           how many codes each of the n_q books has: `tokens.vocab`, `tokens.prefix(n).vocab`
    layout          parallel, delay or flatten
    codebook        the codec's own vectors, (K, d) a book (X-Codec: q.codebook.embed of model.quantizer.quantizers), or None
    audio_token_id  the placeholder; None: the first id that the language model has no embedding for
    sound_weight, book_weights    of the loss. None: all books alike
    """

    def __init__(self, lm: Any, vocab: Sequence[int], layout: Layout = "parallel", *, codebook: Sequence[Tensor] | None = None,
                 audio_token_id: int | None = None, sound_weight: float = 1.0, book_weights: Sequence[float] | None = None):
        super().__init__()
        self.vocab, self.layout, self.sound_weight = tuple(int(k) for k in vocab), layout, sound_weight
        self.book_weights = tuple(book_weights or [1.0] * len(self.vocab))
        self._check(codebook)
        words = lm.get_input_embeddings()
        with torch.no_grad():                               # what it gives, which scaled embeddings do not hold
            some = words(torch.arange(min(4096, words.weight.shape[0]), device=words.weight.device)).float()
        self.audio_token_id = words.weight.shape[0] if audio_token_id is None else audio_token_id
        self.lm = lm
        spread = getattr(lm.config, "initializer_range", None) or 0.02
        self.sound = SoundSymbols(self.vocab, some.shape[1], 1 if layout == "flatten" else len(self.vocab), float(some.std()),
                                  spread, codebook).to(some.device)

    def _check(self, codebook: Sequence[Tensor] | None) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r}: one of {', '.join(LAYOUTS)}")
        if not self.vocab or min(self.vocab) < 1:
            raise ValueError(f"vocab={self.vocab}: pass how many codes each book has, tokens.vocab")
        weights = self.book_weights
        if len(weights) != self.n_q or min(weights) < 0 or not sum(weights):
            raise ValueError(f"book_weights={weights} for {self.n_q} books: pass one for each, not negative and not all 0")
        if codebook is not None and tuple(len(book) for book in codebook) != self.vocab:
            raise ValueError(f"codebook of {[len(book) for book in codebook]} vectors for the books {self.vocab}: pass (K, d) "
                             "for each book that is used")

    @property
    def n_q(self) -> int:
        return len(self.vocab)

    @property
    def device(self) -> torch.device:
        return self.sound.table.weight.device

    def expand(self, rows: Sequence[Any], tokens: AudioTokens, *, ended: Tensor | bool = True,
               labels: Sequence[Any] | None = None, side: Literal["left", "right"] = "right", pad: int = 0
               ) -> dict[str, Tensor]:
        """input_ids, attention_mask and, if given, labels, (B, T): rows with one `audio_token_id` for each recording become a
        padded batch with as many as it takes columns (codec_symbols.expand). Pass `ended` to the call that follows too."""
        columns = self.symbols(tokens, ended).columns
        out = expand(rows, columns, self.audio_token_id, labels, side, pad)
        return {key: value.to(self.device) for key, value in out.items()}

    def symbols(self, tokens: AudioTokens, ended: Tensor | bool = True) -> Symbols:
        """What stands for each recording. Raises ValueError for tokens of other books."""
        if tokens.vocab != self.vocab:
            way_out = f"; tokens.prefix({self.n_q}) are its" if tokens.vocab[:self.n_q] == self.vocab else ""
            raise ValueError(f"the tokens have books of {tokens.vocab} codes and this model {self.vocab}{way_out}")
        return symbols(tokens.to(self.device), self.layout, ended)

    def embed(self, input_ids: Tensor, tokens: AudioTokens | None = None, *, ended: Tensor | bool = True) -> Tensor:
        """The language model's inputs_embeds (B, T, D): words, and at the placeholders the recordings in their order."""
        return self._embed(input_ids, None if tokens is None else self.symbols(tokens, ended))

    def _embed(self, input_ids: Tensor, said: Symbols | None) -> Tensor:
        here = input_ids == self.audio_token_id
        embeds = self.lm.get_input_embeddings()(input_ids.masked_fill(here, 0))
        check_places(here, said.columns if said is not None else here.new_zeros(0, dtype=torch.int64))
        if said is None:
            return embeds
        sound = self.sound.embed(said.ids.transpose(1, 2)[said.valid]).to(embeds.dtype)                 # (P, D)
        return embeds.masked_scatter(here[..., None], sound)

    def read(self, embeds: Tensor, mask: Tensor, **options: Any) -> tuple[Any, Tensor]:
        """The language model's own output, and what its head was given, (B, T, D): with `logits_to_keep` less."""
        seen: list[Tensor] = []
        hook = self.lm.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -embeds.shape[1]:]
            out = self.lm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, **options)
        finally:
            hook.remove()
        return out, seen[0]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, tokens: AudioTokens | None = None,
                labels: Tensor | None = None, *, ended: Tensor | bool = True, spoken: Tensor | bool = True) -> CodecLMOutput:
        """Teacher forcing over text and sound.

        input_ids, attention_mask, labels    (B, T), as `expand` makes them; padding on either side; labels as in transformers
        tokens    R recordings in the order of their placeholders, any number in a row
        ended     (R,) bool or one for all: an end stands behind the recording and is learned. False: a crop
        spoken    (R,) bool or one for all: its codes are predicted and learned. False: it is only heard
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        said = None if tokens is None else self.symbols(tokens, ended)
        out, hidden = self.read(self._embed(input_ids, said), mask, use_cache=False)
        result = CodecLMOutput(logits=out.logits)
        if labels is not None:
            targets = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)            # a row's first word is never predicted
            result.loss = result.text_loss = mean_loss(out.logits[:, :-1].flatten(0, 1), targets.flatten())
        if said is None or tokens is None or spoken is False:
            return result
        hidden = hidden.new_zeros(*said.valid.shape, hidden.shape[-1]).masked_scatter(
            said.valid[..., None], hidden[input_ids == self.audio_token_id])                            # (R, M, D)
        result.code_logits, result.code_targets = self._predict(hidden, said, which(spoken, tokens, "spoken").to(self.device))
        result.book_losses = torch.stack([mean_loss(*pair) for pair in zip(result.code_logits, result.code_targets)])
        weights = result.book_losses.new_tensor(self.book_weights)
        sound_loss = self.sound_weight * (weights * result.book_losses).sum() / weights.sum()
        result.loss = sound_loss if result.loss is None else result.loss + sound_loss
        return result

    def _predict(self, hidden: Tensor, said: Symbols, spoken: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Logits and targets of each book; every symbol is predicted where the one before it was read."""
        logits, targets, first = [], [], 0
        for k, size in enumerate(self.vocab):
            recording, stream, column = ((said.book == k) & spoken[:, None, None]).nonzero(as_tuple=True)
            logits.append(self.sound.logits(k, hidden[recording, column - 1]))
            targets.append((said.ids[recording, stream, column] - first).clamp_max(size))               # the end: class K
            first += size
        return tuple(logits), tuple(targets)

    @torch.no_grad()
    def generate_text(self, input_ids: Tensor, attention_mask: Tensor | None = None, tokens: AudioTokens | None = None, *,
                      ended: Tensor | bool = True, **options: Any) -> Tensor:
        """The new ids (B, L) that the language model's own `generate` gives with these options. Padding on the left."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not mask[:, -1].all():
            raise ValueError("attention_mask: rows end with padding; generating goes on from the end, so pad on the left "
                             '(expand(..., side="left"))')
        return self.lm.generate(inputs_embeds=self.embed(input_ids, tokens, ended=ended), attention_mask=mask, **options)

    def continue_sound(self, tokens: AudioTokens, *, frames: int | None = None, seconds: float | None = None,
                       input_ids: Tensor | None = None, attention_mask: Tensor | None = None, temperature: float = 1.0,
                       top_k: int | None = None, generator: torch.Generator | None = None,
                       use_cache: bool = True) -> AudioTokens:
        """The recordings, each gone on with until the model ends it, or for so many frames or seconds at most.

        tokens      (B) recordings of any lengths; of length 0: from nothing
        input_ids   what stands before each, (B, T): `expand(rows, tokens, ended=False, side="left")` of rows that end with
                    the placeholder. None: nothing
        temperature, top_k, generator    of sampling; 0: the likeliest code. The generator lies on the model's device
        use_cache   False reads everything again at every step, for comparison
        """
        return continue_sound(self, tokens, frames, seconds, input_ids, attention_mask, temperature, top_k, generator,
                              use_cache)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """The language model as it saves itself, and two files beside it: codec_lm.json, codec_lm.safetensors."""
        from safetensors.torch import save_file
        folder = Path(folder)
        self.lm.save_pretrained(folder)
        about = {"vocab": self.vocab, "layout": self.layout, "audio_token_id": self.audio_token_id,
                 "sound_weight": self.sound_weight, "book_weights": self.book_weights}
        weights = {key: value.cpu().contiguous() for key, value in self.sound.state_dict().items()}
        save_file(weights, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], lm: Any = None, **options: Any) -> CodecLM:
        """What `save_pretrained` wrote, in eval mode. `lm`: used instead of loading one; options of loading it otherwise."""
        from safetensors.torch import load_file
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder} holds no {CONFIG}: pass a folder that CodecLM.save_pretrained wrote")
        about, weights = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
        codebook = weights["codebook"][:-2].split(list(about["vocab"])) if "codebook" in weights else None
        model = cls(AutoModelForCausalLM.from_pretrained(folder, **options) if lm is None else lm, codebook=codebook, **about)
        model.sound.to(weights["table.weight"].dtype).load_state_dict(weights)
        return model.eval()


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats over targets (N,) other than -100; 0 if there are none."""
    total = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="sum", ignore_index=-100)
    return total / (targets != -100).sum().clamp_min(1).to(total.device)
