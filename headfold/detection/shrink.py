"""Shrink a config to toy size: small counts, and all switches as they are."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import UserError

Config = dict[str, Any]
"""The contents of a config.json."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of a toy model: all different, so that shapes identify dimensions."""

    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 24
    hidden_size: int = 128
    min_layers: int = 2


VOCABULARY = 89
ROTARY_OF_LATENT = 8
"""Rotary dims where K and V are computed from a common latent; `head_dim` means these there."""
_NEEDED = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")
"""Fields that are null in some configs, although their class requires a number: sized like other counts."""
MAX_KINDS = 8
"""Number of kinds of layers, as distinguished by lists in the config; the toy model contains one layer of each kind."""
THETA = 100.0
"""Base of the rotary frequencies: within a toy sequence every plane rotates enough to be observed."""

_LAYERS = re.compile(r"^(num_(hidden_)?layers|n_layers?|(encoder|decoder)_layers|num_decoder_layers)$")
_SIZES: tuple[tuple[str, str | int], ...] = (
    (r"vocab_size(_per_layer_input)?$|unpadded_vocab", VOCABULARY),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|kv_n_heads|n_head_kv", "num_kv_heads"),
    (r"mamba_(n|num)_heads|linear_num_(key|value)_heads|linear_num_heads|index_n_heads", 4),
    (r"linear_(key_|value_)?head_dim|mamba_head_dim", 8),
    (r"rope_head_dim", ROTARY_OF_LATENT),
    (r"mamba_d_head", 64),
    (r"mamba_d_ssm", 256),
    (r"qk_head_dim|index_head_dim", 24),
    (r"num_attention_heads|^(n_heads?|num_heads|attention_heads|n_attn_heads)$", "num_heads"),
    (r"^(swa_|global_)?head_dim$|kv_channels|attention_head_size", "head_dim"),
    (r"^(hidden_size|n_embd|d_model|dim|lru_width)$", "hidden_size"),
    (r"hidden_size_per_layer_input|router_hidden_size|zaya_mlp_expansion|router_dim", 16),
    (r"moe.*(intermediate|latent)|expert.*intermediate|shared.*(intermediate|size)|expert_dim", 24),
    (r"intermediate_size|ffn_hidden_size|ffn_dim|ffn_size|mlp_dim|n_inner|d_ff$", 72),
    (r"num_experts_per_tok|top_?k$|moe_k|top_k_experts|moe_topk|index_topk", 2),
    (r"num_shared_experts|n_shared_experts", 1),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|zero_expert_num", 4),
    (r"n_group$|topk_group|num_expert_group|n_groups", 1),
    (r"num_nextn_predict_layers|num_kv_shared_layers|num_mtp_layers|num_mem_blocks", 0),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"original_max_position|max_position|n_positions|max_seq_len|model_max_length|n_ctx|keep_window_size", 64),
    (r"sliding_window(_size)?$|attention_window|window_size|attention_chunk_size", 6),
    (r"every_n_layers|_interval$|layer_group_size|(sliding_window|layers?)_pattern$|_period$|_stride$", 2),
    (r"chunk_size|block_size", 8),
    (r"d_state|state_size|d_rel|laurel_rank|lora_rank|v_head_dim|nope_head_dim", 16),
    (r"layer_offset$|num_blocks$", 1),
    (r"image_size|crop_size", 28),
    (r"(conv|out)_channels?$", 128),
    (r"dt_rank", 8),
    (r"pad_token_id$", 0),
)


def shrink(config: Mapping[str, Any], geometry: Geometry) -> Config:
    """Return the toy config. Lists with one entry per layer keep one layer of each kind, and at least two layers."""
    depth = next((value for name, value in config.items() if _LAYERS.match(name) and isinstance(value, int)), 0)
    everywhere = list(range(depth))  # such a list names layers by number
    listed = {
        name: value
        for name, value in config.items()
        if isinstance(value, list) and len(value) == depth > 0 and value != everywhere
    }
    kept = _kept_layers(list(listed.values()), depth, geometry.min_layers)
    toy: Config = {}
    for name, value in config.items():
        if name == "per_layer_config":  # by layer, so of no meaning for a toy
            continue
        if value is None and name == "layer_types":
            toy[name] = ["full_attention"] * len(kept)
        elif value == everywhere and depth:
            toy[name] = list(range(len(kept)))
        elif name in listed:
            toy[name] = [_toy_value(name, listed[name][layer], geometry) for layer in kept]
        elif _LAYERS.match(name) and isinstance(value, int):
            toy[name] = len(kept) if value == depth else geometry.min_layers
        else:
            toy[name] = _toy_value(name, 1 if value is None and name in _NEEDED else value, geometry)
    if toy.get("rope_parameters") == {}:  # some classes want it by kind of layer, and assume nothing
        kinds = toy.get("layer_types") or []
        toy["rope_parameters"] = {kind: {"rope_type": "default", "rope_theta": THETA} for kind in kinds}
    return toy | ({"head_dim": ROTARY_OF_LATENT} if "qk_rope_head_dim" in config and "head_dim" in config else {})


def _kept_layers(listed: list[list[Any]], depth: int, min_layers: int) -> list[int]:
    """Return the first layer of each kind, plus the first other layers up to the minimum, in order."""
    if depth < min_layers:
        return [min(layer, max(depth - 1, 0)) for layer in range(min_layers)]
    first: dict[str, int] = {}
    for layer in range(depth):
        first.setdefault(repr([values[layer] for values in listed]), layer)
    kinds = list(first.values())
    if len(kinds) > MAX_KINDS:
        raise UserError(
            f"it has {len(kinds)} kinds of layers; expected at most {MAX_KINDS} that differ in what the config says"
        )
    more = [layer for layer in range(depth) if layer not in kinds]
    return sorted(kinds + more[: max(0, min_layers - len(kinds))])


def _toy_value(name: str, value: Any, geometry: Geometry) -> Any:
    if name.startswith("rope_") and isinstance(value, Mapping):
        return _toy_rope(value)
    if isinstance(value, Mapping):
        return shrink(value, geometry) if name.endswith("_config") else value
    if isinstance(value, float):
        return _toy_float(name, value)
    if name == "eos_token_id" and value is not None:
        return 2
    if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and name != "pad_token_id"):
        return value
    for pattern, size in _SIZES:
        if re.search(pattern, name):
            return getattr(geometry, size) if isinstance(size, str) else min(value, size) if size < 3 else size
    return value if value < 16 or not name.endswith("_id") else 1


def _toy_float(name: str, value: float) -> float:
    """Return a number at toy size. Epsilons become nearly zero: they keep a scale from being exactly free under a norm."""
    if "eps" in name:
        return 1e-20
    if name == "rope_theta":
        return THETA
    return _whole_quarters(value) if re.search("partial_rotary|rotary_pct", name) else value


def _whole_quarters(share: float) -> float:
    """Return a share of a head that is a whole, even number of dims of a toy head."""
    return max(1, round(share * 4)) / 4


_STRETCHED = {"yarn", "longrope", "llama3", "dynamic", "linear"}
"""Ways of stretching frequencies for long contexts, which change no freedom."""
_LISTED = ("short_factor", "long_factor", "mrope_section")
"""Fields with one entry per plane."""


def _toy_rope(parameters: Mapping[str, Any]) -> Config:
    if any(isinstance(value, Mapping) for value in parameters.values()):
        return {name: _toy_rope(value) if isinstance(value, Mapping) else value for name, value in parameters.items()}
    kept = {name: _toy_float(name, value) if isinstance(value, float) else value for name, value in parameters.items()}
    kept = {name: value for name, value in kept.items() if name not in _LISTED}
    kinds = [name for name in ("rope_type", "type") if kept.get(name) in _STRETCHED]
    return kept | dict.fromkeys(kinds, "default")
