"""Models of Llama's kind as DeciLM, the class of Nemotron models from architecture search: `block_configs` with a group size per layer.

Engines that support a number of K/V heads per layer read it in this form. The fields follow their readers: K/V heads are
`num_attention_heads // n_heads_in_group`; `attention_bias` is for all four projections, `qkv_bias` overrides it for the first three;
the intermediate size is 2/3 of `ffn_mult` times the hidden size, rounded up to a multiple of 256. Some readers refuse any other field
for it, so an MLP of another size is filled up with zero rows, which changes nothing.
"""

from pathlib import Path
from typing import Any

from ...checkpoint.reader import Checkpoint
from ..folded import Entry, Folded, stock_config
from ..layout import ExportLayout
from ..llama_like import reordered
from ..pieces import Export, Linear, Piece

CODE = Path(__file__).parents[2] / "runtime" / "modeling_decilm.py"
STEP = 256
"""The intermediate size given by `ffn_mult` is a multiple of this."""
_COMMON = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    "tie_word_embeddings", "rope_parameters", "attention_dropout",
)  # fmt: skip


def why_not(source: Folded) -> str | None:
    """Return why the model cannot be a DeciLM."""
    if source.has_window:
        return f"{source.model_type} has a sliding window here, DeciLM has none"
    if source.config.get("hidden_act", "silu") != "silu":
        return f"DeciLM has the activation silu only, got {source.config['hidden_act']}"
    return None


def export(checkpoint: Checkpoint, source: Folded) -> Export:
    """Return the same weights with query heads in standard order, under DeciLM's config."""
    stock = stock_config(source)
    pieces = [piece for entry in source.entries for piece in reordered(checkpoint, entry, entry.group_size)]
    pieces += _filled_up(checkpoint, source, stock.intermediate_size)
    counts, head_dim = ", ".join(map(str, source.counts)), source.entries[0].head_dim
    description = f"DeciLMForCausalLM with {counts} K/V heads: engines that read block_configs, transformers with trust_remote_code=True"
    if head_dim * stock.num_attention_heads != stock.hidden_size:
        description += f"; vLLM reads its head_dim of {head_dim}, other engines refuse it"
    return Export(LAYOUT.name, _config(source, stock), pieces, description, {CODE.name: CODE.read_text()})


def _config(source: Folded, stock: Any) -> dict[str, Any]:
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {
            "AutoConfig": f"{CODE.stem}.DeciLMConfig",
            "AutoModel": f"{CODE.stem}.DeciLMModel",
            "AutoModelForCausalLM": f"{CODE.stem}.DeciLMForCausalLM",
        },
        **{name: getattr(stock, name) for name in _COMMON},
        "intermediate_size": _multiple_of_step(stock.intermediate_size),
        "head_dim": source.entries[0].head_dim,
        "num_key_value_heads": None,
        **_biases(source.model_type, stock),
        "block_configs": [_block(entry, stock) for entry in source.entries],
        **{name: source.config[name] for name in ("dtype", "torch_dtype") if name in source.config},
    }


def _biases(model_type: str, stock: Any) -> dict[str, bool]:
    if model_type == "mistral":
        return {"attention_bias": False, "mlp_bias": False}
    if model_type == "qwen2":
        return {"attention_bias": False, "qkv_bias": True, "mlp_bias": False}
    own = {"qkv_bias": stock.attention_bias} if model_type == "seed_oss" else {}
    out = stock.attention_out_bias if model_type == "seed_oss" else stock.attention_bias
    return {"attention_bias": out, **own, "mlp_bias": stock.mlp_bias}


def _block(entry: Entry, stock: Any) -> dict[str, dict[str, Any]]:
    nothing = {"no_op": False, "replace_with_linear": False, "sparsify": None}
    attention = {
        "n_heads_in_group": entry.group_size,
        "window_length": None,
        "num_sink_tokens": None,
        "unshifted_sink": False,
    }
    mlp = {"ffn_mult": 1.5 * _multiple_of_step(stock.intermediate_size) / stock.hidden_size}
    return {
        "attention": {**nothing, **attention, "use_prefill_window_in_sink_attention": False},
        "ffn": {**nothing, **mlp},
    }


def _filled_up(checkpoint: Checkpoint, source: Folded, size: int) -> list[Piece]:
    """Return the MLPs with as many zero rows as their readers need."""
    wanted = [*range(size), *[size] * (_multiple_of_step(size) - size)]
    if len(wanted) == size:
        return []
    linears = []
    for entry in source.entries:
        mlp = entry.names["q"].removesuffix("self_attn.q_proj") + "mlp"
        linears += [Linear(f"{mlp}.{name}", f"{mlp}.{name}", rows=wanted) for name in ("gate_proj", "up_proj")]
        linears += [Linear(f"{mlp}.down_proj", f"{mlp}.down_proj", columns=wanted)]
    return [linear.piece(checkpoint) for linear in linears]


def _multiple_of_step(size: int) -> int:
    return size + -size % STEP


LAYOUT = ExportLayout(
    name="decilm",
    model_types=("llama", "mistral", "qwen2", "seed_oss"),
    why_not=why_not,
    export=export,
    needs_one_count=False,
    needs_equal_groups=True,
    pads_groups_to="layer",
    priority=None,
)
