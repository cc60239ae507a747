"""Tiny random models of the real classes, and inputs for them in the form the processors give."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    SiglipVisionConfig,
)

from mmcompress.adapters import adapter_for

SIDE, PATCH = 24, 4                     # a tile of 6 x 6 tokens
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
IMAGE, PAD, EOS, VOCAB = 98, 0, 2, 100

_vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE,
               patch_size=PATCH)


def vision(tower: str, side: int = SIDE, patch: int = PATCH):
    if tower == "clip":
        return CLIPVisionConfig(**{**_vision, "image_size": side, "patch_size": patch}, projection_dim=16), "default"
    if tower == "siglip":
        return SiglipVisionConfig(**_vision), "full"
    return Dinov2Config(**{k: v for k, v in _vision.items() if k != "intermediate_size"}, mlp_ratio=1), "default"


def text(kind: str = "llama", depth: int = 2):
    options = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=depth, num_attention_heads=4, num_key_value_heads=2,
                   vocab_size=VOCAB, max_position_embeddings=2048, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
                   initializer_range=0.2)
    return MistralConfig(**options, sliding_window=None) if kind == "mistral" else LlamaConfig(**options)


def llava_next(tower: str = "clip", language: str = "llama", seed: int = 0, side: int = SIDE, patch: int = PATCH,
               pinpoints=PINPOINTS, depth: int = 2, **options):
    torch.manual_seed(seed)
    vision_config, strategy = vision(tower, side, patch)
    config = LlavaNextConfig(vision_config=vision_config, text_config=text(language, depth), image_token_index=IMAGE,
                             image_grid_pinpoints=pinpoints, vision_feature_select_strategy=strategy)
    model = LlavaNextForConditionalGeneration._from_config(config, **options).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return model


def llava(tower: str = "clip", seed: int = 0, **options):
    torch.manual_seed(seed)
    vision_config, strategy = vision(tower)
    config = LlavaConfig(vision_config=vision_config, text_config=text(), image_token_index=IMAGE,
                         vision_feature_select_strategy=strategy)
    model = LlavaForConditionalGeneration._from_config(config, **options).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return model


def make_inputs(model, rows, side="left", seed=0, texts=None):
    """`rows`: for each prompt the (height, width) of its pictures. Text of 3..9 tokens stands around each picture."""
    g = torch.Generator().manual_seed(seed)
    adapter = adapter_for(model)
    number = lambda low, high: int(torch.randint(low, high, (1,), generator=g))  # noqa: E731
    words = lambda n: torch.randint(3, 97, (n,), generator=g).tolist()  # noqa: E731
    sizes = [s for r in rows for s in r]
    inputs = {}
    if sizes and model.config.model_type == "llava_next":
        layouts = [adapter.layout(*s) for s in sizes]
        inputs["pixel_values"] = torch.randn(len(sizes), max(x.tiles for x in layouts), 3, SIDE, SIDE, generator=g)
        inputs["image_sizes"] = torch.tensor(sizes)
    elif sizes:
        inputs["pixel_values"] = torch.randn(len(sizes), 3, SIDE, SIDE, generator=g)
        layouts = adapter.layouts(inputs)
    if sizes:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    prompts, at = [], 0
    for i, row in enumerate(rows):
        ids = [1, *words(number(3, 10))]
        for _ in row:
            ids += [IMAGE] * layouts[at].tokens + words(number(3, 10))
            at += 1
        if texts:
            ids += words(texts[i])
        prompts.append(ids)
    length = max(map(len, prompts))
    pad = lambda p: [PAD] * (length - len(p))  # noqa: E731
    put = (lambda p, fill: fill + p) if side == "left" else (lambda p, fill: p + fill)
    inputs["input_ids"] = torch.tensor([put(p, pad(p)) for p in prompts])
    inputs["attention_mask"] = torch.tensor([put([1] * len(p), pad(p)) for p in prompts])
    return inputs


def row_of(model, inputs, rows, i):
    """Prompt i of a batch alone, without its padding."""
    first = sum(len(r) for r in rows[:i])
    images = slice(first, first + len(rows[i]))
    real = inputs["attention_mask"][i].bool()
    out = {"input_ids": inputs["input_ids"][i][real][None], "attention_mask": inputs["attention_mask"][i][real][None]}
    if rows[i]:
        out["pixel_values"] = inputs["pixel_values"][images]
        if "image_sizes" in inputs:
            out["image_sizes"] = inputs["image_sizes"][images]
            tiles = max(x.tiles for x in adapter_for(model).layouts(out))
            out["pixel_values"] = out["pixel_values"][:, :tiles]
    return out


@torch.no_grad()
def greedy_reference(model, inputs, reducer, steps):
    """Greedy decoding of one prompt by hand: no wrap, no prompt surgery, no cache, no generate.

    The pictures are reduced one at a time and their tokens put among the text's embeddings, at the positions the reducer
    was made for. -> token ids (steps,)
    """
    from mmcompress.tokens import Tokens

    adapter = adapter_for(model)
    layouts = adapter.layouts(inputs)
    encoded = adapter.encode(inputs, getattr(reducer, "captures", ()))
    ids = inputs["input_ids"][0]
    embed = model.get_input_embeddings()
    parts, places, at = [], [], 0
    for i, layout in enumerate(layouts):
        start = at + int((ids[at:] == IMAGE_OF(model)).nonzero()[0])
        after = ids[start + layout.tokens:]
        question = after[after != IMAGE_OF(model)]
        x = Tokens(encoded.features[i][None], layout, encoded.state(layouts, [i]), embed(question)[None],
                   torch.ones(1, len(question), dtype=torch.bool))
        reduced = reducer(x)
        parts += [embed(ids[at:start]), reduced.tokens[0]]
        places += [torch.arange(at, start), start + reduced.index[0]]
        at = start + layout.tokens
    sequence = torch.cat([*parts, embed(ids[at:])])[None]
    places = torch.cat([*places, torch.arange(at, len(ids))])[None]
    if getattr(reducer, "positions", "closed") == "closed":
        places = torch.arange(sequence.shape[1])[None]
    out = []
    for _ in range(steps):
        hidden = model.model.language_model(inputs_embeds=sequence, position_ids=places, use_cache=False,
                                            attention_mask=torch.ones(sequence.shape[:2])).last_hidden_state
        out.append(int(model.lm_head(hidden[:, -1]).argmax()))
        sequence = torch.cat([sequence, embed(torch.tensor([[out[-1]]]))], 1)
        places = torch.cat([places, places[:, -1:] + 1], 1)
    return torch.tensor(out)


def IMAGE_OF(model):
    return model.config.image_token_id
