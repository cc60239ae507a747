"""pico for clips: the embedded image model as a LlavaNextVideoForConditionalGeneration, and the weights that differ.

weights/video.safetensors holds differences from the image model, so that both fit into one small package: of every trained
matrix its difference in 8 bits and a scale for each row, of every trained vector its difference in bf16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHTS = Path(__file__).parent / "weights"
VIDEO = WEIGHTS / "video.safetensors"
VIDEO_TOKEN = "<video>"
EMBEDDINGS = "model.language_model.embed_tokens.weight"
TIED = "lm_head.weight"
SCALE = ".scale"
CHAT = ("{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' }}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}{{ '<image>\n' }}{% elif c['type'] == 'video' %}{{ '<video>\n' }}"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ ' ASSISTANT:' }}"
        "{% else %}{% for c in m['content'] %}{{ ' ' + c['text'] + '</s>' }}{% endfor %}{% endif %}{% endfor %}")


def build(trained: bool = True, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
          **options: Any) -> tuple[Any, Any]:
    """-> (LlavaNextVideoForConditionalGeneration in eval mode, LlavaNextVideoProcessor).

    trained   with the differences in weights/video.safetensors; False: the image model's weights, where training starts
    options   go to `from_pretrained`, for example `attn_implementation="eager"`
    """
    from transformers import LlavaNextVideoForConditionalGeneration

    processor, state = _processor(), _image_state()
    if trained:
        state = apply(state, _read())
    loader: Any = LlavaNextVideoForConditionalGeneration
    model = loader.from_pretrained(None, config=_config(), state_dict=state, dtype=dtype, **options)
    return model.to(device).eval(), processor


def _config() -> Any:
    """The image model's configuration with one more token; frames of one tile, pooled 2 x 2 to 36 tokens each."""
    from transformers import LlavaNextConfig, LlavaNextVideoConfig

    image = LlavaNextConfig.from_pretrained(WEIGHTS).to_dict()
    vocabulary = image["text_config"]["vocab_size"]
    image["text_config"]["vocab_size"] = vocabulary + 1
    kept = ("image_token_index", "projector_hidden_act", "vision_feature_select_strategy", "vision_feature_layer",
            "multimodal_projector_bias", "tie_word_embeddings", "image_grid_pinpoints", "vision_config", "text_config")
    return LlavaNextVideoConfig(video_token_index=vocabulary, spatial_pool_mode="average", spatial_pool_stride=2,
                                **{k: image[k] for k in kept})


def _processor() -> Any:
    from transformers import LlavaNextProcessor, LlavaNextVideoProcessor
    from transformers.models.llava_next_video.video_processing_llava_next_video import LlavaNextVideoVideoProcessor

    image = LlavaNextProcessor.from_pretrained(WEIGHTS)
    image.tokenizer.add_special_tokens({"additional_special_tokens": [VIDEO_TOKEN]}, replace_extra_special_tokens=False)
    pictures = image.image_processor
    side = dict(pictures.crop_size)
    video = LlavaNextVideoVideoProcessor(size=side, crop_size=side, image_mean=pictures.image_mean,
                                         image_std=pictures.image_std, do_sample_frames=False)
    return LlavaNextVideoProcessor(
        video, pictures, image.tokenizer, chat_template=CHAT, patch_size=image.patch_size,
        vision_feature_select_strategy=image.vision_feature_select_strategy,
        num_additional_image_tokens=image.num_additional_image_tokens)


def _image_state() -> dict[str, Tensor]:
    """The image model's weights in float32, <video> a copy of <image>: neither is ever read, and neither ever said."""
    from transformers import LlavaNextForConditionalGeneration

    loader: Any = LlavaNextForConditionalGeneration
    model = loader.from_pretrained(WEIGHTS, dtype=torch.float32)
    state, image = dict(model.state_dict()), model.config.image_token_index
    state[EMBEDDINGS] = torch.cat([state[EMBEDDINGS], state[EMBEDDINGS][image:image + 1]])
    state[TIED] = state[EMBEDDINGS]
    return state


def _read() -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not VIDEO.is_file():
        raise FileNotFoundError(f"no weights at {VIDEO}; reinstall mmcompress, or make them: pico/README.md says how")
    return load_file(VIDEO)


def difference(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `apply` needs to turn `before` into `after`, up to a 254th of each row's largest difference.

    Equal tensors are left out. Matrices (R, C) become int8 (R, C) beside float32 scales (R, 1); vectors stay bf16.
    """
    out: dict[str, Tensor] = {}
    for name, old in before.items():
        if name == TIED or torch.equal(old, after[name].float()):
            continue
        change = after[name].float() - old
        if change.ndim < 2:
            out[name] = change.bfloat16()
            continue
        scale = (change.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)    # of a row that is the same: anything but 0
        out[name], out[name + SCALE] = (change / scale).round().to(torch.int8), scale
    return out


def apply(state: dict[str, Tensor], change: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of `state` (float32) with the differences added."""
    out = dict(state)
    for name, delta in change.items():
        if not name.endswith(SCALE):
            scale = change.get(name + SCALE)
            out[name] = state[name] + (delta.float() if scale is None else delta.float() * scale)
    out[TIED] = out[EMBEDDINGS]
    return out


def export(folder: str | Path, path: str | Path = VIDEO) -> int:
    """Write the differences of a trained model from the image model. -> bytes written

    folder    the `model` folder that `mmcompress train configs/pico-clips.yaml` left
    """
    from safetensors.torch import save_file
    from transformers import LlavaNextVideoForConditionalGeneration

    loader: Any = LlavaNextVideoForConditionalGeneration
    trained, path = loader.from_pretrained(str(folder), dtype=torch.float32), Path(path)
    save_file(difference(_image_state(), trained.state_dict()), str(path))
    path.chmod(0o644)                                           # safetensors writes for the owner alone
    return path.stat().st_size
