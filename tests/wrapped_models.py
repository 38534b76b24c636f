"""Tiny random wrappers of every kind: a decoder that folds, behind a tower that does not."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tiny import VOCABULARY, _root, randomise, tiny_tokens
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEEN = VOCABULARY - 1
"""The token in whose place a patch of an image, or a frame of sound, is put."""
_TEXT: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_WINDOW = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"])
_LLAMA = dict(_TEXT, model_type="llama", head_dim=8)
_MISTRAL = dict(_TEXT, model_type="mistral", head_dim=8, sliding_window=None)
_QWEN2 = dict(_TEXT, model_type="qwen2", hidden_size=64)
_GEMMA = dict(_TEXT, model_type="gemma", head_dim=10)
_GEMMA3 = dict(_TEXT, model_type="gemma3_text", head_dim=8, query_pre_attn_scalar=9, rms_norm_eps=1e-20, **_WINDOW)
_COHERE2 = dict(_TEXT, model_type="cohere2", head_dim=10, logit_scale=1.0, **_WINDOW)
_MROPE = dict(_TEXT, hidden_size=64, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}, rope_theta=1e4)
_PATCHES: dict[str, Any] = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=28, image_size=12, patch_size=4
)
_CLIP = dict(_PATCHES, model_type="clip_vision_model", projection_dim=12)
_SIGLIP = dict(_PATCHES, model_type="siglip_vision_model", vision_use_head=False)
_PERCEIVER = dict(hidden_size=48, resampler_n_latents=2, resampler_depth=1, resampler_n_heads=4, resampler_head_dim=8)
_GRID = dict(patch_size=4, spatial_merge_size=2, temporal_patch_size=2, in_channels=3)
_QWEN2_VL = dict(_GRID, depth=1, embed_dim=16, hidden_size=64, num_heads=2, mlp_ratio=2)
_QWEN2_5_VL = dict(
    _GRID, depth=2, hidden_size=16, out_hidden_size=64, num_heads=2, intermediate_size=20, fullatt_block_indexes=[1]
)
_SOUND = dict(num_mel_bins=6, max_source_positions=8)
_QWEN2_AUDIO = dict(
    _SOUND,
    d_model=16,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=20,
    model_type="qwen2_audio_encoder",
)
_VOXTRAL = dict(_SOUND, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, head_dim=8)


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A wrapper by its class, the config of its language model and other fields, and the sizes of what it sees."""

    model_class: str
    text: dict[str, Any]
    fields: dict[str, Any]
    seen: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Inputs beside the text of one item, by the shape of the noise that they are."""
    seen_tokens: int = 0
    grid: tuple[int, ...] = ()

    def config(self, **overrides: Any) -> Any:
        import transformers

        return getattr(transformers, self.model_class).config_class(text_config=self.text | overrides, **self.fields)


def _vision(config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return dict(vision_config=config, image_token_index=SEEN, **fields)


_IMAGE = {"pixel_values": (1, 3, 12, 12)}
WRAPPED: dict[str, Wrapped] = {
    "aya_vision": Wrapped("AyaVisionForConditionalGeneration", _COHERE2, _vision(_SIGLIP)),
    "gemma3": Wrapped("Gemma3ForConditionalGeneration", _GEMMA3, _vision(_SIGLIP, mm_tokens_per_image=1), _IMAGE, 1),
    "idefics2": Wrapped(
        "Idefics2ForConditionalGeneration",
        _MISTRAL,
        dict(vision_config=_PATCHES, perceiver_config=_PERCEIVER, image_token_id=SEEN),
    ),
    "idefics3": Wrapped("Idefics3ForConditionalGeneration", _LLAMA, dict(vision_config=_PATCHES, image_token_id=SEEN)),
    "internvl": Wrapped(
        "InternVLForConditionalGeneration",
        _QWEN2,
        dict(
            vision_config=dict(_PATCHES, model_type="internvl_vision", image_size=[16, 16], patch_size=[4, 4]),
            image_token_id=SEEN,
        ),
        {"pixel_values": (1, 3, 16, 16)},
        4,
    ),
    "llava": Wrapped("LlavaForConditionalGeneration", _LLAMA, _vision(_CLIP), _IMAGE, 9),
    "llava_next": Wrapped("LlavaNextForConditionalGeneration", _LLAMA, _vision(_CLIP)),
    "llava_next_video": Wrapped("LlavaNextVideoForConditionalGeneration", _LLAMA, _vision(_CLIP)),
    "llava_onevision": Wrapped("LlavaOnevisionForConditionalGeneration", _QWEN2, _vision(_SIGLIP)),
    "mistral3": Wrapped(
        "Mistral3ForConditionalGeneration",
        _MISTRAL,
        _vision(dict(_PATCHES, model_type="pixtral", hidden_size=32), spatial_merge_size=1),
        _IMAGE,
        9,
    ),
    "paligemma": Wrapped(
        "PaliGemmaForConditionalGeneration", _GEMMA, _vision(_SIGLIP, projection_dim=48, hidden_size=48)
    ),
    "qwen2_5_vl": Wrapped(
        "Qwen2_5_VLForConditionalGeneration",
        _MROPE,
        dict(vision_config=_QWEN2_5_VL, image_token_id=SEEN),
        {"pixel_values": (16, 96)},
        4,
        (1, 4, 4),
    ),
    "qwen2_audio": Wrapped(
        "Qwen2AudioForConditionalGeneration",
        _QWEN2,
        dict(audio_config=_QWEN2_AUDIO, audio_token_index=SEEN),
        {"input_features": (1, 6, 16)},
        4,
    ),
    "qwen2_vl": Wrapped(
        "Qwen2VLForConditionalGeneration",
        _MROPE,
        dict(vision_config=_QWEN2_VL, image_token_id=SEEN),
        {"pixel_values": (16, 96)},
        4,
        (1, 4, 4),
    ),
    "smolvlm": Wrapped(
        "SmolVLMForConditionalGeneration",
        _LLAMA,
        dict(vision_config=_PATCHES, image_token_id=SEEN, scale_factor=3),
        {"pixel_values": (1, 1, 3, 12, 12)},
        1,
    ),
    "vipllava": Wrapped("VipLlavaForConditionalGeneration", _LLAMA, _vision(_CLIP)),
    "voxtral": Wrapped(
        "VoxtralForConditionalGeneration",
        _LLAMA,
        dict(audio_config=_VOXTRAL, audio_token_id=SEEN),
        {"input_features": (1, 6, 16)},
        2,
    ),
}


@functools.cache
def wrapped_checkpoint(name: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Path:
    """Directory of a tiny random wrapper, made once per session; `overrides` are fields of its language model. Read only."""
    import transformers

    model = getattr(transformers, WRAPPED[name].model_class)._from_config(
        WRAPPED[name].config(**overrides), dtype=dtype
    )
    randomise(model, 0)
    marks = ["wrapped", name, str(dtype), *(f"{key}-{value}" for key, value in sorted(overrides.items()))]
    directory = Path(_root().name) / "_".join(marks)
    model.save_pretrained(directory)
    return directory


def seen_sample(name: str) -> dict[str, Tensor]:
    """One text with an image or sound in it."""
    kind = WRAPPED[name]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.cat([torch.full((1, kind.seen_tokens), SEEN), tiny_tokens(1, 9) % SEEN], 1)
    seen = {part: torch.randn(shape, dtype=torch.float64, generator=generator) for part, shape in kind.seen.items()}
    grid = (
        {"image_grid_thw": torch.tensor([kind.grid]), "mm_token_type_ids": (tokens == SEEN).long()} if kind.grid else {}
    )
    beside = {
        "qwen2_audio": {"feature_attention_mask": torch.ones(1, 16)},
        "mistral3": {"image_sizes": torch.tensor([[12, 12]])},
    }
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **seen, **grid, **beside.get(name, {})}


@torch.inference_mode()
def logits_of(model: "PreTrainedModel", sample: dict[str, Tensor]) -> Tensor:
    """The logits of a wrapper."""
    return model(**sample).logits
