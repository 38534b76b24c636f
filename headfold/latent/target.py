"""The class that an MLA fold is written for, transformers' `DeepseekV3ForCausalLM`: its config and its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .rotation import frequencies
from .site import Latent

MODEL_TYPE, MODEL_CLASS = "deepseek_v3", "DeepseekV3ForCausalLM"
NORM_EPSILON = 1e-6
"""What the class adds to the mean square of the latent in `kv_a_layernorm`; engines add the `rms_norm_eps` of the config there."""
SMALLNESS = 2.0**-30
"""Root mean square of the latent that is written: its mean square is so far below the epsilon that the norm multiplies by a constant."""
GAIN = 2.0**20
"""The gain of that norm, exact in every dtype. What it leaves of the scale is in the up-projections."""
REST = NORM_EPSILON**0.5 / SMALLNESS / GAIN
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Engines do not tie these in the class: where the original does, the fold has a copy."""
_COPIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
    "dtype", "torch_dtype", "transformers_version",
)  # fmt: skip
"""Fields of a Llama's config that mean the same in the class."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of every site of an MLA model, and the base of its rotary frequencies."""

    rank: int
    rotary_dim: int
    base: float
    nope_dim: int
    value_dim: int

    @property
    def turns(self) -> Float[Tensor, " plane"]:
        """Radians per token of the planes of the rotary key."""
        return frequencies(self.base, self.rotary_dim)

    @property
    def cached(self) -> int:
        """Numbers that one token leaves in the cache of one site."""
        return self.rank + self.rotary_dim


def target_config(config: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """Return the config.json of the fold of a model whose complete config is given. No layer has experts."""
    return {
        "architectures": [MODEL_CLASS],
        "model_type": MODEL_TYPE,
        **{name: config[name] for name in _COPIED if name in config},
        "num_key_value_heads": config["num_attention_heads"],
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rms_norm_eps": NORM_EPSILON,
        "kv_lora_rank": shape.rank,
        "q_lora_rank": None,
        "qk_nope_head_dim": shape.nope_dim,
        "qk_rope_head_dim": shape.rotary_dim,
        "v_head_dim": shape.value_dim,
        "rope_theta": shape.base,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.base},
        "rope_interleave": True,
        "first_k_dense_replace": config["num_hidden_layers"],
        "num_nextn_predict_layers": 0,
    }


def residual_scale(epsilon: float) -> float:
    """Return by what the residual stream is multiplied, so that norms with `NORM_EPSILON` give what those with `epsilon` gave."""
    return float((NORM_EPSILON / epsilon) ** 0.5)


def scaled_tensors(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, float]:
    """Return by name what the tensors outside of attention are multiplied by: whatever writes to the residual stream."""
    scale = residual_scale(config["rms_norm_eps"])
    if abs(scale - 1) < 1e-9:
        return {}
    return {name: scale for name in tensors if name.endswith((".mlp.down_proj.weight", EMBEDDING))}


def site_tensors(site: Latent, prefix: str, output_scale: float) -> dict[str, Tensor]:
    """Return the tensors of a site by their names in the class, in the dtype of the site. `output_scale` multiplies what the site adds to
    the residual stream.
    """
    up = torch.cat([site.up_k, site.up_v], 1) * REST
    return {
        f"{prefix}.q_proj.weight": site.q.flatten(0, 1),
        f"{prefix}.kv_a_proj_with_mqa.weight": torch.cat([site.down * SMALLNESS, site.rotary]),
        f"{prefix}.kv_a_layernorm.weight": torch.full((site.rank,), GAIN, dtype=site.q.dtype),
        f"{prefix}.kv_b_proj.weight": up.flatten(0, 1),
        f"{prefix}.o_proj.weight": (output_scale * site.o.flatten(0, 1)).T,
    }


def site_shapes(shape: Shape, num_heads: int, model: int, prefix: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the same tensors."""
    return {
        f"{prefix}.q_proj.weight": (num_heads * (shape.nope_dim + shape.rotary_dim), model),
        f"{prefix}.kv_a_proj_with_mqa.weight": (shape.cached, model),
        f"{prefix}.kv_a_layernorm.weight": (shape.rank,),
        f"{prefix}.kv_b_proj.weight": (num_heads * (shape.nope_dim + shape.value_dim), shape.rank),
        f"{prefix}.o_proj.weight": (model, num_heads * shape.value_dim),
    }


def read_site(read: Callable[[str], Tensor], shape: Shape, prefix: str, output_scale: float) -> Latent:
    """Return a site as it was written, in float32 or better."""
    named = ("q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
    tensors = (read(f"{prefix}.{name}.weight") for name in named)
    q, shared, gain, up, o = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)
    heads = len(q) // (shape.nope_dim + shape.rotary_dim)
    up = (up * gain / NORM_EPSILON**0.5).unflatten(0, (heads, -1))
    return Latent(
        q=q.unflatten(0, (heads, -1)),
        down=shared[: shape.rank],
        rotary=shared[shape.rank :],
        up_k=up[:, : shape.nope_dim],
        up_v=up[:, shape.nope_dim :],
        o=o.T.unflatten(0, (heads, -1)) / output_scale,
    )
