"""CTranslate2's descriptions of encoder-decoders: T5 and its kin, BART and its kin, Whisper."""

from typing import Any

import numpy as np

from .model import Heads, Model

_POSITION_OFFSETS = {"bart": 2, "mbart": 2}
"""Rows of the position table before the first position."""


def t5(model: Model) -> Any:
    """Return a T5, mT5 or UMT5: with a table of relative biases in the first layer of a stack, or in every one."""
    from ctranslate2.specs.transformer_spec import TransformerDecoderSpec, TransformerEncoderSpec, TransformerSpec

    config, made = model.config, []
    for name, kind in (("encoder", TransformerEncoderSpec), ("decoder", TransformerDecoderSpec)):
        layers = model.heads[f"{name}.self"]
        stack = kind(
            len(layers), model.num_heads(name), activation=model.activation("dense_act_fn"), ffn_glu=config.is_gated_act,
            relative_attention_bias=True, rms_norm=True,
        )  # fmt: skip
        stack.scale_embeddings = False
        model.fill(stack, layer_norm=f"{name}.final_layer_norm")
        model.fill_embeddings(stack, f"{name}.embed_tokens")
        for index, (layer, heads) in enumerate(zip(stack.layer, layers, strict=True)):
            _t5_layer(model, layer, name, index, heads)
        made.append(stack)
    encoder, decoder = made
    for index, (layer, heads) in enumerate(zip(decoder.layer, model.heads["decoder.cross"], strict=True)):
        norm = f"decoder.block.{index}.layer.1.layer_norm"
        layer.attention = model.attention(heads, norm, crosses=True, rms_norm=True)
    model.fill(decoder, projection="lm_head")
    # Earlier releases of transformers scale where embeddings are tied.
    if getattr(config, "scale_decoder_outputs", config.model_type != "mt5"):
        decoder.scale_outputs = config.d_model**-0.5
    return TransformerSpec(encoder, decoder)


def _t5_layer(model: Model, layer: Any, stack: str, index: int, heads: Heads) -> None:
    """Fill self-attention and MLP."""
    at, table = f"{stack}.block.{index}.layer", "layer.0.SelfAttention.relative_attention_bias.weight"
    first, own = (f"{stack}.block.{block}.{table}" for block in (0, index))
    attention = model.attention(heads, f"{at}.0.layer_norm", rms_norm=True, relative_attention_bias=True)
    attention.relative_attention_bias = model.tensors[own if own in model.tensors else first]
    attention.relative_attention_max_distance = np.int32(model.config.relative_attention_max_distance)
    layer.self_attention = attention
    mlp = f"{at}.{1 if stack == 'encoder' else 2}"
    dense = f"{mlp}.DenseReluDense"
    model.fill(layer.ffn, layer_norm=f"{mlp}.layer_norm", linear_1=f"{dense}.wo")
    if model.config.is_gated_act:
        model.fill(layer.ffn, linear_0=f"{dense}.wi_0", linear_0_noact=f"{dense}.wi_1")
    else:
        model.fill(layer.ffn, linear_0=f"{dense}.wi")


def bart(model: Model) -> Any:
    """Return a BART, mBART or Marian."""
    from ctranslate2.specs.transformer_spec import TransformerDecoderSpec, TransformerEncoderSpec, TransformerSpec

    kind, made = model.config.model_type, []
    for name, make in (("encoder", TransformerEncoderSpec), ("decoder", TransformerDecoderSpec)):
        stack = make(
            len(model.heads[f"{name}.self"]), model.num_heads(name), activation=model.activation("activation_function"),
            pre_norm=kind == "mbart", layernorm_embedding=kind != "marian",
        )  # fmt: skip
        norms = {"layernorm_embedding"} if kind == "bart" else {"layernorm_embedding", "layer_norm"}
        model.fill(stack, **{norm: f"model.{name}.{norm}" for norm in sorted(norms) if kind != "marian"})
        _bart_stack(model, stack, name)
        made.append(stack)
    encoder, decoder = made
    model.fill(decoder, projection="lm_head")
    if model.tensors["final_logits_bias"].any():
        decoder.projection.bias = model.tensors["final_logits_bias"][0]
    return TransformerSpec(encoder, decoder)


def whisper(model: Model) -> Any:
    """Return a Whisper."""
    from ctranslate2.specs.whisper_spec import WhisperSpec

    sizes = [
        size for name in ("encoder", "decoder") for size in (len(model.heads[f"{name}.self"]), model.num_heads(name))
    ]
    spec = WhisperSpec(*sizes)
    model.fill(spec.encoder, conv1="model.encoder.conv1", conv2="model.encoder.conv2")
    for name, stack in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        model.fill(stack, layer_norm=f"model.{name}.layer_norm")
        _bart_stack(model, stack, name)
    model.fill(spec.decoder, projection="proj_out")
    return spec


def _bart_stack(model: Model, stack: Any, name: str) -> None:
    """Fill embeddings and layers."""
    positions = model.tensors[f"model.{name}.embed_positions.weight"]
    stack.position_encodings.encodings = positions[_POSITION_OFFSETS.get(model.config.model_type, 0) :]
    if hasattr(stack, "embeddings"):  # Whisper's encoder has none
        scaled = getattr(model.config, "scale_embedding", False)
        stack.scale_embeddings = model.config.d_model**0.5 if scaled else False
        model.fill_embeddings(stack, f"model.{name}.embed_tokens")
    for index, layer in enumerate(stack.layer):
        at = f"model.{name}.layers.{index}"
        layer.self_attention = model.attention(model.heads[f"{name}.self"][index], f"{at}.self_attn_layer_norm")
        if name == "decoder":
            crossing = model.heads["decoder.cross"][index]
            layer.attention = model.attention(crossing, f"{at}.encoder_attn_layer_norm", crosses=True)
        model.fill(layer.ffn, layer_norm=f"{at}.final_layer_norm", linear_0=f"{at}.fc1", linear_1=f"{at}.fc2")
