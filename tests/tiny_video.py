"""Tiny random models of the families that read clips, and prompts with pictures and clips in the form their processors give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from tiny import EOS, IMAGE, PAD, PINPOINTS, SIDE, VOCAB, text, vision

from mmcompress.adapters import adapter_for
from mmcompress.compat import pictures_argument
from mmcompress.pipeline import captures_of
from mmcompress.tokens import Tokens

VIDEO, END, NEWLINE, FRAME, COLON, BLANK, START = 99, 90, 91, 92, 93, 94, 95       # InternVL's frames stand between words
DIGIT = 80                                                                        # DIGIT + 3 is "3"
FAMILIES = ("llava_next_video", "llava_onevision", "video_llava", "qwen2_5_vl", "internvl")


def _finish(model):
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return model.eval()


def _llava_next_video(**options):
    tower, strategy = vision("clip")
    config = transformers.LlavaNextVideoConfig(
        vision_config=tower, text_config=text(), image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS, vision_feature_select_strategy=strategy)
    return transformers.LlavaNextVideoForConditionalGeneration._from_config(config, **options)


def _llava_onevision(**options):
    tower, strategy = vision("siglip")
    config = transformers.LlavaOnevisionConfig(
        vision_config=tower, text_config=_qwen_text(), image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=[*PINPOINTS, [24, 24], [96, 96]], vision_feature_select_strategy=strategy)
    return transformers.LlavaOnevisionForConditionalGeneration._from_config(config, **options)


def _qwen_text():
    return transformers.Qwen2Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                    num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=2048, pad_token_id=PAD,
                                    bos_token_id=1, eos_token_id=EOS, initializer_range=0.2)


def _video_llava(**options):
    tower, strategy = vision("clip")
    config = transformers.VideoLlavaConfig(vision_config=tower, text_config=text(), image_token_index=IMAGE,
                                           video_token_index=VIDEO, vision_feature_select_strategy=strategy)
    return transformers.VideoLlavaForConditionalGeneration._from_config(config, **options)


def _qwen2_5_vl(**options):
    words = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 vocab_size=VOCAB, max_position_embeddings=2048, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
                 initializer_range=0.2, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]})
    tower = dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, patch_size=4,
                 spatial_merge_size=2, temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1], tokens_per_second=2)
    config = transformers.Qwen2_5_VLConfig(text_config=words, vision_config=tower, image_token_id=IMAGE, video_token_id=VIDEO,
                                           vision_start_token_id=96, vision_end_token_id=97)
    return transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, **options)


def _internvl(**options):
    tower = transformers.InternVLVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
                                              image_size=[SIDE, SIDE], patch_size=[2, 2], norm_type="layer_norm")
    config = transformers.InternVLConfig(vision_config=tower, text_config=_qwen_text(), image_token_id=IMAGE,
                                         downsample_ratio=0.5)
    return transformers.InternVLForConditionalGeneration._from_config(config, **options)


def build(family, seed=0, **options):
    torch.manual_seed(seed)
    return _finish(globals()[f"_{family}"](**options))


@dataclass(frozen=True)
class Picture:
    size: tuple[int, int] = (48, 48)


@dataclass(frozen=True)
class Film:
    frames: int = 4
    size: tuple[int, int] = (24, 32)        # where a family reads any size


def rows_for(family):
    """Prompts: a clip; a picture between two clips; text alone; a clip behind a picture. Lengths differ where they may."""
    free = family in ("qwen2_5_vl", "internvl")
    return [[Film()], [Film(6 if free else 4), Picture((30, 70)), Film()], [], [Picture(), Film(8 if free else 4, (16, 24))]]


def make_inputs(model, rows, side="left", seed=0):
    """What the family's processor gives for prompts of these pictures and clips, with 3..9 words around each."""
    g = torch.Generator().manual_seed(seed)
    kind = model.config.model_type
    words = lambda n: torch.randint(3, 79, (n,), generator=g).tolist()  # noqa: E731
    number = lambda: int(torch.randint(3, 10, (1,), generator=g))  # noqa: E731
    prompts = []
    for row in rows:
        ids = [1, *words(number())]
        for item in row:
            ids += [*_placeholders(model, item, rows), *words(number())]
        prompts.append(ids)
    length = max(map(len, prompts))
    put = lambda p, fill: [*fill, *p] if side == "left" else [*p, *fill]  # noqa: E731
    inputs = {"input_ids": torch.tensor([put(p, [PAD] * (length - len(p))) for p in prompts]),
              "attention_mask": torch.tensor([put([1] * len(p), [0] * (length - len(p))) for p in prompts])}
    items = [item for row in rows for item in row]
    inputs.update(_pixels(model, items, g))
    if kind == "qwen2_5_vl":
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = torch.where(ids == IMAGE, 1, torch.where(ids == VIDEO, 2, 0))
    if kind == "llava_onevision" and any(isinstance(i, Picture) for i in items):
        inputs["batch_num_images"] = torch.tensor([sum(isinstance(i, Picture) for i in row) for row in rows
                                                   if any(isinstance(i, Picture) for i in row)])
    return inputs


def _placeholders(model, item, rows):
    kind = model.config.model_type
    if kind == "internvl":
        tile = [IMAGE] * 36
        if isinstance(item, Picture):
            return [START, *tile * _tiles(item), END]
        out = []
        for i in range(item.frames):
            label = [FRAME, *(DIGIT + int(d) for d in str(i + 1)), COLON, BLANK, START]
            out += [*([NEWLINE] if i else []), *label, *tile, END]
        return out
    alone = {"pixel_values": None, **_pixels(model, [item], torch.Generator().manual_seed(0))}
    adapter = adapter_for(model)
    layouts = adapter.layouts(alone) if isinstance(item, Picture) else adapter.video_layouts(alone)
    return [IMAGE if isinstance(item, Picture) else VIDEO] * layouts[0].tokens


def _tiles(picture):
    return max(1, round(picture.size[0] * picture.size[1] / SIDE**2))


def _pixels(model, items, g):
    kind = model.config.model_type
    pictures, films = [i for i in items if isinstance(i, Picture)], [i for i in items if isinstance(i, Film)]
    noise = lambda *shape: torch.randn(*shape, generator=g).to(model.dtype)  # noqa: E731
    if kind == "internvl":
        tiles = [_tiles(i) if isinstance(i, Picture) else i.frames for i in items]
        return {"pixel_values": _alike(torch.cat([noise(n, 3, SIDE, SIDE) for n in tiles]))} if tiles else {}
    out = {}
    if kind == "qwen2_5_vl":
        grids = {"image": [(1, h // 4 // 2 * 2, w // 4 // 2 * 2) for h, w in (p.size for p in pictures)],
                 "video": [(f.frames // 2, f.size[0] // 4, f.size[1] // 4) for f in films]}
        for name, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if grids[name]:
                out[pixels] = torch.cat([_still(noise, *grid) for grid in grids[name]])
                out[f"{name}_grid_thw"] = torch.tensor(grids[name])
        if films:
            out["second_per_grid_ts"] = torch.tensor([1.0 + 0.5 * (f.frames % 4) for f in films])
        return out
    if pictures and kind != "video_llava":
        layouts = [adapter_for(model).layout(*p.size) for p in pictures]
        out["pixel_values"] = noise(len(pictures), max(x.tiles for x in layouts), 3, SIDE, SIDE)
        out["image_sizes"] = torch.tensor([p.size for p in pictures])
    elif pictures:
        out[pictures_argument(model.model)] = noise(len(pictures), 3, SIDE, SIDE)
    if films:
        out["pixel_values_videos"] = torch.stack([_alike(noise(f.frames, 3, SIDE, SIDE)) for f in films])
    return out


def _alike(frames):
    """Frames that share much: the first, with a new patch of noise in each."""
    out = frames[:1].repeat(len(frames), 1, 1, 1)
    out[:, :, :SIDE // 2, :SIDE // 2] = frames[:, :, :SIDE // 2, :SIDE // 2]
    return out


def _still(noise, t, h, w):
    """Patches of one clip (t * h * w, 96), the upper half of them alike in all frames."""
    out = noise(t, h * w, 3 * 2 * 4 * 4)
    out[:, :h * w // 2] = out[:1, :h * w // 2]
    return out.flatten(0, 1)


def row_of(model, inputs, rows, i):
    """Prompt i of a batch alone, without its padding."""
    real = inputs["attention_mask"][i].bool()
    out = {k: inputs[k][i][real][None] for k in ("input_ids", "attention_mask", "mm_token_type_ids") if k in inputs}
    before, here = [item for row in rows[:i] for item in row], rows[i]
    count = lambda items, kind: sum(isinstance(x, kind) for x in items)  # noqa: E731
    pictures = slice(count(before, Picture), count([*before, *here], Picture))
    films = slice(count(before, Film), count([*before, *here], Film))
    kind = model.config.model_type
    if kind == "internvl":
        tiles = lambda items: sum(_tiles(x) if isinstance(x, Picture) else x.frames for x in items)  # noqa: E731
        if here:
            out["pixel_values"] = inputs["pixel_values"][tiles(before):tiles([*before, *here])]
        return out
    if kind == "qwen2_5_vl":
        for name, pixels, some in (("image", "pixel_values", pictures), ("video", "pixel_values_videos", films)):
            if some.start < some.stop:
                grids = inputs[f"{name}_grid_thw"]
                ends = [0, *grids.prod(1).cumsum(0).tolist()]
                out[pixels], out[f"{name}_grid_thw"] = inputs[pixels][ends[some.start]:ends[some.stop]], grids[some]
        if films.start < films.stop:
            out["second_per_grid_ts"] = inputs["second_per_grid_ts"][films]
        return out
    if pictures.start < pictures.stop:
        name = pictures_argument(model.model) if kind == "video_llava" else "pixel_values"
        out[name] = inputs[name][pictures]
        if "image_sizes" in inputs:
            out["image_sizes"] = inputs["image_sizes"][pictures]
            tiles = max(adapter_for(model).layout(*p.size).tiles for p in here if isinstance(p, Picture))
            out["pixel_values"] = out["pixel_values"][:, :tiles]
        if "batch_num_images" in inputs:
            out["batch_num_images"] = torch.tensor([pictures.stop - pictures.start])
    if films.start < films.stop:
        out["pixel_values_videos"] = inputs["pixel_values_videos"][films]
    return out


@torch.no_grad()
def greedy_reference(model, inputs, config, steps):
    """Greedy decoding of one prompt by hand: no wrap, no prompt surgery, no cache, no generate.

    Every item is reduced alone, its tokens stand among the text's embeddings in the columns they had; positions are those
    columns, or count from 0, or are the model's own (t, y, x) of the full prompt. -> token ids (steps,)
    """
    adapter, ids = adapter_for(model), inputs["input_ids"]
    found = adapter.find(inputs, ids)
    encoded = adapter.encode_all(inputs, found, captures_of(config, adapter))
    embeds = model.get_input_embeddings()(ids)[0].clone()
    stays = torch.ones(ids.shape[1], dtype=torch.bool)
    for modality, reducer in config.reducers.items():
        same = [item for item in found if item.modality == modality]
        for i, item in enumerate(same):
            x = Tokens(encoded[modality].features[i][None], item.layout,
                       encoded[modality].state([s.layout for s in same], [i]))
            out = reducer(x)
            stays[item.columns] = False
            columns = item.columns[out.index[0]]
            stays[columns] = True
            embeds[columns] = out.tokens[0]
    columns = stays.nonzero()[:, 0]
    sequence = embeds[columns][None]
    if adapter.mrope:
        grids = {k: inputs[k] for k in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if k in inputs}
        places = model.model.get_rope_index(ids, mm_token_type_ids=inputs["mm_token_type_ids"], **grids)[0][:, :, columns]
    else:
        places = columns[None] if config.positions == "original" else torch.arange(len(columns))[None]
    out = []
    for _ in range(steps):
        hidden = model.model.language_model(inputs_embeds=sequence, position_ids=places, use_cache=False,
                                            attention_mask=torch.ones(sequence.shape[:2])).last_hidden_state
        out.append(int(model.lm_head(hidden[:, -1]).argmax()))
        sequence = torch.cat([sequence, model.get_input_embeddings()(torch.tensor([[out[-1]]]))], 1)
        places = torch.cat([places, places[..., -1:] + 1], -1)
    return torch.tensor(out)
