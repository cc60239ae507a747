"""Tiny random models of the families that hear, and prompts with recordings in the form their processors give."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import transformers
from tiny import EOS, IMAGE, PAD, VOCAB, text
from tiny_video import VIDEO, Film, Picture

from mmcompress.adapters import adapter_for
from mmcompress.pipeline import captures_of
from mmcompress.prompt import Found
from mmcompress.reducing import check_features, reduce_items, reducers_of

AUDIO, BOA, EOA, VISION_START, VISION_END = 89, 88, 87, 96, 97
STATES, BINS = 100, 8                   # a window of 1 s: 200 mel frames, 100 encoder states
FAMILIES = ("qwen2_audio", "voxtral", "audioflamingo3", "qwen2_5_omni_thinker")
_encoder = dict(num_mel_bins=BINS, max_source_positions=STATES)


def _finish(model):
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return model.eval()


def _qwen_words():
    return dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                vocab_size=VOCAB, max_position_embeddings=2048, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
                initializer_range=0.2)


def _qwen2_audio(**options):
    tower = transformers.Qwen2AudioEncoderConfig(d_model=16, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=24,
                                                 **_encoder)
    config = transformers.Qwen2AudioConfig(audio_config=tower, text_config=transformers.Qwen2Config(**_qwen_words()),
                                           audio_token_index=AUDIO)
    return transformers.Qwen2AudioForConditionalGeneration._from_config(config, **options)


def _voxtral(**options):
    tower = transformers.VoxtralEncoderConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
                                              **_encoder)
    config = transformers.VoxtralConfig(audio_config=tower, text_config=text(), audio_token_id=AUDIO)
    return transformers.VoxtralForConditionalGeneration._from_config(config, **options)


def _audioflamingo3(**options):
    tower = transformers.AudioFlamingo3EncoderConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                                                     intermediate_size=24, **_encoder)
    config = transformers.AudioFlamingo3Config(audio_config=tower, text_config=transformers.Qwen2Config(**_qwen_words()),
                                               audio_token_id=AUDIO)
    return transformers.AudioFlamingo3ForConditionalGeneration._from_config(config, **options)


def _qwen2_5_omni_thinker(**options):
    words = {**_qwen_words(), "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    sight = dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, patch_size=4,
                 spatial_merge_size=2, temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1])
    sound = dict(d_model=16, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=24, output_dim=32, n_window=20,
                 **_encoder)
    config = transformers.Qwen2_5OmniThinkerConfig(
        audio_config=sound, vision_config=sight, text_config=words, audio_token_index=AUDIO, image_token_index=IMAGE,
        video_token_index=VIDEO, audio_start_token_id=BOA, audio_end_token_id=EOA)
    config.vision_start_token_id, config.vision_end_token_id = VISION_START, VISION_END
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration._from_config(config, **options)


def whisper(seed=0, states=STATES, targets=64, **options):
    torch.manual_seed(seed)
    config = transformers.WhisperConfig(
        vocab_size=VOCAB, num_mel_bins=BINS, d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=states,
        max_target_positions=targets, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
        decoder_start_token_id=1, init_std=0.2, suppress_tokens=None, begin_suppress_tokens=None)
    model = transformers.WhisperForConditionalGeneration._from_config(config, **options).eval()
    model.generation_config.update(suppress_tokens=None, begin_suppress_tokens=None,
                                   is_multilingual=False, max_length=40, pad_token_id=PAD, eos_token_id=EOS,
                                   decoder_start_token_id=1, forced_decoder_ids=None)
    return model


def build(family, seed=0, **options):
    torch.manual_seed(seed)
    return _finish(globals()[f"_{family}"](**options))


@dataclass(frozen=True)
class Recording:
    frames: int = 160                   # mel frames, 100 a second; more than a window's 200 where a family takes windows


@dataclass(frozen=True)
class FilmWithSound:
    """A clip whose tokens and its sound's stand in turn (Qwen2.5-Omni's `use_audio_in_video`)."""

    film: Film = field(default_factory=lambda: Film(8, (16, 24)))
    recording: Recording = field(default_factory=lambda: Recording(180))


def rows_for(family):
    """Prompts: a recording; two of other lengths; text alone; what else the family reads, or windows."""
    long = Recording(430) if family in ("voxtral", "audioflamingo3") else Recording(99)
    last = [Picture((16, 24)), Recording(120), Film(6, (16, 24))] if family == "qwen2_5_omni_thinker" else [long]
    return [[Recording()], [Recording(77), Recording(160)], [], last]


def mel(frames, g):
    """A log-mel spectrogram of something between a tone and noise. -> (BINS, frames)"""
    steady = torch.randn(BINS, 1, generator=g) + 0.1 * torch.randn(BINS, frames, generator=g)
    noisy = torch.arange(frames) % 50 < 20
    return torch.where(noisy, torch.randn(BINS, frames, generator=g), steady)


def tokens_of(model, frames):
    """Tokens of a recording of this many mel frames."""
    windows = [min(2 * STATES, frames - at) for at in range(0, frames, 2 * STATES)]
    if model.config.model_type == "voxtral":
        return STATES // 4 * len(windows)
    return sum(((n - 1) // 2 + 1 - 2) // 2 + 1 for n in windows)


def make_inputs(model, rows, side="left", seed=0):
    """What the family's processor gives for prompts of these items, with 3..9 words around each."""
    g = torch.Generator().manual_seed(seed)
    kind = model.config.model_type
    words = lambda n: torch.randint(3, 79, (n,), generator=g).tolist()  # noqa: E731
    number = lambda: int(torch.randint(3, 10, (1,), generator=g))  # noqa: E731
    prompts = []
    for row in rows:
        ids = [1, *words(number())]
        for item in row:
            ids += [*_placeholders(model, item), *words(number())]
        prompts.append(ids)
    length = max(map(len, prompts))
    put = lambda p, fill: [*fill, *p] if side == "left" else [*p, *fill]  # noqa: E731
    inputs = {"input_ids": torch.tensor([put(p, [PAD] * (length - len(p))) for p in prompts]),
              "attention_mask": torch.tensor([put([1] * len(p), [0] * (length - len(p))) for p in prompts])}
    items = [item for row in rows for item in row]
    inputs.update(_sight(model, items, g))
    recordings = [getattr(i, "recording", i) for i in items if isinstance(i, (Recording, FilmWithSound))]
    inputs.update(_sound(model, recordings, g))
    if any(isinstance(i, FilmWithSound) for i in items):
        inputs["use_audio_in_video"] = True
    assert kind in FAMILIES
    return inputs


def _placeholders(model, item):
    if isinstance(item, Recording):
        return [BOA, *[AUDIO] * tokens_of(model, item.frames), EOA]
    if isinstance(item, Picture):
        return [VISION_START, *[IMAGE] * (item.size[0] // 8 * (item.size[1] // 8)), VISION_END]
    film = item if isinstance(item, Film) else item.film
    cells, seconds = film.size[0] // 8 * (film.size[1] // 8), _seconds(film)
    if isinstance(item, Film):
        return [VISION_START, *[VIDEO] * (film.frames // 2 * cells), VISION_END]
    sound, ids = tokens_of(model, item.recording.frames), []
    for chunk in range(100):                                                    # 2 s at 25 positions a second
        seen = sum(int(t * seconds * 25) // 50 == chunk for t in range(film.frames // 2))
        ids += [VIDEO] * (seen * cells) + [AUDIO] * len(range(50 * chunk, min(50 * (chunk + 1), sound)))
    return [VISION_START, BOA, *ids, EOA, VISION_END]


def _seconds(film):
    return 1.0 + 0.5 * (film.frames % 4)


def _sight(model, items, g):
    pictures = [i for i in items if isinstance(i, Picture)]
    films = [getattr(i, "film", i) for i in items if isinstance(i, (Film, FilmWithSound))]
    noise = lambda *shape: torch.randn(*shape, generator=g).to(model.dtype)  # noqa: E731
    out = {}
    for name, pixels, grids in (("image", "pixel_values", [(1, p.size[0] // 4, p.size[1] // 4) for p in pictures]),
                                ("video", "pixel_values_videos",
                                 [(f.frames // 2, f.size[0] // 4, f.size[1] // 4) for f in films])):
        if grids:
            out[pixels] = torch.cat([noise(t * h * w, 96) for t, h, w in grids])
            out[f"{name}_grid_thw"] = torch.tensor(grids)
    if films:
        out["video_second_per_grid"] = torch.tensor([_seconds(f) for f in films])
    return out


def _sound(model, recordings, g):
    """`input_features` (windows, BINS, 200) and their mask under the family's name."""
    kind, full = model.config.model_type, 2 * STATES
    windows, lengths = [], []
    for recording in recordings:
        sound = mel(recording.frames, g)
        for part in sound.split(full, dim=1):
            windows.append(torch.nn.functional.pad(part, (0, full - part.shape[1]), value=-1.5))
            lengths.append(part.shape[1])
    if not windows:
        return {}
    mask = (torch.arange(full) < torch.tensor(lengths)[:, None]).long()
    name = {"voxtral": None, "audioflamingo3": "input_features_mask"}.get(kind, "feature_attention_mask")
    return {"input_features": torch.stack(windows).to(model.dtype), **({name: mask} if name else {})}


def row_of(model, inputs, rows, i):
    """Prompt i of a batch alone, without its padding."""
    real = inputs["attention_mask"][i].bool()
    out = {k: inputs[k][i][real][None] for k in ("input_ids", "attention_mask")}
    before, here = [item for row in rows[:i] for item in row], rows[i]
    windows = lambda items: sum(-(-getattr(x, "recording", x).frames // (2 * STATES)) for x in items  # noqa: E731
                                if isinstance(x, (Recording, FilmWithSound)))
    some = slice(windows(before), windows([*before, *here]))
    for name in ("input_features", "feature_attention_mask", "input_features_mask"):
        if name in inputs and some.start < some.stop:
            out[name] = inputs[name][some]
    count = lambda items, *kinds: sum(isinstance(x, kinds) for x in items)  # noqa: E731
    for name, pixels, kinds in (("image", "pixel_values", (Picture,)), ("video", "pixel_values_videos", (Film, FilmWithSound))):
        some = slice(count(before, *kinds), count([*before, *here], *kinds))
        if some.start < some.stop:
            grids = inputs[f"{name}_grid_thw"]
            ends = [0, *grids.prod(1).cumsum(0).tolist()]
            out[pixels], out[f"{name}_grid_thw"] = inputs[pixels][ends[some.start]:ends[some.stop]], grids[some]
            if name == "video":
                out["video_second_per_grid"] = inputs["video_second_per_grid"][some]
    if any(isinstance(x, FilmWithSound) for x in here):
        out["use_audio_in_video"] = True
    return out


@torch.no_grad()
def greedy_reference(model, inputs, config, steps):
    """Greedy decoding of one prompt by hand: no wrap, no prompt surgery, no cache, no generate.

    Every item is reduced alone, its tokens stand among the text's embeddings in the columns they had; positions are those
    columns, or count from 0, or are the model's own of the full prompt. -> token ids (steps,)
    """
    adapter, ids = adapter_for(model), inputs["input_ids"]
    found = adapter.find(inputs, ids)
    encoded = adapter.encode_all(inputs, found, captures_of(config, adapter))
    features = check_features(encoded, found)
    chosen = reducers_of(config, found, features)
    asked = [_question(model, adapter, item, ids) for item in found]
    embeds = model.get_input_embeddings()(ids)[0].clone()
    stays = torch.ones(ids.shape[1], dtype=torch.bool)
    for i, item in enumerate(found):
        number = sum(f.modality == item.modality for f in found[:i])
        alone = {item.modality: _only(encoded[item.modality], number)}
        (tokens, index, _, _), = reduce_items(adapter, alone, [Found(item.modality, 0, item.columns, item.layout)],
                                              [features[i]], [chosen[i]], asked[i])
        stays[item.columns] = False
        stays[item.columns[index]] = True
        embeds[item.columns[index]] = tokens
    columns = stays.nonzero()[:, 0]
    sequence = embeds[columns][None]
    if adapter.mrope:
        frames = inputs.get("feature_attention_mask")
        places = model.model.get_rope_index(
            ids, inputs.get("image_grid_thw"), inputs.get("video_grid_thw"), torch.ones_like(ids),
            bool(inputs.get("use_audio_in_video")), None if frames is None else frames.sum(-1),
            inputs.get("video_second_per_grid"))[0][:, :, columns]
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


def _question(model, adapter, item, ids):
    after = ids[0, int(item.columns[-1]) + 1:]
    words = after[~torch.isin(after, torch.tensor(adapter.placeholders))]
    return model.get_input_embeddings()(words)[None], torch.ones(1, len(words), dtype=torch.bool)


def _only(encoded, number):
    from mmcompress.adapters import Encoded
    mel = None if encoded.mel is None else lambda: [encoded.mel()[number]]
    return Encoded([encoded.features[number]], encoded.vision, mel=mel,
                   reductions=[encoded.reductions[number]] if encoded.reductions else ())
