"""Tiny random models of every family, large enough in temperament that attention matters."""

import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headfold.core.heads import Heads
from headfold.families import family_of
from headfold.families.folded import folded_config
from headfold.families.layout import read_heads, renamed, write_heads
from headfold.families.spec import Site, sites

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 61
LOGIT_SCALE = 1.5
"""Standard deviation of q and k elements: attention logits spread by about its square, far from uniform attention."""

_SMALL = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=72, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
# The norm's epsilon is what keeps a positive scale on K from being exactly free under q/k-norm: make it negligible.
_QK_NORM = dict(head_dim=8, hidden_size=48, rms_norm_eps=1e-20)
_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
_ROUTED = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, shared_expert_intermediate_size=20)
_WINDOW = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"])


def _config(class_name: str, **fields: Any) -> Callable[..., "PreTrainedConfig"]:
    def build(**overrides: Any) -> "PreTrainedConfig":
        import transformers

        return getattr(transformers, class_name)(**(_SMALL | fields | overrides))

    return build


TINY: dict[str, Callable[..., "PreTrainedConfig"]] = {
    "llama": _config("LlamaConfig", head_dim=8, hidden_size=48),
    "llama-bias-gqa": _config("LlamaConfig", num_key_value_heads=4, attention_bias=True, tie_word_embeddings=True),
    "arcee": _config("ArceeConfig", num_key_value_heads=4),
    "mistral": _config("MistralConfig", sliding_window=5, head_dim=10, hidden_size=48),
    "ministral": _config(
        "MinistralConfig", head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "mixtral": _config("MixtralConfig", **_EXPERTS),
    "qwen2": _config("Qwen2Config"),
    "qwen3": _config("Qwen3Config", **_QK_NORM),
    "qwen3-gqa": _config("Qwen3Config", num_key_value_heads=4, attention_bias=True, **_QK_NORM),
    "gemma": _config("GemmaConfig", head_dim=10, hidden_size=48),
    "phi": _config("PhiConfig"),
    "phi3": _config("Phi3Config"),
    "phi3-partial-gqa": _config("Phi3Config", num_key_value_heads=4, partial_rotary_factor=0.75),
    "stablelm": _config("StableLmConfig", use_qkv_bias=True),
    "olmo": _config("OlmoConfig"),
    "olmo2": _config("Olmo2Config", rms_norm_eps=1e-20),
    "olmo3": _config("Olmo3Config", rms_norm_eps=1e-20, **_WINDOW),
    "olmoe": _config("OlmoeConfig", rms_norm_eps=1e-20, num_experts=4, num_experts_per_tok=2),
    "starcoder2": _config("Starcoder2Config"),
    "cohere": _config("CohereConfig", head_dim=10, attention_bias=True, logit_scale=1.0),
    "granite": _config("GraniteConfig", attention_multiplier=0.3, logits_scaling=2.0),
    "granitemoe": _config("GraniteMoeConfig", attention_multiplier=0.3, **_EXPERTS),
    "granitemoeshared": _config(
        "GraniteMoeSharedConfig", attention_multiplier=0.3, shared_intermediate_size=20, **_EXPERTS
    ),
    "qwen2_moe": _config("Qwen2MoeConfig", **_ROUTED),
    "qwen3_moe": _config("Qwen3MoeConfig", **_ROUTED, **_QK_NORM),
    "gemma2": _config("Gemma2Config", head_dim=10, hidden_size=48, query_pre_attn_scalar=9, **_WINDOW),
    "gemma3_text": _config("Gemma3TextConfig", query_pre_attn_scalar=9, **_WINDOW, **_QK_NORM),
    "glm": _config("GlmConfig", head_dim=12, hidden_size=48, attention_bias=True),
    "glm4": _config("Glm4Config", head_dim=12, hidden_size=48),
    "gpt_oss": _config("GptOssConfig", head_dim=8, hidden_size=48, **_WINDOW, **_EXPERTS),
    "smollm3": _config("SmolLM3Config", no_rope_layers=[1, 0]),
    "nemotron": _config("NemotronConfig", head_dim=12, hidden_size=48),
    "seed_oss": _config("SeedOssConfig", head_dim=8, hidden_size=48),
    "exaone4": _config("Exaone4Config", **_WINDOW, **_QK_NORM),
    "ernie4_5": _config("Ernie4_5Config", head_dim=10, hidden_size=48, use_bias=True, tie_word_embeddings=True),
    "helium": _config("HeliumConfig", head_dim=8),
    "cohere2": _config("Cohere2Config", head_dim=10, hidden_size=48, logit_scale=1.0, **_WINDOW),
}
"""Config builder by name; keyword arguments override fields. `num_key_value_heads=2` makes any of them a GQA model."""

FLOAT32_NORMS = frozenset(TINY) - {"phi", "stablelm", "starcoder2"}
"""Models whose stock forward computes norms (Cohere: RoPE too) in float32 whatever the dtype of the weights."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """A model whose stock class does not read a count of K/V heads, and what it takes."""

    model_class: str
    kind: str
    fields: dict[str, Any] = field(default_factory=dict)

    def config(self, **overrides: Any) -> "PreTrainedConfig":
        import transformers

        return getattr(transformers, self.model_class).config_class(**(self.fields | overrides))


_TOKENS = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_TEXT = dict(_TOKENS, hidden_size=40, num_hidden_layers=2, num_attention_heads=8, max_position_embeddings=32)
_ENCODER = dict(_TEXT, intermediate_size=44)
_ROTARY = dict(_TEXT, hidden_size=48, intermediate_size=44)
_VISION = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=28, image_size=12, patch_size=4
)
_T5 = dict(_TOKENS, d_model=24, d_kv=5, num_heads=8, d_ff=28, num_layers=2, decoder_start_token_id=0,
    relative_attention_num_buckets=8, relative_attention_max_distance=10)  # fmt: skip
_BART = dict(_TOKENS, d_model=24, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=8,
    encoder_ffn_dim=28, decoder_ffn_dim=28, max_position_embeddings=32, decoder_start_token_id=2, forced_eos_token_id=None)  # fmt: skip
_CLIP_TEXT = dict(_ENCODER, hidden_size=24, num_attention_heads=8, projection_dim=12)
_CLIP_VISION = dict(_VISION, projection_dim=12)

_SOUND = dict(_ENCODER, conv_dim=[6, 6], conv_kernel=[10, 4], conv_stride=[5, 4], num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2)  # fmt: skip
_MOONSHINE = dict(_TOKENS, hidden_size=40, intermediate_size=44, encoder_num_hidden_layers=1, decoder_num_hidden_layers=2,
    encoder_num_attention_heads=4, decoder_num_attention_heads=4, partial_rotary_factor=0.8, decoder_start_token_id=1)  # fmt: skip

FOREIGN: dict[str, Foreign] = {
    "t5": Foreign("T5ForConditionalGeneration", "pairs", _T5),
    "mt5": Foreign("MT5ForConditionalGeneration", "pairs", _T5 | dict(num_layers=1, num_decoder_layers=3)),
    "umt5": Foreign("UMT5ForConditionalGeneration", "pairs", _T5),
    "bart": Foreign("BartForConditionalGeneration", "pairs", _BART),
    "mbart": Foreign("MBartForConditionalGeneration", "pairs", _BART),
    "marian": Foreign("MarianMTModel", "pairs", _BART),
    "m2m_100": Foreign("M2M100ForConditionalGeneration", "pairs", _BART),
    "moonshine": Foreign("MoonshineForConditionalGeneration", "speech", _MOONSHINE),
    "whisper": Foreign("WhisperForConditionalGeneration", "audio", _BART | dict(num_mel_bins=6, max_source_positions=11,
        max_target_positions=32, suppress_tokens=None, begin_suppress_tokens=None)),
    "bert": Foreign("BertForMaskedLM", "sentences", _ENCODER),
    "roberta": Foreign("RobertaForMaskedLM", "sentences", _ENCODER),
    "xlm-roberta": Foreign("XLMRobertaModel", "sentences", _ENCODER),
    "camembert": Foreign("CamembertForSequenceClassification", "sentences", _ENCODER),
    "electra": Foreign("ElectraForPreTraining", "sentences", _ENCODER | dict(embedding_size=20)),
    "mpnet": Foreign("MPNetForMaskedLM", "sentences", _ENCODER | dict(relative_attention_num_buckets=32)),
    "modernbert": Foreign("ModernBertForMaskedLM", "sentences", _ROTARY | dict(
        local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2)),
    "eurobert": Foreign("EuroBertForMaskedLM", "sentences", _ROTARY),
    "esm": Foreign("EsmForMaskedLM", "sentences", _ROTARY | dict(position_embedding_type="rotary", mask_token_id=3)),
    "esm-absolute": Foreign("EsmForMaskedLM", "sentences", _ENCODER | dict(position_embedding_type="absolute", mask_token_id=3)),
    "albert": Foreign("AlbertForMaskedLM", "sentences", _ENCODER | dict(embedding_size=20, num_hidden_layers=3)),
    "distilbert": Foreign("DistilBertForMaskedLM", "sentences",
        dict(_TOKENS, dim=40, n_layers=2, n_heads=8, hidden_dim=44, max_position_embeddings=32)),
    "vit": Foreign("ViTForImageClassification", "images", _VISION | dict(num_labels=5)),
    "deit": Foreign("DeiTForImageClassification", "images", _VISION | dict(num_labels=5)),
    "dinov2": Foreign("Dinov2ForImageClassification", "images", _VISION | dict(num_labels=5)),
    "dinov2_with_registers": Foreign("Dinov2WithRegistersModel", "images", _VISION),
    "dinov3_vit": Foreign("DINOv3ViTModel", "images", _VISION | dict(hidden_size=48, num_register_tokens=2)),
    "siglip": Foreign("SiglipModel", "both", dict(text_config=_CLIP_TEXT, vision_config=_VISION)),
    "siglip_text_model": Foreign("SiglipTextModel", "sentences", _CLIP_TEXT),
    "siglip_vision_model": Foreign("SiglipVisionModel", "images", _VISION),
    "wav2vec2": Foreign("Wav2Vec2ForCTC", "sound", _SOUND),
    "hubert": Foreign("HubertModel", "sound", _SOUND | dict(do_stable_layer_norm=True)),
    "clip": Foreign("CLIPModel", "both", dict(text_config=_CLIP_TEXT, vision_config=_CLIP_VISION, projection_dim=12)),
    "clip_text_model": Foreign("CLIPTextModelWithProjection", "sentences", _CLIP_TEXT),
    "clip_vision_model": Foreign("CLIPVisionModel", "images", _CLIP_VISION),
    "opt": Foreign("OPTForCausalLM", "text", dict(_TEXT, ffn_dim=44, word_embed_proj_dim=20)),
    "gpt2": Foreign("GPT2LMHeadModel", "text", _TEXT),
    "gpt_neo": Foreign("GPTNeoForCausalLM", "text", dict(_TOKENS, hidden_size=40, num_layers=2, num_heads=8,
        attention_types=[[["global", "local"], 1]], window_size=4, intermediate_size=44, max_position_embeddings=32)),
    "gpt_neox": Foreign("GPTNeoXForCausalLM", "text", dict(_ROTARY, rotary_pct=0.7)),
    "gptj": Foreign("GPTJForCausalLM", "text", dict(_TEXT, hidden_size=48, rotary_dim=4)),
    "codegen": Foreign("CodeGenForCausalLM", "text", dict(_TEXT, hidden_size=48, rotary_dim=4)),
    "xglm": Foreign("XGLMForCausalLM", "text", dict(_TOKENS, d_model=40, num_layers=2, attention_heads=8, ffn_dim=44,
        max_position_embeddings=32)),
    "biogpt": Foreign("BioGptForCausalLM", "text", _ENCODER),
    "bloom": Foreign("BloomForCausalLM", "text", _TEXT),
    "falcon-rw": Foreign("FalconForCausalLM", "text", dict(_ROTARY, alibi=True, multi_query=False, parallel_attn=False, bias=True)),
    "falcon-rotary": Foreign("FalconForCausalLM", "text", dict(_ROTARY, multi_query=False)),
    "falcon-multi-query": Foreign("FalconForCausalLM", "text", _ROTARY),
    "falcon-new": Foreign("FalconForCausalLM", "text", dict(_ROTARY, num_kv_heads=4, new_decoder_architecture=True)),
    "mpt": Foreign("MptForCausalLM", "text", dict(_TOKENS, d_model=40, n_heads=8, n_layers=2, max_seq_len=32, no_bias=True)),
}  # fmt: skip
"""By name, each of a `model_type` of its own or a layout of its own."""


ALIKE = frozenset({
    "biogpt", "camembert", "clip_text_model", "clip_vision_model", "deit", "dinov2_with_registers", "electra", "esm-absolute", "eurobert",
    "hubert", "m2m_100", "marian", "mbart", "mt5", "roberta", "siglip", "siglip_text_model", "siglip_vision_model", "xlm-roberta",
})  # fmt: skip
"""Models whose attention is computed as another's here is. The laws of `test_foreign.py` hold for them, and what follows from those is
not tried again."""
DISTINCT = {name: foreign for name, foreign in FOREIGN.items() if name not in ALIKE}


def randomise(model: "PreTrainedModel", seed: int) -> None:
    """Draw every parameter anew, in float64: fan-in scaled matrices, biases of 0.3, norm gains around the old one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        parameter.data.copy_(_drawn(name, parameter.data, noise))


_LOOKED_UP = re.compile(
    r"embed_tokens|\bshared|word_embeddings|token_embedding|\bwte|embed_in|relative_attention_bias|sinks"
)
"""Embeddings and what else no matrix product averages."""
_ASKS = re.compile(r"q_proj|k_proj|qkv|c_attn|query|key|[qk]_lin", re.IGNORECASE)


def _drawn(name: str, old: Tensor, noise: Tensor) -> Tensor:
    if _LOOKED_UP.search(name):
        return noise
    if name.endswith("bias"):
        return 0.3 * noise
    if old.ndim < 2:
        return old + 0.3 * noise.clamp(-2, 2)
    scale = LOGIT_SCALE if _ASKS.search(name) else 1.0
    return noise * scale / old.shape[-1] ** 0.5


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="headfold-tiny-")


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


@functools.cache
def tiny_checkpoint(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any) -> Path:
    """Directory of a tiny random model, made once per session: the same weights, rounded, in every dtype. Read only."""
    config = FOREIGN[name].config(**overrides) if name in FOREIGN else TINY[name](**overrides)
    make = (
        _class(FOREIGN[name].model_class)._from_config
        if name in FOREIGN
        else _class("AutoModelForCausalLM").from_config
    )
    model = make(config, dtype=dtype)
    randomise(model, seed)
    marks = [
        name,
        str(dtype).removeprefix("torch."),
        str(seed),
        *(f"{key}-{value}" for key, value in sorted(overrides.items())),
    ]
    directory = Path(_root().name) / "_".join(marks)
    model.save_pretrained(directory)
    return directory


def readable_checkpoint(directory: Path, tokenizer: Any, name: str = "llama") -> Path:
    """A tiny float32 model in `directory` with a tokenizer, so that it can be calibrated on text of its own."""
    shutil.copytree(tiny_checkpoint(name, torch.float32, vocab_size=len(tokenizer)), directory)
    tokenizer.save_pretrained(directory)
    return directory


def stock_model(directory: Path, dtype: torch.dtype = torch.float64) -> "PreTrainedModel":
    """The checkpoint as plain transformers loads it."""
    config = json.loads((directory / "config.json").read_text())
    # The grouped matmul that transformers picks for experts has no float64.
    model, info = _class(config["architectures"][0]).from_pretrained(
        directory, dtype=dtype, experts_implementation="eager", output_loading_info=True
    )
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def tiny_tokens(num_sequences: int = 2, length: int = 16, seed: int = 0) -> Tensor:
    """Random token ids, none of them special: long against the sliding windows above."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (num_sequences, length), generator=generator)


@torch.inference_mode()
def stock_logits(directory: Path, tokens: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits (sequence, position, vocabulary) of plain transformers."""
    return stock_model(directory, dtype)(tiny_tokens() if tokens is None else tokens).logits


def tiny_sample(name: str, num_items: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a model by its name, some of them padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    kind = FOREIGN[name].kind if name in FOREIGN else "text"
    text = {"input_ids": tiny_tokens(num_items, 11, seed)}
    mask = torch.ones(num_items, 11, dtype=torch.long)
    mask[1::2, 8:] = 0
    labels = tiny_tokens(num_items, 9, seed + 1000)
    labels[::2, 7:] = -100

    def floats(*shape: int) -> Tensor:
        return torch.randn(num_items, *shape, dtype=torch.float64, generator=generator)

    return {
        "text": lambda: text,
        "sentences": lambda: text | {"attention_mask": mask},
        "pairs": lambda: text | {"attention_mask": mask, "labels": labels},
        "audio": lambda: {"input_features": floats(6, 22), "labels": labels},
        "speech": lambda: {"input_values": floats(2400), "attention_mask": _part_of(num_items, 2400), "labels": labels},
        "sound": lambda: {"input_values": floats(200)},
        "images": lambda: {"pixel_values": floats(3, 12, 12)},
        "both": lambda: text | {"attention_mask": mask, "pixel_values": floats(3, 12, 12)},
    }[kind]()


def _part_of(num_items: int, length: int) -> Tensor:
    """A mask in which every second item has two thirds of the length."""
    mask = torch.ones(num_items, length, dtype=torch.long)
    mask[1::2, 2 * length // 3 :] = 0
    return mask


@torch.inference_mode()
def answer_of(model: "PreTrainedModel", sample: dict[str, Tensor]) -> Tensor:
    """What a model says: logits or, without a head, embeddings or hidden states; without the paddings."""
    said = model(**sample)
    if "image_embeds" in said and "text_embeds" in said:
        return torch.cat([said.text_embeds, said.image_embeds])
    answer = next(said[name] for name in ("logits", "text_embeds", "last_hidden_state") if name in said)
    counted = sample["labels"] != -100 if "labels" in sample else sample.get("attention_mask")
    return answer[counted.bool()] if counted is not None and answer.ndim == 3 else answer


def tiny_sites(directory: Path) -> list[tuple[Site, Heads]]:
    """Every attention site of a one-file checkpoint with its heads."""
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    return [(site, read_heads(site, tensors.__getitem__)) for site in sites(family_of(config), config, tensors)]


def rewritten(
    source: Path,
    target: Path,
    change: Callable[[Heads, int], Heads],
    found: list[tuple[Site, Heads]] | None = None,
) -> Path:
    """`source` written to `target` with the heads of its i-th site replaced by `change(heads, i)`, dtype kept; `found` are other sites."""
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    old, counts = found or tiny_sites(source), {}
    for index, (site, heads) in enumerate(old):
        new = change(heads, index)
        if site.stock_gqa or new.num_kv_heads != heads.num_kv_heads:
            counts[site.name] = new.num_kv_heads
        for gone in renamed(site, new.num_kv_heads):
            del tensors[gone]
        tensors |= write_heads(site, new.to(heads.q.dtype))
    config = folded_config(family_of(config), config, [site for site, _ in old], counts)
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
