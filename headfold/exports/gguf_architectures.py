"""What llama.cpp's architectures compute, as far as it decides whether a fold can be written for one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .folded import Folded


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture of llama.cpp and what it needs of a model."""

    name: str
    epsilon: str | float
    """The config field with the epsilon of norms, or the number."""
    activations: tuple[str, ...]
    layer_norm: bool = False
    """Whether norms are LayerNorms, not RMSNorms."""
    per_layer: str = ""
    """The architecture with numbers of heads per layer that computes the same; empty where there is none."""
    pairs: bool = False
    """Whether rotary planes are neighbouring dims, which Q and K are reordered for, not the two halves of a head."""
    tables: tuple[str, ...] = ()
    """The tensors that factors of rotary frequencies are read from."""
    any_head_dim: bool = True
    """Whether heads times head_dim may differ from the hidden size."""
    partial_rotary: bool = False
    """Whether a share of each head may be rotated; the classes of the others ignore such a share."""
    ties: bool = True
    """Whether the output embedding is left out where it is the input's."""
    gain_offset: float = 0.0
    """What is added to the gains of norms."""
    activation: str = "hidden_act"
    """The config field of the activation; a class without it has the first of `activations`."""
    transposed: tuple[str, ...] = ()
    """Last parts of the names of linears that are (in, out) on disk."""
    encodes: bool = False
    """Whether it has no output embedding, and every token attends to all."""
    left_out: tuple[str, ...] = ()
    """How the names of tensors begin that it does not read."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Config fields that must not be set, with the reason."""
    needed: Mapping[str, str] = field(default_factory=dict)
    """Config fields that must not be false, with the reason."""
    scales: Mapping[str, str] = field(default_factory=dict)
    """Config fields of factors, with the method of `gguf.GGUFWriter` that writes each."""


_LLAMA = Architecture("llama", "rms_norm_eps", ("silu",), per_layer="deci", pairs=True, tables=("rope_freqs",))
_GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_BIASES = "needs biases"
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": Architecture("qwen3", "rms_norm_eps", ("silu",), refused={"attention_bias": "has no biases of attention"}),
    "gemma": Architecture(
        "gemma",
        "rms_norm_eps",
        ("gelu_pytorch_tanh",),
        gain_offset=1.0,
        refused={"attention_bias": "has no biases", "use_bidirectional_attention": "attends to the past alone"},
    ),
    "phi": Architecture(
        "phi2",
        "layer_norm_eps",
        ("gelu_new", "gelu"),
        layer_norm=True,
        any_head_dim=False,
        partial_rotary=True,
        ties=False,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        "norm_epsilon",
        ("gelu_pytorch_tanh",),
        layer_norm=True,
        any_head_dim=False,
        needed={"use_bias": _BIASES},
    ),
    "granite": Architecture(
        "granite",
        "rms_norm_eps",
        ("silu",),
        pairs=True,
        tables=("rope_freqs",),
        scales={
            "attention_multiplier": "add_attention_scale",
            "embedding_multiplier": "add_embedding_scale",
            "residual_multiplier": "add_residual_scale",
            "logits_scaling": "add_logit_scale",
        },
    ),
    "olmo": Architecture("olmo", 1e-5, ("silu",), layer_norm=True, pairs=True, any_head_dim=False),
    "cohere": Architecture(
        "command-r",
        "layer_norm_eps",
        ("silu",),
        layer_norm=True,
        any_head_dim=False,
        scales={"logit_scale": "add_logit_scale"},
        refused={"use_qk_norm": "has norms of Q and K in larger models only", "attention_bias": "has no biases"},
    ),
    "nemotron": Architecture(
        "nemotron",
        "norm_eps",
        ("relu2",),
        layer_norm=True,
        any_head_dim=False,
        partial_rotary=True,
        ties=False,
        gain_offset=1.0,
    ),
    "stablelm": Architecture(
        "stablelm",
        "layer_norm_eps",
        ("silu",),
        layer_norm=True,
        any_head_dim=False,
        partial_rotary=True,
        ties=False,
    ),
    "phi3": Architecture(
        "phi3",
        "rms_norm_eps",
        ("silu",),
        tables=("rope_factors_long", "rope_factors_short"),
        any_head_dim=False,
        partial_rotary=True,
    ),
    "gpt_neox": Architecture(
        "gptneox",
        "layer_norm_eps",
        _GELU,
        layer_norm=True,
        any_head_dim=False,
        partial_rotary=True,
        ties=False,
        needed={"attention_bias": _BIASES},
    ),
    "gpt2": Architecture(
        "gpt2",
        "layer_norm_epsilon",
        _GELU,
        activation="activation_function",
        layer_norm=True,
        any_head_dim=False,
        transposed=("c_attn", "c_proj", "c_fc"),
        refused={"scale_attn_by_inverse_layer_idx": "has one scale of attention for all layers"},
        needed={"scale_attn_weights": "divides attention scores by the square root of head_dim"},
    ),
    "bloom": Architecture(
        "bloom",
        "layer_norm_epsilon",
        ("gelu_new",),
        layer_norm=True,
        any_head_dim=False,
        refused={"apply_residual_connection_post_layernorm": "adds the residual before its norm"},
    ),
    "bert": Architecture(
        "bert",
        "layer_norm_eps",
        _GELU,
        layer_norm=True,
        any_head_dim=False,
        encodes=True,
        left_out=("pooler.", "cls."),
        refused={"is_decoder": "attends to the text after a token too"},
    ),
}
"""`model_type` → the architecture that computes it."""


APPROXIMATED = {"gelu": "GELU is computed by tanh"}
"""Activations that llama.cpp computes nearly."""


def architecture_why_not(source: Folded, stock: Any) -> str | None:
    """Return why the architecture of a model type does not compute what a fold computes."""
    found = ARCHITECTURES[source.model_type]
    if found.encodes and source.config["architectures"][0].endswith("LMHeadModel"):
        return f"llama.cpp's {found.name} has no head over words; export a BertModel or a BertForMaskedLM"
    if short_window(stock) is not None:
        return f"llama.cpp runs {source.model_type} without its sliding window; use vLLM or transformers"
    used = activation(found, stock)
    if used not in found.activations:
        return f"llama.cpp's {found.name} has the activation {found.activations[0]} only, got {used}"
    for name, reason in found.refused.items():
        if getattr(stock, name, None):
            return f"llama.cpp's {found.name} {reason}, got {name}"
    for name in found.scales:
        if not getattr(stock, name):
            return f"llama.cpp's {found.name} takes {name} of 0 for 1; fold a model that has another"
    for name, reason in found.needed.items():
        if getattr(stock, name) is False:
            return f"llama.cpp's {found.name} {reason}, got {name} false"
    rotary = _rotary_why_not(found, stock.rope_parameters) if source.family.position else None
    return rotary or _heads_why_not(found, source, stock)


def activation(found: Architecture, stock: Any) -> str:
    """Return the activation of a model."""
    return str(getattr(stock, found.activation, found.activations[0]))


def short_window(stock: Any) -> int | None:
    """Return the sliding window that some layer has, None where no window is shorter than the model's context."""
    window = getattr(stock, "sliding_window", None)
    is_on = getattr(stock, "use_sliding_window", True) or "sliding_attention" in (
        getattr(stock, "layer_types", None) or ()
    )
    return window if window is not None and is_on and window < stock.max_position_embeddings else None


def _rotary_why_not(found: Architecture, rope: Mapping[str, Any]) -> str | None:
    if rope["rope_type"] == "dynamic" or rope.get("short_factor") != rope.get("long_factor"):
        return f"expected rotary frequencies that do not depend on the length, got {rope['rope_type']}"
    if rope["rope_type"] != "default" and not found.tables:
        return f"llama.cpp's {found.name} reads no factors of rotary frequencies, got {rope['rope_type']}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and not found.partial_rotary:
        return f"expected heads that are rotated as a whole, got partial_rotary_factor {rope['partial_rotary_factor']}"
    return None


def _heads_why_not(found: Architecture, source: Folded, stock: Any) -> str | None:
    entry, attention = source.entries[0], source.family.attentions[0]
    if attention.alibi and any(e.slots(e.group_size) != tuple(range(e.num_heads)) for e in source.entries):
        return "expected groups of neighbouring query heads, as the slope of a head follows from its place, got others"
    if any(entry.multiple > 1 for entry in source.entries):
        return "expected heads of the original's head_dim, got a multiple of it; fold with --head-dim-multiple 1"
    if len({entry.head_dim for entry in source.entries}) > 1:
        return "expected one head_dim in all layers, got several; fold with --head-dim-multiple 1"
    if not source.is_uniform and not found.per_layer:
        return f"llama.cpp's {found.name} has one number of K/V heads for all layers, got {', '.join(map(str, source.counts))}"
    if not found.any_head_dim and (not source.is_even or entry.num_heads * entry.head_dim != stock.hidden_size):
        return f"llama.cpp's {found.name} has equal groups, and heads that fill the hidden size; fold with equal groups"
    return None
