"""CTranslate2's descriptions of the models that it runs, filled with the tensors of a fold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..rotary_tables import rotary_table
from .ct2_heads import Heads, Projection, Tensors
from .folded import Folded, stock_config

ACTIVATIONS = {
    "relu": "RELU", "gelu": "GELU", "gelu_new": "GELUTanh", "gelu_pytorch_tanh": "GELUTanh", "gelu_fast": "GELUTanh", "silu": "SWISH",
    "swish": "SWISH", "quick_gelu": "GELUSigmoid",
}  # fmt: skip
"""The activations of configs → those of CTranslate2."""
Stacks = Mapping[str, tuple[Heads, ...]]


@dataclass(frozen=True, slots=True)
class Model:
    """A fold that is written: its tensors by their names in the model, its config as the class reads it, and its heads."""

    source: Folded
    config: Any
    heads: Stacks
    tensors: Tensors

    def num_heads(self, stack: str) -> int:
        """Return the number of query heads that a stack is written with."""
        return len(self.heads[f"{stack}.self"][0].slots)

    @property
    def said(self) -> str:
        """The numbers of heads in words."""
        said = []
        for name, layers in self.heads.items():
            counts = [heads.num_kv_heads for heads in layers]
            counts = counts[:1] if len(set(counts)) == 1 else counts
            said.append(f"{name} {', '.join(map(str, counts))} of {len(layers[0].slots)}")
        return f"K/V heads {'; '.join(said)}"

    def activation(self, name: str) -> Any:
        """Return what CTranslate2 calls the activation in a field of the config."""
        from ctranslate2.specs.common_spec import Activation

        return Activation[ACTIVATIONS[getattr(self.config, name)]]

    def fill(self, spec: Any, **names: str) -> None:
        """Fill linears, norms, embeddings and convolutions, each given by its attribute, from the module of that name."""
        for attribute, name in names.items():
            self._fill(getattr(spec, attribute), name)

    def fill_embeddings(self, stack: Any, name: str) -> None:
        """Fill the embeddings of a stack; an encoder has a list of one."""
        embeddings = stack.embeddings
        (embeddings[0] if isinstance(embeddings, list) else embeddings).weight = self.tensors[f"{name}.weight"]

    def _fill(self, part: Any, name: str) -> None:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        if not hasattr(part, "gamma"):
            _fill_linear(part, (weight, bias))
            return
        part.gamma = weight
        if bias is not None:
            part.beta = bias
        if self.source.family.norm_gain_offset:
            part.layer_norm_use_residual = True

    def attention(self, heads: Heads, norm: str, crosses: bool = False, factor: float = 1.0, **options: Any) -> Any:
        """Return an attention with the norm before it; none where `norm` is empty. `factor` multiplies the logits."""
        from ctranslate2.specs.attention_spec import MultiHeadAttentionSpec

        made = MultiHeadAttentionSpec(
            self_attention=not crosses,
            num_heads_kv=heads.num_kv_heads,
            head_dim=heads.entry.head_dim,
            has_norm=bool(norm),
            **options,
        )
        for linear, roles in zip(made.linear, ("q", "kv") if crosses else ("qkv",), strict=False):
            _fill_linear(linear, heads.inputs(self.tensors, roles))
        _fill_linear(made.linear[-1], heads.output(self.tensors))
        made.queries_scale = float(heads.scale * factor)
        if norm:
            self.fill(made, layer_norm=norm)
        return made


def _fill_linear(spec: Any, projection: Projection) -> None:
    spec.weight, bias = projection
    if bias is not None:
        spec.bias = bias


def llama(model: Model) -> Any:
    """Return a model of Llama's kind: Mistral, Qwen 2 and 3, Gemma."""
    from ctranslate2.specs.transformer_spec import TransformerDecoderModelSpec

    layers, has_norms = model.heads["layers.self"], model.source.family.attentions[0].q_norm
    spec = TransformerDecoderModelSpec.from_config(
        len(layers), model.num_heads("layers"), activation=model.activation("hidden_act"), ffn_glu=True, rms_norm=True,
        rotary_dim=0,
    )  # fmt: skip
    decoder, rotary = spec.decoder, _Rotary.of(model.source)
    decoder.scale_embeddings = model.config.hidden_size**0.5 if model.source.model_type == "gemma" else False
    model.fill(decoder, embeddings="model.embed_tokens", layer_norm="model.norm", projection="lm_head")
    for index, (layer, heads) in enumerate(zip(decoder.layer, layers, strict=True)):
        at = f"model.layers.{index}"
        layer.self_attention = rotary.attention(
            model, heads, f"{at}.input_layernorm", rms_norm=True, qk_norm=bool(has_norms)
        )
        if has_norms:
            model.fill(layer.self_attention, q_norm=f"{at}.self_attn.q_norm", k_norm=f"{at}.self_attn.k_norm")
        model.fill(layer.ffn, layer_norm=f"{at}.post_attention_layernorm", linear_0=f"{at}.mlp.gate_proj")
        model.fill(layer.ffn, linear_0_noact=f"{at}.mlp.up_proj", linear_1=f"{at}.mlp.down_proj")
    return spec


def phi(model: Model) -> Any:
    """Return a Phi, which Pythia and GPT-J become by the layout native: attention and MLP read one norm."""
    from ctranslate2.specs.transformer_spec import TransformerDecoderModelSpec

    layers = model.heads["layers.self"]
    spec = TransformerDecoderModelSpec.from_config(
        len(layers), model.num_heads("layers"), activation=model.activation("hidden_act"), rotary_dim=0,
        parallel_residual=True, shared_layer_norm=True,
    )  # fmt: skip
    decoder, rotary = spec.decoder, _Rotary.of(model.source)
    decoder.scale_embeddings = False
    model.fill(decoder, embeddings="model.embed_tokens", layer_norm="model.final_layernorm", projection="lm_head")
    for index, (layer, heads) in enumerate(zip(decoder.layer, layers, strict=True)):
        at = f"model.layers.{index}"
        layer.self_attention = rotary.attention(model, heads, "")
        model.fill(layer, shared_layer_norm=f"{at}.input_layernorm")
        model.fill(layer.ffn, linear_0=f"{at}.mlp.fc1", linear_1=f"{at}.mlp.fc2")
    return spec


@dataclass(frozen=True, slots=True)
class _Rotary:
    """The rotary table: plain frequencies of a base, divided by factors where there are any."""

    dim: int
    base: float
    factors: torch.Tensor | None
    logit_factor: float

    @classmethod
    def of(cls, source: Folded) -> "_Rotary":
        """Return the table of a model. Cosine and sine with a factor give logits with its square."""
        frequencies, factor = rotary_table(source.config)
        rope, dim = stock_config(source).rope_parameters, 2 * len(frequencies)
        theta = float(rope["rope_theta"])
        plain = theta ** -(torch.arange(0, dim, 2).double() / dim)
        factors = None if rope["rope_type"] == "default" else (plain / frequencies.double()).float()
        return cls(dim, theta, factors, factor**2)

    def attention(self, model: Model, heads: Heads, norm: str, **options: Any) -> Any:
        """Return an attention with this table."""
        from ctranslate2.specs.attention_spec import RotaryScalingType

        made = model.attention(
            heads, norm, factor=self.logit_factor, rotary_dim=self.dim, rotary_interleave=False, rotary_base=self.base,
            rotary_scaling_type=None if self.factors is None else RotaryScalingType.Su, **options,
        )  # fmt: skip
        if self.factors is not None:  # one table for all lengths
            made.rotary_scaling_long_factor = made.rotary_scaling_short_factor = self.factors
        return made
