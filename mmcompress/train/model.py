"""What is trained: tokenizer, processor and LLaVA-NeXT from a recipe, and the `Learner` that holds the objectives."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import FIELDS, WORLDS, Batch, pixel_values
from .recipe import PARTS, ModelShape, Recipe

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
CHAT = ("{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' }}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ ' ASSISTANT:' }}"
        "{% else %}{% for c in m['content'] %}{{ ' ' + c['text'] + '</s>' }}{% endfor %}{% endif %}{% endfor %}")


def build_tokenizer(world: ModuleType, vocabulary: int) -> Any:
    """A byte-level BPE trained on what is asked in a world; digits stay apart. Always the same for the same arguments."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(_lines(world), trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL,
                                                               initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left",
        additional_special_tokens=["<image>"], model_max_length=4096, chat_template=CHAT)


def _lines(world: ModuleType) -> list[str]:
    """Chats about made-up objects, enough to meet every word often."""
    rng = random.Random(0)
    kinds = [k for k in FIELDS if (k == "blocks") == (world is WORLDS["blocks"])]
    values = {"color": list(world.COLORS), "shape": world.SHAPES, "word": world.WORDS,
              "number": [str(i) for i in range(100, 1000)]}
    lines = []
    for _ in range(3000):
        kind = rng.choice(kinds)
        objects = [{f: rng.choice(values[f]) for f in FIELDS[kind]} for _ in range(3)]
        asked = [*world.questions(rng, kind, objects, 3), world.transcript(kind, objects),
                 ("look up " + " ".join(rng.sample(FIELDS[kind], len(FIELDS[kind]))) + ".", "yes;")]
        lines += [f"USER: {q} ASSISTANT: {a}" for q, a in asked]
    return lines


def build_processor(recipe: Recipe, shape: ModelShape) -> Any:
    """The LlavaNextProcessor of a model built from scratch."""
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    tokenizer = build_tokenizer(WORLDS[recipe.data.world], shape.vocabulary)
    images = LlavaNextImageProcessor(
        size={"shortest_edge": shape.tile}, crop_size={"height": shape.tile, "width": shape.tile}, resample=3,
        image_mean=[0.5] * 3, image_std=[0.5] * 3, image_grid_pinpoints=[list(c) for c in recipe.data.canvases])
    return LlavaNextProcessor(images, tokenizer, patch_size=shape.patch, vision_feature_select_strategy="default",
                              chat_template=CHAT, num_additional_image_tokens=1)


def build_model(recipe: Recipe, shape: ModelShape, vocabulary: int) -> Any:
    """A LlavaNextForConditionalGeneration with fresh float32 weights, the same for the same seed."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    v, t = shape.vision, shape.text
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=v.width, intermediate_size=v.mlp, num_hidden_layers=v.layers, num_attention_heads=v.heads,
            image_size=shape.tile, patch_size=shape.patch, projection_dim=v.width),
        text_config=LlamaConfig(
            hidden_size=t.width, intermediate_size=t.mlp, num_hidden_layers=t.layers, num_attention_heads=t.heads,
            num_key_value_heads=t.kv_heads, vocab_size=vocabulary, max_position_embeddings=4096, tie_word_embeddings=True,
            pad_token_id=0, bos_token_id=1, eos_token_id=2),
        image_token_index=SPECIAL.index("<image>"), image_grid_pinpoints=[list(c) for c in recipe.data.canvases],
        vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=True)
    torch.manual_seed(recipe.seed)
    return LlavaNextForConditionalGeneration(config)


def load(recipe: Recipe) -> tuple[Any, Any]:
    """-> (model in float32, processor), from scratch or from `recipe.init`."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if recipe.model is not None:
        processor = build_processor(recipe, recipe.model)
        return build_model(recipe, recipe.model, len(processor.tokenizer)), processor
    if recipe.init in ("pico", "pico-video"):
        from .. import pico

        model, processor = pico.load() if recipe.init == "pico" else pico.video.build(trained=False)
    else:
        processor = AutoProcessor.from_pretrained(str(recipe.init))
        loader: Any = AutoModelForImageTextToText
        model = loader.from_pretrained(str(recipe.init), dtype=torch.float32)
    pinpoints = [list(p) for p in model.config.image_grid_pinpoints]
    if unknown := [list(c) for c in recipe.data.canvases if list(c) not in pinpoints]:
        raise ValueError(f"data.canvases {unknown} are no grid pinpoints of {recipe.init}; it has {pinpoints}")
    return model, processor


@torch.no_grad()
def average_with_start(model: Any, recipe: Recipe) -> None:
    """Move the trained weights back towards those they started from, in place.

    Interpolating keeps what fine-tuning gained and gives back much of what it lost elsewhere (Wortsman et al., "Robust
    fine-tuning of zero-shot models", CVPR 2022: WiSE-FT).
    """
    start, _ = load(recipe)
    for trained, before in zip(model.parameters(), start.parameters()):
        trained.lerp_(before.to(trained), 1 - recipe.average)


class Learner(nn.Module):
    """The model and its helper heads; one call is one step's loss, so that accelerate may wrap it whole."""

    def __init__(self, model: Any, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        vision, world = model.config.vision_config, WORLDS[recipe.data.world]
        self.tile = vision.image_size
        self.groups = world.CELL_GROUPS if recipe.heads.cells else ()
        self.heads = nn.ModuleDict()
        if recipe.heads.cls:
            self.heads["cls"] = nn.Linear(vision.hidden_size, len(world.ATTRIBUTES))
        if recipe.heads.cells:
            self.heads["cells"] = nn.Sequential(nn.LayerNorm(vision.hidden_size),
                                                nn.Linear(vision.hidden_size, sum(self.groups)))
        for part in recipe.freeze:
            target = model.get_parameter(PARTS[part]) if part == "newline" else model.get_submodule(PARTS[part])
            target.requires_grad_(False)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the stock forward takes."""
        inputs = {k: v for k, v in batch.inputs.items() if k not in ("pictures", "frames")}
        if (frames := batch.inputs.get("frames")) is not None:
            return {**inputs, "pixel_values_videos": frames.permute(0, 1, 4, 2, 3).float() / 127.5 - 1}
        return {**inputs, "pixel_values": pixel_values(batch.inputs["pictures"], batch.canvas, self.tile)}

    def forward(self, batch: Batch, step: int = 0) -> dict[str, Tensor]:
        """-> named scalar losses; "loss" is what is minimised. Under autocast if the recipe says so."""
        with torch.autocast(batch.tiles.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            return self._consistency(batch, step) if self.recipe.consistency is not None else self._objectives(batch)

    def _objectives(self, batch: Batch) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        layer = self.model.config.vision_feature_layer

        def look(_m: Any, _i: Any, out: Any) -> None:
            seen.update(cls=out.pooler_output, patches=out.hidden_states[layer][:, 1:])

        hook = self.model.model.vision_tower.register_forward_hook(look)
        try:
            losses = {"lm": self.model(**self.inputs(batch), use_cache=False).loss}
        finally:
            hook.remove()
        loss = losses["lm"]
        if "cls" in self.heads:
            losses["cls"] = self._cls_loss(seen["cls"], batch.tiles)
            loss = loss + self.recipe.heads.cls * losses["cls"]
        if "cells" in self.heads:
            losses["cells"] = self._cells_loss(seen["patches"], batch)
            loss = loss + self.recipe.heads.cells * losses["cells"]
        return {"loss": loss, **losses}

    def _cls_loss(self, cls: Tensor, tiles: Tensor) -> Tensor:
        """Binary cross entropy of what tiles show. cls (B * tiles, D), tiles (B, tiles, attributes)"""
        logits = self.heads["cls"](cls).float()
        weight = torch.full((logits.shape[-1],), 4.0, device=logits.device)             # few attributes are present
        return F.binary_cross_entropy_with_logits(logits, tiles.flatten(0, 1), pos_weight=weight)

    def _cells_loss(self, features: Tensor, batch: Batch) -> Tensor:
        """Mean cross entropy of each crop patch's groups; 'nothing here' counts a tenth. features (B * tiles, patches, D)"""
        rows, columns = batch.canvas.height // self.tile, batch.canvas.width // self.tile
        b, side = len(batch.cells), round(features.shape[1] ** 0.5)
        wanted = batch.cells.view(b, rows, side, columns, side, -1).transpose(2, 3).reshape(-1, len(self.groups)).long()
        crops = features.view(b, 1 + rows * columns, side * side, -1)[:, 1:]
        logits = self.heads["cells"](crops).float().flatten(0, 2).split(list(self.groups), -1)
        losses = [F.cross_entropy(x, wanted[:, i], weight=torch.tensor([0.1] + [1.0] * (n - 1), device=x.device))
                  for i, (x, n) in enumerate(zip(logits, self.groups))]
        return torch.stack(losses).mean()

    def _consistency(self, batch: Batch, step: int) -> dict[str, Tensor]:
        from .. import registry
        from .losses import consistency

        how = self.recipe.consistency
        assert how is not None
        keep = random.Random(f"{self.recipe.seed}/keep/{step}").choice(how.keep)
        reducer = registry.build("image", {**how.image, "keep": keep})
        out = consistency(self.model, self.inputs(batch), image=reducer, temperature=how.temperature)
        loss = how.full * out.full_loss + how.reduced * out.reduced_loss + how.kl * out.kl
        return {"loss": loss, "lm": out.full_loss, "reduced": out.reduced_loss, "kl": out.kl}
