"""A fold to MLA as a GGUF file: llama.cpp's architecture `deepseek2`, which caches the latent and the rotary key.

llama.cpp reads queries without a low rank where the file says that this rank is zero. Its own converter leaves the field out, and llama.cpp
then refuses models of most numbers of layers. The rows of the down-projection are so small (docs/mla.md, 1) that float16 has no precision
left for them: they stay bfloat16 where the others are quantised.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.config import read_config
from ..checkpoint.reader import Checkpoint
from ..core.errors import UserError
from ..exports.formats import Written, check_output
from ..exports.gguf_file import write_file
from ..exports.gguf_model import OF_DTYPE, GgufTensor, tensor_of
from ..hf_models.building import open_config
from ..llama_cpp.tokens import name_for, tokenizer_note, tokenizer_why_not
from ..outputs import owned_file
from .target import EMBEDDING, HEAD, MODEL_CLASS, MODEL_TYPE, NORM_EPSILON, Shape, site_shapes

if TYPE_CHECKING:
    import gguf

ARCHITECTURE = "deepseek2"
_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""What of a layer is written as it is: name in the class → name in the file."""
_AROUND = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}


@dataclass(frozen=True, slots=True)
class LatentModel:
    """What is written of a fold to MLA: fields and tensors."""

    stock: Any
    """The config as its class reads it."""
    shape: Shape
    number_type: str
    name: str
    tensors: tuple[GgufTensor, ...]
    architecture: str = ARCHITECTURE

    @property
    def vocab_size(self) -> int:
        """Rows of the embeddings."""
        return int(self.stock.vocab_size)

    def add_fields(self, writer: "gguf.GGUFWriter") -> None:
        """Write what the architecture has of its own."""
        stock, shape = self.stock, self.shape
        writer.add_context_length(stock.max_position_embeddings)
        writer.add_embedding_length(stock.hidden_size)
        writer.add_block_count(stock.num_hidden_layers)
        writer.add_feed_forward_length(stock.intermediate_size)
        writer.add_head_count(stock.num_attention_heads)
        writer.add_layer_norm_rms_eps(stock.rms_norm_eps)
        # One head in the cache: rotary key and latent, of which the latent is the value too.
        writer.add_head_count_kv(1)
        writer.add_key_length(shape.cached)
        writer.add_value_length(shape.rank)
        writer.add_key_length_mla(shape.nope_dim + shape.rotary_dim)
        writer.add_value_length_mla(shape.value_dim)
        writer.add_q_lora_rank(0)
        writer.add_kv_lora_rank(shape.rank)
        writer.add_rope_dimension_count(shape.rotary_dim)
        writer.add_rope_freq_base(shape.base)
        # No layer has experts, whose fields the architecture needs all the same.
        writer.add_leading_dense_block_count(stock.num_hidden_layers)
        writer.add_expert_feed_forward_length(stock.intermediate_size)
        writer.add_expert_shared_count(0)
        writer.add_expert_weights_scale(1.0)


def is_latent(path: Path) -> bool:
    """Return whether a directory is a model of the class that `fold --to mla` writes."""
    try:
        return read_config(path).get("model_type") == MODEL_TYPE
    except UserError:
        return False  # said by what opens the directory


def export_latent(
    path: Path,
    out: Path,
    layout: str | None,
    number_type: str | None,
    force: bool,
    progress: Callable[[int, int], None],
) -> Written:
    """Write a fold to MLA as a GGUF file, the one layout that it has.

    Raises:
        UserError: another layout, no model that `fold --to mla` writes, a tokenizer that llama.cpp lacks, or gguf is not installed.
    """
    if layout != "gguf":
        raise UserError(
            f"{path}: expected --layout gguf, the one form that a fold to MLA is exported in (transformers and vLLM read it as it is), "
            f"got {layout or 'none'}"
        )
    check_output(layout, out, number_type)
    checkpoint = Checkpoint.open(path)
    try:
        model = described(checkpoint, number_type)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{path}: layout gguf: expected a config that its class reads, got {type(error).__name__} {error}; fold again"
        ) from error
    with owned_file(out, force):
        write_file(model, checkpoint, out, progress)
    shape, said = model.shape, f"GGUF of architecture {ARCHITECTURE}, {model.number_type}"
    said += f": {model.stock.num_attention_heads} query heads, a latent of {shape.rank} and a rotary key of {shape.rotary_dim}"
    return Written(ARCHITECTURE, "; ".join(filter(None, (said, tokenizer_note(checkpoint.path)))))


def described(checkpoint: Checkpoint, number_type: str | None) -> LatentModel:
    """Return what is written, without reading a tensor.

    Raises:
        UserError: as `export_latent`.
    """
    where = f"{checkpoint.path}: layout gguf"
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(f"{where}: the format needs gguf: pip install 'headfold[gguf]'") from error
    stock = open_config(checkpoint.config, f"{checkpoint.path}/config.json")
    if reason := _why_not(stock) or tokenizer_why_not(checkpoint.path):
        raise UserError(f"{where}: {reason}")
    shape = Shape(
        stock.kv_lora_rank, stock.qk_rope_head_dim, float(stock.rope_parameters["rope_theta"]),
        stock.qk_nope_head_dim, stock.v_head_dim,
    )  # fmt: skip
    _check_sizes(checkpoint, stock, shape)
    dtype = checkpoint.tensors[EMBEDDING].dtype
    default = number_type or OF_DTYPE.get(dtype, "f32")
    tensors = [
        tensor_of(new, (old,), checkpoint.tensors[old].shape, default, {})
        for layer in range(stock.num_hidden_layers)
        for old, new in (
            (f"model.layers.{layer}.{old}.weight", f"blk.{layer}.{new}.weight") for old, new in _NAMES.items()
        )
    ]
    tensors += [tensor_of(new, (old,), checkpoint.tensors[old].shape, default, {}) for old, new in _AROUND.items()]
    for layer in range(stock.num_hidden_layers):
        tensors += _up_projections(layer, stock.num_attention_heads, shape, default)
    return LatentModel(stock, shape, default, name_for(checkpoint.path), tuple(tensors))


def _up_projections(layer: int, heads: int, shape: Shape, number_type: str) -> list[GgufTensor]:
    """Return the two parts of `kv_b_proj`: of keys, from which queries read latents, and of values."""
    old, nope = f"model.layers.{layer}.self_attn.kv_b_proj.weight", shape.nope_dim

    def keys(up: Tensor) -> Tensor:
        return up.unflatten(0, (heads, -1))[:, :nope].mT

    def values(up: Tensor) -> Tensor:
        return up.unflatten(0, (heads, -1))[:, nope:]

    parts = (
        ("attn_k_b", (heads, shape.rank, nope), keys),
        ("attn_v_b", (heads, shape.value_dim, shape.rank), values),
    )
    return [
        tensor_of(f"blk.{layer}.{name}.weight", (old,), size, number_type, {"part": part}) for name, size, part in parts
    ]


def _why_not(stock: Any) -> str | None:
    """Return why a model of the class is none that `fold --to mla` writes."""
    if stock.q_lora_rank is not None or stock.first_k_dense_replace < stock.num_hidden_layers or stock.attention_bias:
        return "expected what fold --to mla writes, got a low rank of queries, experts or biases; use llama.cpp's own converter"
    if stock.rms_norm_eps != NORM_EPSILON or not stock.rope_interleave:
        return (
            f"expected what fold --to mla writes, rms_norm_eps {NORM_EPSILON} and interleaved rotary planes, got {stock.rms_norm_eps} and "
            f"rope_interleave {stock.rope_interleave}; use transformers"
        )
    if stock.architectures != [MODEL_CLASS]:
        return f"expected a {MODEL_CLASS}, got {stock.architectures}; use transformers"
    if stock.rope_parameters["rope_type"] != "default" or stock.hidden_act != "silu":
        return (
            f"expected plain rotary frequencies and silu, got {stock.rope_parameters['rope_type']} and {stock.hidden_act}; use "
            "transformers"
        )
    return None


def _check_sizes(checkpoint: Checkpoint, stock: Any, shape: Shape) -> None:
    """Raise a UserError where a tensor lacks, is in float16, or has another size than the config says."""
    hidden, mlp = stock.hidden_size, stock.intermediate_size
    expected: dict[str, tuple[int, ...]] = {
        EMBEDDING: (stock.vocab_size, hidden),
        HEAD: (stock.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(stock.num_hidden_layers):
        at = f"model.layers.{layer}"
        expected |= site_shapes(shape, stock.num_attention_heads, hidden, f"{at}.self_attn")
        expected |= {f"{at}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        expected |= {f"{at}.mlp.{name}.weight": (mlp, hidden) for name in ("gate_proj", "up_proj")}
        expected[f"{at}.mlp.down_proj.weight"] = (hidden, mlp)
    for name, size in expected.items():
        info = checkpoint.tensors.get(name)
        found = "no such tensor" if info is None else "float16" if info.dtype == torch.float16 else tuple(info.shape)
        if found != size:
            raise UserError(f"{checkpoint.path}: layout gguf: {name}: expected shape {size}, got {found}; fold again")
