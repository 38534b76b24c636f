"""config.json, opened in one place: the fields that headfold reads have the types and bounds that its code relies on.

What transformers alone reads is checked by transformers (`hf_models.open_config`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.groups import MOST_HEADS
from ..core.json_input import read_object

CONFIG = "config.json"
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_WITHOUT_FIELDS = {"label2id", *_IMPLEMENTATIONS, *(f"_{name}" for name in _IMPLEMENTATIONS)}
"""Objects whose keys are names of labels or of parts."""
MOST_LAYERS = 2**16
"""As `MOST_HEADS`: more than any model has, few enough to loop over."""
MOST = 2**31 - 1
"""The greatest size or number of tokens."""
MOST_EXPERTS = 2**12
LONGEST_NAME = 120
"""Characters of the name of an architecture or a class."""
MOST_LABELS = 2**20
_FEW_LAYERS = 1000
"""So many a config may name where there are fewer tensors: what then lacks is listed."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of field: what is expected of it, in words and as a test of a value that is not null."""

    expected: str
    holds: Callable[[Any], bool]


def _whole(least: int, most: int, expected: str = "") -> _Kind:
    """Return the kind of whole numbers within these bounds; true and 2.0 are none."""
    said = expected or f"a whole number from {least} to {most}"
    return _Kind(said, lambda value: type(value) is int and least <= value <= most)


def _count(most: int) -> _Kind:
    return _whole(1, most, f"a positive whole number up to {most}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _class_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and len(item) <= LONGEST_NAME for item in value)


def _is_name(value: Any) -> bool:
    """Return whether a value can name an architecture: names of files and modules are made from it."""
    return isinstance(value, str) and len(value) <= LONGEST_NAME and not {"/", "\\", "\0"} & set(value)


def _are_repeated(value: Any) -> bool:
    """Return whether a value lists pairs of something and how often it is repeated, as GPT-Neo's config does."""
    pairs = value if isinstance(value, list) else [None]
    return all(isinstance(pair, list) and len(pair) == 2 and _LAYERS.holds(pair[1]) for pair in pairs)


_CORRECT = "correct the config, or use a model of an architecture that headfold reads"
_PIXELS = _count(2**14)
_LAYERS, _HEADS, _SIZE, _OR_NONE = _count(MOST_LAYERS), _count(MOST_HEADS), _count(MOST), _whole(0, MOST)
_SHAPE = _Kind(
    f"a positive whole number up to {2**14}, or a pair of them",
    lambda value: (
        _PIXELS.holds(value) or (isinstance(value, list) and len(value) == 2 and all(map(_PIXELS.holds, value)))
    ),
)
_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_NAME = _Kind('a name such as "llama"', _is_name)
_CLASSES = _Kind("a list of class names of transformers", _class_names)
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_OBJECT = _Kind("a JSON object", lambda value: isinstance(value, dict))
_POSITIVE = _Kind("a positive number", lambda value: _is_number(value) and 0 < value < 1e30)
_NOT_NEGATIVE = _Kind("a number that is not negative", lambda value: _is_number(value) and value >= 0)
_SHARE = _Kind("a share of 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_LISTED = _Kind("a list", lambda value: isinstance(value, list))

_LAYER_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)
_FIELDS: Mapping[str, _Kind] = {
    **dict.fromkeys(("model_type", "position_embedding_type"), _NAME),
    "architectures": _CLASSES,
    **dict.fromkeys(
        ("text_config", "vision_config", "audio_config", "attn_config", "rope_scaling", "rope_parameters", "auto_map", "headfold",
         "label2id", "per_layer_config", "fusion_config"), _OBJECT,
    ),
    **dict.fromkeys(_LAYER_COUNTS, _LAYERS), "num_decoder_layers": _whole(0, MOST_LAYERS),
    **dict.fromkeys(
        ("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads",
         "num_key_value_heads", "num_kv_heads"), _HEADS,
    ),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "n_embed", "dim", "head_dim", "d_kv", "intermediate_size", "vocab_size",
         "max_source_positions", "num_channels", "num_mel_bins"), _SIZE,
    ),
    **dict.fromkeys(("image_size", "patch_size"), _SHAPE),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions", "rotary_dim"),
        _OR_NONE,
    ),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok"), _whole(0, MOST_EXPERTS)),
    "sliding_window": _whole(-1, MOST),
    "num_labels": _whole(0, MOST_LABELS),
    "attention_types": _Kind("a list of kinds of layers, each with a count", _are_repeated),
    "pad_token_id": _whole(-100, MOST),
    "decoder_start_token_id": _OR_NONE,
    **dict.fromkeys(("is_encoder_decoder", "use_sliding_window", "output_hidden_states", "output_attentions", "return_dict"), _FLAG),
    **dict.fromkeys(
        ("partial_rotary_factor", "rotary_pct", "dropout", "hidden_dropout", "attention_dropout", "activation_dropout", "dropout_rate",
         "resid_pdrop", "embd_pdrop", "attn_pdrop", "resid_dropout", "embed_dropout", "hidden_dropout_prob",
         "attention_probs_dropout_prob", "classifier_dropout"), _SHARE,
    ),
    **dict.fromkeys(("factor", "attention_factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), _POSITIVE),
    **dict.fromkeys(("rope_theta", "rotary_emb_base", "attention_multiplier", "query_pre_attn_scalar"), _POSITIVE),
    **dict.fromkeys(
        ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps", "norm_epsilon"), _NOT_NEGATIVE
    ),
    **dict.fromkeys(("layer_types", "no_rope_layers", "block_configs"), _LISTED),
}  # fmt: skip
"""Field → its kind, wherever it stands: in the config itself or in a part of it. Each may be null or absent."""
_SITE: Mapping[str, _Kind] = {
    **dict.fromkeys(("module", "q", "k", "v", "o", "fused", "k_norm"), _TEXT),
    **dict.fromkeys(("heads", "kv_heads", "slots"), _HEADS),
    "head_dim": _SIZE,
    "scale": _POSITIVE,
    "kv_of_query": _Kind(
        "a list of K/V heads", lambda value: isinstance(value, list) and all(map(_whole(0, MOST_HEADS).holds, value))
    ),
}
"""The fields of a site that headfold's runtime reads."""
_WITH_COUNTS = {
    "per_layer_config": ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    "block_configs": ("num_attention_heads", "hidden_size"),
}
"""Fields with counts of K/V heads by layer → what else is needed to read them."""
_NEEDED = ("module", "q", "k", "v", "heads", "kv_heads", "head_dim")


def read_config(directory: Path) -> dict[str, Any]:
    """Return the config.json of a checkpoint directory.

    Raises:
        UserError: it is not JSON, or a field that headfold reads has another type or is out of bounds.
    """
    return read_config_file(directory / CONFIG)


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the config in a file of any name.

    Raises:
        UserError: as `read_config`.
    """
    config = read_object(path)
    check_fields(config, str(path))
    _refuse_kernels(config, str(path))
    return config


def check_fields(config: Mapping[str, Any], where: str) -> None:
    """Check the fields of a config that headfold reads, and those of its parts.

    Raises:
        UserError: names the first field that has another type or is out of bounds.
    """
    _check(config, _FIELDS, where)
    for block in config.get("block_configs") or []:
        attention = block.get("attention") if isinstance(block, dict) else None
        size = attention.get("n_heads_in_group") if isinstance(attention, dict) else None
        if size is not None and not _HEADS.holds(size):
            raise _unexpected(f"{where}: block_configs: n_heads_in_group", _HEADS, size)
    for counts, needed in _WITH_COUNTS.items():
        if config.get(counts) is not None and (absent := [name for name in needed if config.get(name) is None]):
            raise UserError(f"{where}: expected {absent[0]} beside {counts}, got none; correct the config")
    layers = config.get("per_layer_config") or {}
    if not all(isinstance(own, dict) for own in layers.values()):
        raise UserError(f"{where}: per_layer_config: expected the fields of each layer, got something else; fold again")
    if (folded := config.get("headfold")) is not None:
        _check_sites(folded.get("sites", []), f"{where}: headfold")


def check_layers(config: Mapping[str, Any], num_tensors: int, where: str) -> None:
    """Check that a config names no more layers than its checkpoint has tensors, before anything is built from their number.

    Raises:
        UserError: names the field and both numbers.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_layers(value, num_tensors, where)
        elif name in _LAYER_COUNTS and (value or 0) > max(num_tensors, _FEW_LAYERS):
            raise UserError(
                f"{where}: {name}: expected no more layers than the checkpoint has tensors ({num_tensors}), got {value}; "
                "correct the config"
            )


def _check(part: Mapping[str, Any], kinds: Mapping[str, _Kind], where: str) -> None:
    for name, value in part.items():
        kind = kinds.get(name)
        if kind is not None and value is not None and not kind.holds(value):
            raise _unexpected(f"{where}: {name}", kind, value)
        if isinstance(value, Mapping) and name not in _WITHOUT_FIELDS:
            _check(value, kinds, where)


def _check_sites(sites: Any, where: str) -> None:
    if not isinstance(sites, list) or not all(isinstance(site, dict) and set(_NEEDED) <= site.keys() for site in sites):
        raise UserError(f"{where}: expected a list of sites, each with {', '.join(sorted(_NEEDED))}; fold again")
    for site in sites:
        for name, kind in _SITE.items():
            if name in site and not kind.holds(site[name]):
                raise _unexpected(f"{where}: {name}", kind, site[name], "fold again")
        heads, kv_heads, groups = site["heads"], site["kv_heads"], site.get("kv_of_query")
        if groups is None and heads % kv_heads:
            raise UserError(
                f"{where}: kv_heads: expected a number that divides the {heads} heads, got {kv_heads}; fold again"
            )
        if groups is not None and (len(groups) != heads or {*groups} != {*range(kv_heads)}):
            raise UserError(
                f"{where}: kv_of_query: expected {heads} entries that name all of {kv_heads} K/V heads, got {len(groups)} that name "
                f"{len(set(groups))}; fold again"
            )


def _refuse_kernels(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config that names a repository of the hub as its attention or experts: transformers would fetch code and run it.

    Raises:
        UserError: names the field.
    """
    for key, value in config.items():
        named = value.values() if isinstance(value, dict) else [value]
        if key.strip("_").startswith(_IMPLEMENTATIONS) and any("/" in str(name) for name in named):
            raise UserError(
                f"{where}: {key}: expected an implementation of transformers, got {value!r:.60}, code of the hub; remove the field"
            )
        if isinstance(value, dict):
            _refuse_kernels(value, where)


def _unexpected(
    where: str,
    kind: _Kind,
    value: Any,
    advice: str = _CORRECT,
) -> UserError:
    return UserError(f"{where}: expected {kind.expected}, got {value!r:.60}; {advice}")
