"""Makes the semantic teacher of configs/xcodec-tiny.yaml: a small HuBERT that says what Whisper's encoder hears.

    python benchmarks/speech.py make corpus
    python benchmarks/teacher.py corpus --model whisper-tiny.en --out mmcompress/audio/xcodec/teacher

X-Codec's own teachers (HuBERT, WavLM) have 95 M parameters and are downloaded. This one has 2 M and lies in the package. It is
distilled (DistilHuBERT, arXiv 2110.01900): a linear map of the mean of all its hidden states, which is what X-Codec reads,
learns Whisper's last encoder state at the same 20 ms, L1 - log sigmoid(cosine). No text and no label is used. Sounds: the
recorded clips of the corpus (not the held-out ones) and synthesised sentences; Whisper hears 30 s at a time.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import positive
from speech import RATE, read_corpus
from torch import Tensor, nn
from tqdm import tqdm

from mmcompress.audio import load
from mmcompress.audio.speech import draw
from mmcompress.train.codec.segments import held_out

HOP, WINDOW = 320, 30 * RATE
PAD = HOP // 2


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Whisper checkpoint with its processor")
    parser.add_argument("--out", type=Path, default=Path("out/teacher"))
    parser.add_argument("--sentences", type=positive, default=1000, help="synthesised ones")
    parser.add_argument("--steps", type=positive, default=1600)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--seconds", type=positive, default=2, help="of each crop")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    windows = list(_windows(_sounds(options.corpus, options.sentences)))
    targets = _hear(options.model, windows)
    student, head = distil(windows, targets, options.steps, options.batch, options.seconds)
    student.half().save_pretrained(options.out)
    print(f"{sum(p.numel() for p in student.parameters()) / 1e6:.2f} M parameters, explained variance on held-out windows: "
          f"{explained(student.float(), head, windows[-8:], targets[-8:]):.3f}", options.out, sep="\n")


def small_hubert() -> Any:
    """The student: HuBERT's front end at 50 frames a second, five narrow layers."""
    from transformers import HubertConfig, HubertModel

    return HubertModel(HubertConfig(
        hidden_size=192, num_hidden_layers=5, num_attention_heads=4, intermediate_size=576, conv_dim=[64] * 5 + [96, 128],
        conv_bias=True, feat_extract_norm="layer", num_conv_pos_embeddings=32, num_conv_pos_embedding_groups=8,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0,
        apply_spec_augment=False, mask_time_prob=0.0))


def _sounds(corpus: Path, sentences: int) -> Iterator[Tensor]:
    """Samples of every clip that is not held out, and of synthesised sentences."""
    for clip in read_corpus(corpus):
        if not held_out(clip.file):
            yield load(clip.folder / clip.file, RATE).samples
    for i in tqdm(range(sentences), desc="speaks", disable=None):
        yield F.pad(draw(f"teacher/{i}").sound.samples, (0, RATE // 4))


def _windows(sounds: Iterator[Tensor]) -> Iterator[Tensor]:
    """30 s each, one sound after another, in random order; what is left over is dropped."""
    every = list(sounds)
    random.Random(0).shuffle(every)
    joined = torch.cat(every)
    return iter(joined[:len(joined) // WINDOW * WINDOW].reshape(-1, WINDOW))


@torch.no_grad()
def _hear(folder: Path, windows: list[Tensor]) -> Tensor:
    """Whisper's last encoder state, each dimension of mean 0 and deviation 1. -> (windows, 1500, D) float16"""
    from transformers import WhisperFeatureExtractor, WhisperModel

    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    encoder = WhisperModel.from_pretrained(folder, dtype=torch.float32).encoder.eval()
    found = []
    for window in tqdm(windows, desc="hears", disable=None):
        mel = extractor(window.numpy(), sampling_rate=RATE, return_tensors="pt").input_features
        found.append(encoder(mel).last_hidden_state[0])
    heard = torch.stack(found)
    mean, deviation = heard.mean((0, 1)), heard.std((0, 1))
    return ((heard - mean) / deviation).half()


def mean_state(student: Any, audio: Tensor) -> Tensor:
    """What X-Codec reads: audio (B, T) -> (B, T / 320, D), the mean of all hidden states, half a frame of zeros around."""
    return torch.stack(student(F.pad(audio, (PAD, PAD)), output_hidden_states=True).hidden_states).mean(0)


def distil(windows: list[Tensor], targets: Tensor, steps: int, batch: int, seconds: int) -> tuple[Any, nn.Linear]:
    """Train on all windows but the last eight."""
    student = small_hubert().train()
    head = nn.Linear(student.config.hidden_size, targets.shape[2])
    parameters = [*student.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.07)
    frames, rng = seconds * RATE // HOP, random.Random(0)
    with tqdm(range(steps), desc="learns", disable=None) as bar:
        for step in bar:
            at = [(rng.randrange(len(windows) - 8), rng.randrange(WINDOW // HOP - frames)) for _ in range(batch)]
            audio = torch.stack([windows[w][t * HOP:(t + frames) * HOP] for w, t in at])
            wanted = torch.stack([targets[w, t:t + frames] for w, t in at]).float()
            said = head(mean_state(student, audio * 10 ** rng.uniform(-0.5, 0.3)))
            loss = F.l1_loss(said, wanted) - F.logsigmoid(F.cosine_similarity(said, wanted, dim=-1)).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return student.eval(), head


@torch.no_grad()
def explained(student: Any, head: nn.Linear, windows: list[Tensor], targets: Tensor) -> float:
    """1 - squared error / variance of Whisper's states."""
    error = [(head(mean_state(student, w[None]))[0] - t.float()).square().mean() for w, t in zip(windows, targets)]
    return 1 - float(torch.stack(error).mean())


if __name__ == "__main__":
    main()
