"""What adapters read of a prompt and of sizes, against transformers' own packing and processors."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from tiny import vision
from tiny_video import IMAGE, Film, Picture, _qwen_text, build, make_inputs

import mmcompress
from mmcompress.adapters import adapter_for
from mmcompress.adapters.internvl import _clips

OV = None


def onevision():
    """LLaVA-OneVision's real geometry: 384-pixel tiles of 27 x 27 tokens, canvases up to 6 x 6 tiles."""
    global OV
    if OV is None:
        tower, _ = vision("siglip")
        tower.image_size, tower.patch_size = 384, 14
        config = transformers.LlavaOnevisionConfig(
            vision_config=tower, text_config=_qwen_text(), image_token_index=IMAGE, video_token_index=99,
            image_grid_pinpoints=[[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)])
        OV = transformers.LlavaOnevisionForConditionalGeneration._from_config(config).eval()
    return OV


@given(st.tuples(st.integers(60, 2400), st.integers(60, 2400)))
@settings(max_examples=80, deadline=None)
def test_onevision_layout_is_transformers_packing(size):
    """Numbered patches through the stock packing. Resized canvases are interpolated, so there a token lies near its patch."""
    model = onevision()
    layout = adapter_for(model).layout(*size)
    rows, columns = torch.meshgrid(torch.arange(27.0), torch.arange(27.0), indexing="ij")
    tile = torch.arange(float(layout.tiles))[:, None].expand(-1, 729)
    patches = torch.stack([tile, rows.flatten().expand_as(tile), columns.flatten().expand_as(tile)], -1)
    packed, lengths = model.model.pack_image_features([patches], torch.tensor([size]), image_newline=torch.full((3,), -1.0))
    assert int(lengths[0]) == layout.tokens == len(packed[0])
    places = layout.places()
    assert torch.equal(places.is_patch, packed[0][:, 0] != -1) or layout.resized is not None
    assert torch.equal(places.newline, (packed[0] == -1).all(-1).nonzero()[:, 0])
    if layout.resized is None:
        number = packed[0][:, 0] * 729 + packed[0][:, 1] * 27 + packed[0][:, 2]
        assert torch.equal(torch.where(places.is_patch, places.patch.float(), -1.0 * 729 - 27 - 1), number)
    else:
        assert layout.size == layout.resized and max(layout.resized) <= 27 * 9
        inner = (packed[0][:, 1:] > 2).all(-1) & (packed[0][:, 1:] < 24).all(-1) & places.is_patch
        same = places.tile == packed[0][:, 0].round()                       # away from seams, where tiles are blended
        close = lambda a, b: (a - b).abs() <= 1.5  # noqa: E731
        patch = places.patch % 729
        good = close(patch // 27, packed[0][:, 1]) & close(patch % 27, packed[0][:, 2]) & same
        assert good[inner].float().mean() > 0.9


def test_onevision_does_not_cut_several_pictures():
    model = build("llava_onevision")
    inputs = make_inputs(model, [[Picture(), Picture()], [Picture()]])
    assert inputs["batch_num_images"].tolist() == [2, 1]
    layouts = adapter_for(model).layouts(inputs)
    assert [x.crops for x in layouts] == [0, 0, 4] and layouts[0].tokens == 37


@pytest.fixture(scope="module")
def processor():
    """InternVL's real processor on a small byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    special = ["<pad>", "</s>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator(["Frame1: Frame2: Frame10: what happens in the clip?\n"] * 50, trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", extra_special_tokens={
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>"})
    size = {"height": 24, "width": 24}
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=4),
        tokenizer=tokenizer, video_processor=transformers.InternVLVideoProcessor(size=size, do_sample_frames=False),
        image_seq_length=36, chat_template="{{ '' }}")


@pytest.mark.parametrize("frames", [2, 9, 12])
def test_internvl_tells_clips_from_pictures_in_the_processors_prompts(processor, frames):
    picture, clip = np.full((60, 90, 3), 127, np.uint8), np.zeros((frames, 30, 40, 3), np.uint8)
    blank = "\n" if frames == 2 else " "          # " Frame" is another token than "Frame", so two frames would not tell
    text = [f"look:{blank}<video>\nand <IMG_CONTEXT> then{blank}<video>\n<video> end",
            "<IMG_CONTEXT>\n<IMG_CONTEXT>\nboth pictures", "no picture"]
    inputs = processor(text=text, images=[picture] * 3, videos=[clip] * 3, return_tensors="pt", padding=True)
    model = build("internvl")
    model.config.image_token_id = processor.image_token_id
    found = adapter_for(model).find(inputs, inputs["input_ids"])
    clips = [item for item in found if item.modality == "video"]
    assert [item.layout.frames for item in clips] == [frames] * 3 and [item.row for item in clips] == [0] * 3
    tiles = [sum(item.modality == "image" and item.row == row for item in found) for row in range(3)]
    assert tiles[0] > 1 and tiles[1] == 2 * tiles[0] and tiles[2] == 0
    assert sum(item.layout.tiles for item in found) == len(inputs["pixel_values"])
    told = adapter_for(model).find({**inputs, "num_frames": [frames] * 3}, inputs["input_ids"])
    assert [(a.modality, a.row, a.columns.tolist()) for a in told] == [(b.modality, b.row, b.columns.tolist()) for b in found]
    pictures = adapter_for(model).find({**inputs, "num_frames": []}, inputs["input_ids"])
    assert {item.modality for item in pictures} == {"image"}
    with pytest.raises(ValueError, match=r"no clips of \[7\] frames"):
        adapter_for(model).find({**inputs, "num_frames": [frames] * 3 + [7]}, inputs["input_ids"])
    assert not clips[0].together and all(item.together for item in found if item.modality == "image")


def test_internvl_takes_pictures_with_text_between_for_pictures():
    """Text that differs by more than a number, or has another shape, joins nothing."""
    size, end, nl, start = 2, 90, 91, 95
    tile = [1, 1]
    runs = lambda prompt: [(i, i + 2) for i in range(len(prompt)) if prompt[i:i + 2] == tile]  # noqa: E731
    two = [7, 8, start, *tile, end, nl, start, *tile, end]
    assert len(_clips(two, runs(two), size)) == 2
    words = [92, 5, 93, start, *tile, end, nl, 92, 6, 94, start, *tile, end]                   # the end differs too
    assert len(_clips(words, runs(words), size)) == 2
    film = [92, 81, 93, 94, start, *tile, end, nl, 92, 82, 93, 94, start, *tile, end]
    assert [len(c) for c in _clips(film, runs(film), size)] == [2]
    twice = [*film, nl, *film]                                                                 # 1 2 1 2: two clips
    assert [len(c) for c in _clips(twice, runs(twice), size)] == [2, 2]


def test_qwen_positions_are_the_models_own():
    """Kept tokens stand at the (t, y, x) that the stock model gives them in the full prompt; text behind follows."""
    model = build("qwen2_5_vl")
    rows = [[Film(8, (16, 24)), Picture()], [Film()]]
    inputs = make_inputs(model, rows)
    grids = {k: inputs[k] for k in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")}
    full, deltas = model.model.get_rope_index(inputs["input_ids"], attention_mask=inputs["attention_mask"], **grids)
    pure = mmcompress.compress(model, inputs, video=mmcompress.video.EVS(keep=0.5))
    assert pure["position_ids"].shape[0] == 4 and not {"video_grid_thw", "mm_token_type_ids"} & set(pure)
    with mmcompress.wrap(model, video=mmcompress.video.EVS(keep=0.5)) as w:
        w(**inputs)
        found = w.adapter.find(inputs, inputs["input_ids"])
        for row in range(2):
            stays = inputs["attention_mask"][row].bool().clone()
            for item, kept in zip(found, w.last):
                if item.row == row:
                    stays[item.columns] = False
                    stays[item.columns[kept.index]] = True
            real = pure["attention_mask"][row].bool()
            assert torch.equal(pure["position_ids"][1:, row, real], full[:, row, stays])
            assert torch.equal(pure["position_ids"][0, row, real], torch.arange(int(real.sum())))
    # the text behind row 0's clip begins before the clip's last frames end; that is the model's layout, and not its delta
    mask = inputs["attention_mask"][0]
    follows = int(full[0, 0, int(mask.nonzero()[-1])]) + 1
    assert int(w.prompt.rope_deltas[0]) == follows - int(mask.sum()) and deltas.shape == w.prompt.rope_deltas.shape
