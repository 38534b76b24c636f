"""GPT-NeoX with parallel residual, and GPT-J, as the stock Phi class, which computes the same function and reads a number of K/V heads.

All three add attention and MLP to one residual. Phi has one layer norm for both, so GPT-NeoX's two become identities and their gains and
offsets are multiplied into the linears after them: W (g * x + b) = (W g) x + W b. Phi rotates halves of a head; the rows of GPT-J's
pairs are put in that order, in both Q and K, which leaves their products unchanged.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..checkpoint.reader import Checkpoint
from .folded import Entry, Folded, stock_config
from .pieces import Export, Linear, Piece, filled, moved

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class SourceNames:
    """The names on disk of the parts of a class that Phi has under other names."""

    layer: str
    fc1: str
    fc2: str
    norm: str
    embedding: str
    final_norm: str
    head: str
    mlp_norm: str = ""
    """The second norm of a layer; where there is one, both norms are folded into the linears."""
    buffers: tuple[str, ...] = ()
    """Tensors of old checkpoints that are not weights."""


SOURCES: dict[str, SourceNames] = {
    "gpt_neox": SourceNames(
        layer="gpt_neox.layers.{layer}",
        fc1="mlp.dense_h_to_4h",
        fc2="mlp.dense_4h_to_h",
        norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
        buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    ),
    "gptj": SourceNames(
        layer="transformer.h.{layer}",
        fc1="mlp.fc_in",
        fc2="mlp.fc_out",
        norm="ln_1",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        head="lm_head",
        buffers=("attn.bias", "attn.masked_bias"),
    ),
}
MODEL_TYPES = tuple(SOURCES)


def why_not(source: Folded) -> str | None:
    """Return why a model of these types has no Phi model that computes the same function, None where it has one."""
    if source.model_type == "gpt_neox" and source.config.get("use_parallel_residual", True) is False:
        return "gpt_neox with use_parallel_residual=false adds attention and MLP in turn, which Phi does not"
    if source.model_type == "gptj" and not source.field("rotary_dim"):
        return "gptj without rotary_dim rotates by other angles than Phi"
    return None


def as_phi(checkpoint: Checkpoint, source: Folded, layout: str) -> Export:
    """Return the Phi model; smaller groups are filled up with zero heads."""
    names, group_size = SOURCES[source.model_type], source.group_size
    stock = stock_config(source)
    pieces = [*_ends(checkpoint, names)]
    for layer, entry in enumerate(source.entries):
        pieces += _layer(checkpoint, names, layer, entry, group_size, _rotary_order(source, entry))
    description = (
        f"PhiForCausalLM, the same function as {source.config['architectures'][0]}: loads in stock transformers"
    )
    rounded = [checkpoint.tensors[piece.replaced[0]].dtype for piece in pieces if piece.rounds]
    if any(dtype.itemsize < 4 for dtype in rounded):
        description += (
            f" (weights behind layer norms are rounded to {str(rounded[0]).removeprefix('torch.')} once more)"
        )
    unchanged = "the rest of the model is the original's under other names"
    unchanged += ", gains of layer norms multiplied into the weights behind them" if names.mlp_norm else ""
    return Export(layout, _phi_config(source, stock, group_size), pieces, description, unchanged=unchanged)


def _ends(checkpoint: Checkpoint, names: SourceNames) -> Iterator[Piece]:
    """Yield embeddings, the last norm and the head. Phi's head has a bias, tied or not."""
    head, embedding = f"{names.head}.weight", f"{names.embedding}.weight"
    for suffix in ("weight", "bias"):
        yield moved(f"{names.final_norm}.{suffix}", f"model.final_layernorm.{suffix}", checkpoint)
    if head in checkpoint.tensors:
        yield moved(embedding, "model.embed_tokens.weight", checkpoint)
        yield Linear(names.head, "lm_head", bias=True).piece(checkpoint)
        return
    has_bias = f"{names.head}.bias" in checkpoint.tensors
    tied = moved(embedding, "model.embed_tokens.weight", checkpoint)
    if has_bias:
        yield tied
        yield moved(f"{names.head}.bias", "lm_head.bias", checkpoint)
        return
    bias = filled(embedding, {"lm_head.bias": 0.0}, checkpoint.tensors[embedding].shape[0], checkpoint)
    yield Piece(tied.replaced, {**tied.shapes, **bias.shapes}, lambda read: {**tied.make(read), **bias.make(read)})


def _layer(
    checkpoint: Checkpoint,
    names: SourceNames,
    layer: int,
    entry: Entry,
    group_size: int,
    rotary: tuple[int, ...] | None,
) -> Iterator[Piece]:
    old, new = names.layer.format(layer=layer), f"model.layers.{layer}"
    slots, norm = entry.slots(group_size), f"{old}.{names.norm}"
    linear = partial(Linear, block=entry.head_dim, norm=norm if names.mlp_norm else "", bias=True)
    for role, rows, inside in (("q", slots, rotary), ("k", None, rotary), ("v", None, None)):
        new_name = f"{new}.self_attn.{role}_proj"
        yield linear(entry.names[role], new_name, rows=rows, inside=inside).piece(checkpoint)
    dense = Linear(entry.names["o"], f"{new}.self_attn.dense", columns=slots, block=entry.head_dim, bias=True)
    yield dense.piece(checkpoint)
    mlp_norm = f"{old}.{names.mlp_norm}" if names.mlp_norm else ""
    yield Linear(f"{old}.{names.fc1}", f"{new}.mlp.fc1", norm=mlp_norm, bias=True).piece(checkpoint)
    yield Linear(f"{old}.{names.fc2}", f"{new}.mlp.fc2", bias=True).piece(checkpoint)
    yield from _norms(checkpoint, norm, f"{new}.input_layernorm", mlp_norm)
    yield from (Piece((name,)) for buffer in names.buffers if (name := f"{old}.{buffer}") in checkpoint.tensors)


def _norms(checkpoint: Checkpoint, old: str, new: str, mlp_norm: str) -> Iterator[Piece]:
    """Yield the norm under its new name; of two norms, which are folded into the linears, one becomes the identity and the other is
    removed.
    """
    for suffix, identity in (("weight", 1.0), ("bias", 0.0)):
        if not mlp_norm:
            yield moved(f"{old}.{suffix}", f"{new}.{suffix}", checkpoint)
            continue
        size = checkpoint.tensors[f"{old}.{suffix}"].shape[0]
        yield filled(f"{old}.{suffix}", {f"{new}.{suffix}": identity}, size, checkpoint)
        yield Piece((f"{mlp_norm}.{suffix}",))


def _rotary_order(source: Folded, entry: Entry) -> tuple[int, ...] | None:
    """Return the dims of a head in Phi's order: the first of every pair, the second of every pair, then those that are not rotated."""
    if not (source.family.position and source.family.position.interleaved):
        return None
    rotary_dim = source.field("rotary_dim")
    return (*range(0, rotary_dim, 2), *range(1, rotary_dim, 2), *range(rotary_dim, entry.head_dim))


_KEPT = ("vocab_size", "max_position_embeddings", "initializer_range", "use_cache", "tie_word_embeddings")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _phi_config(source: Folded, stock: "PreTrainedConfig", group_size: int) -> dict[str, Any]:
    entry = source.entries[0]
    heads = group_size * entry.groups.num_kv_heads
    fields = {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "hidden_size": stock.hidden_size,
        "num_hidden_layers": stock.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": entry.groups.num_kv_heads,
        **{name: getattr(stock, name) for name in (*_KEPT, *_TOKENS)},
        **(_of_gpt_neox if source.model_type == "gpt_neox" else _of_gptj)(stock, entry.head_dim),
        "qk_layernorm": False,
    }
    fields |= {} if heads * entry.head_dim == stock.hidden_size else {"head_dim": entry.head_dim}
    return fields | {name: source.config[name] for name in ("dtype", "torch_dtype") if name in source.config}


def _of_gpt_neox(stock: Any, head_dim: int) -> dict[str, Any]:
    rope = stock.rope_parameters
    rotary_dim = int(stock.hidden_size // stock.num_attention_heads * rope["partial_rotary_factor"])
    return {
        "intermediate_size": stock.intermediate_size,
        "hidden_act": stock.hidden_act,
        "layer_norm_eps": stock.layer_norm_eps,
        "attention_dropout": stock.attention_dropout,
        "resid_pdrop": stock.hidden_dropout,
        "embd_pdrop": stock.hidden_dropout,
        "rope_parameters": {**rope, "partial_rotary_factor": _share(rotary_dim, head_dim)},
    }


def _of_gptj(stock: Any, head_dim: int) -> dict[str, Any]:
    return {
        "intermediate_size": stock.n_inner or 4 * stock.n_embd,
        "hidden_act": stock.activation_function,
        "layer_norm_eps": stock.layer_norm_epsilon,
        "attention_dropout": stock.attn_pdrop,
        "resid_pdrop": stock.resid_pdrop,
        "embd_pdrop": stock.embd_pdrop,
        # GPT-J knows no other base of its angles.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": _share(stock.rotary_dim, head_dim),
        },
    }


def _share(rotary_dim: int, head_dim: int) -> float:
    """Return the share of head_dim that is rotated, such that `int(head_dim * share)` is `rotary_dim`."""
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else math.nextafter(share, 2.0)
