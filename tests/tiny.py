"""Tiny random models of every family, large enough in temperament that attention matters."""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headfold.core.heads import Heads
from headfold.families import family_of
from headfold.families.layout import read_heads, renamed, write_heads
from headfold.families.spec import Site, folded_config, sites

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
    "starcoder2": _config("Starcoder2Config"),
    "cohere": _config("CohereConfig", head_dim=10, attention_bias=True, logit_scale=1.0),
    "granite": _config("GraniteConfig", attention_multiplier=0.3, logits_scaling=2.0),
    "granitemoe": _config("GraniteMoeConfig", attention_multiplier=0.3, **_EXPERTS),
}
"""Config builder by name; keyword arguments override fields. `num_key_value_heads=2` makes any of them a GQA model."""

FLOAT32_NORMS = frozenset(TINY) - {"phi", "stablelm", "starcoder2"}
"""Models whose stock forward computes norms (Cohere: RoPE too) in float32 whatever the dtype of the weights."""


def randomise(model: "PreTrainedModel", seed: int) -> None:
    """Draw every parameter anew, in float64: fan-in scaled matrices, biases of 0.3, norm gains around the old one."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings().weight
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        parameter.data.copy_(noise if parameter is embeddings else _drawn(name, parameter.data, noise))


def _drawn(name: str, old: Tensor, noise: Tensor) -> Tensor:
    if name.endswith("bias"):
        return 0.3 * noise
    if old.ndim == 1:
        return old + 0.3 * noise.clamp(-2, 2)
    scale = LOGIT_SCALE if any(role in name for role in ("q_proj", "k_proj", "qkv_proj")) else 1.0
    return noise * scale / old.shape[-1] ** 0.5


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="headfold-tiny-")


@functools.cache
def tiny_checkpoint(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any) -> Path:
    """Directory of a tiny random model, made once per session: the same weights, rounded, in every dtype. Read only."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(TINY[name](**overrides), dtype=dtype)
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


def stock_model(directory: Path, dtype: torch.dtype = torch.float64) -> "PreTrainedModel":
    """The checkpoint as plain transformers loads it."""
    from transformers import AutoModelForCausalLM

    # The grouped matmul that transformers picks for experts has no float64.
    model, info = AutoModelForCausalLM.from_pretrained(
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


def tiny_sites(directory: Path) -> list[tuple[Site, Heads]]:
    """Every attention site of a one-file checkpoint with its heads."""
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    return [(site, read_heads(site, tensors.__getitem__)) for site in sites(family_of(config), config, tensors)]


def rewritten(source: Path, target: Path, change: Callable[[Heads, int], Heads]) -> Path:
    """`source` written to `target` with the heads of its i-th site replaced by `change(heads, i)`, dtype kept."""
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    old, counts = tiny_sites(source), {}
    for index, (site, heads) in enumerate(old):
        new = change(heads, index)
        counts[site.name] = new.num_groups
        for gone in renamed(site, new.num_groups):
            del tensors[gone]
        tensors |= write_heads(site, new.to(heads.q.dtype))
    config = folded_config(family_of(config), config, [site for site, _ in old], counts)
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
