"""A model to be described for CTranslate2: tensors, config, the heads of each attention, and the parts that descriptions share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..families.spec import Family

ACTIVATIONS = {
    "relu": "RELU", "gelu": "GELU", "gelu_new": "GELUTanh", "gelu_pytorch_tanh": "GELUTanh", "gelu_fast": "GELUTanh", "silu": "SWISH",
    "swish": "SWISH", "quick_gelu": "GELUSigmoid",
}  # fmt: skip
"""The activations of configs → those of CTranslate2."""


@dataclass(frozen=True, slots=True)
class Heads:
    """One attention as it is written: equal groups of neighbours. `names` maps role to the linear's name in the model."""

    names: Mapping[str, str]
    slots: tuple[int, ...]
    """Written query head → query head of the fold; one past the last is a zero head."""
    num_kv_heads: int
    head_dim: int
    scale: float
    """That of the softmax."""


@dataclass(frozen=True, slots=True)
class Model:
    """What is described: `config` as its class reads it, `heads` by layer for `encoder.self`, `decoder.self`, `decoder.cross` or
    `layers.self`, `tensors` by their names in the model, with projections in the order of these heads.
    """

    family: Family
    config: Any
    heads: Mapping[str, tuple[Heads, ...]]
    tensors: Mapping[str, Tensor]

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
        """Fill linears, norms and convolutions, each given by its attribute, from the module of that name."""
        for attribute, name in names.items():
            part = getattr(spec, attribute)
            bias = self.tensors.get(f"{name}.bias")
            is_norm = hasattr(part, "gamma")
            setattr(part, "gamma" if is_norm else "weight", self.tensors[f"{name}.weight"])
            if bias is not None:
                setattr(part, "beta" if is_norm else "bias", bias)
            if is_norm and self.family.norm_gain_offset:
                part.layer_norm_use_residual = True

    def fill_embeddings(self, stack: Any, name: str) -> None:
        """Fill the embeddings of a stack; an encoder has a list of one."""
        embeddings = stack.embeddings
        (embeddings[0] if isinstance(embeddings, list) else embeddings).weight = self.tensors[f"{name}.weight"]

    def attention(self, heads: Heads, norm: str, crosses: bool = False, factor: float = 1.0, **options: Any) -> Any:
        """Return an attention with the norm before it; none where `norm` is empty. `factor` multiplies the logits."""
        from ctranslate2.specs.attention_spec import MultiHeadAttentionSpec

        made = MultiHeadAttentionSpec(
            self_attention=not crosses,
            num_heads_kv=heads.num_kv_heads,
            head_dim=heads.head_dim,
            has_norm=bool(norm),
            **options,
        )
        for linear, roles in zip(made.linear, ("q", "kv", "o") if crosses else ("qkv", "o"), strict=True):
            self._join(linear, [heads.names[role] for role in roles])
        made.queries_scale = float(heads.scale * factor)
        if norm:
            self.fill(made, layer_norm=norm)
        return made

    def _join(self, linear: Any, names: list[str]) -> None:
        """Fill one linear with several, one below the other; those without a bias have one of zeros where another has one."""
        weights = [self.tensors[f"{name}.weight"] for name in names]
        biases = [self.tensors.get(f"{name}.bias") for name in names]
        linear.weight = torch.cat(weights)
        if any(bias is not None for bias in biases):
            pairs = zip(weights, biases, strict=True)
            linear.bias = torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in pairs])
