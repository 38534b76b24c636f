"""CTranslate2's descriptions of models of Llama's kind, and of Phi."""

from dataclasses import dataclass
from typing import Any

import torch

from ..rotary_tables import rotary_table
from .model import Heads, Model


def llama(model: Model) -> Any:
    """Return a model of Llama's kind: Mistral, Qwen 2 and 3, Gemma."""
    from ctranslate2.specs.transformer_spec import TransformerDecoderModelSpec

    layers, has_norms = model.heads["layers.self"], bool(model.family.attentions[0].q_norm)
    spec = TransformerDecoderModelSpec.from_config(
        len(layers), model.num_heads("layers"), activation=model.activation("hidden_act"), ffn_glu=True, rms_norm=True,
        rotary_dim=0,
    )  # fmt: skip
    decoder, rotary = spec.decoder, _Rotary.of(model.config)
    decoder.scale_embeddings = model.config.hidden_size**0.5 if model.config.model_type == "gemma" else False
    model.fill(decoder, embeddings="model.embed_tokens", layer_norm="model.norm", projection="lm_head")
    for index, (layer, heads) in enumerate(zip(decoder.layer, layers, strict=True)):
        at = f"model.layers.{index}"
        layer.self_attention = rotary.attention(model, heads, f"{at}.input_layernorm", rms_norm=True, qk_norm=has_norms)
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
    decoder, rotary = spec.decoder, _Rotary.of(model.config)
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
    def of(cls, config: Any) -> "_Rotary":
        """Return the table of a model. Cosine and sine with a factor give logits with its square."""
        frequencies, factor = rotary_table(config.to_dict(), "config.json")
        rope, dim = config.rope_parameters, 2 * len(frequencies)
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
