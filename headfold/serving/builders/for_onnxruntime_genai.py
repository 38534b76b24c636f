"""Build a fold for onnxruntime-genai by its own model builder, in an environment that has onnxruntime-genai and transformers.

    python for_onnxruntime_genai.py -m FOLD -o OUT -p fp32 -e cpu -c CACHE --extra_options hf_remote=true

The options are those of `python -m onnxruntime_genai.models.builder`. The builder reads one number of heads for all layers, and of the
rotary frequencies of a Llama only Llama 3's, and it takes OLMo's LayerNorm for an RMSNorm; here each layer has the heads of its own
weights, the table is the one of the model, and OLMo has its norms.
Written by headfold; imports nothing of it.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

import onnxruntime_genai.models
import torch
import transformers

builder: Any = onnxruntime_genai.models
sys.path.insert(0, str(Path(builder.__file__).parent))

from builders.base import Model  # noqa: E402
from builders.llama import LlamaModel  # noqa: E402
from builders.olmo import OLMoModel  # noqa: E402

stock: Any = {name: getattr(Model, name) for name in ("make_model", "make_attention", "make_key_value_cache_shape")}
stock_config = transformers.AutoConfig.from_pretrained


def config_from(*arguments: Any, **keywords: Any) -> Any:
    """Return a config under the name of its stock class, with the first layer's numbers where they differ between layers."""
    found = stock_config(*arguments, **keywords)
    if isinstance(found, tuple):  # for the class that loads the weights, which wants it as it is
        return found
    name = found.architectures[0].removeprefix("PerLayer").replace("DeciLM", "Llama")
    layers = getattr(found, "per_layer_config", None)
    if layers and (
        not isinstance(layers, dict) or 0 in layers
    ):  # otherwise it is as transformers before 5.15 leaves it
        found = layers[0]
    found.architectures = [name]
    return found


def make_rope_init(model: Any, config: Any) -> None:
    """Refuse frequencies that change with the length; others are taken from the model."""
    table = config.rope_parameters
    if table["rope_type"] == "dynamic" or table.get("short_factor") != table.get("long_factor"):
        raise NotImplementedError(f"rotary frequencies of type {table['rope_type']} that change with the length")


def make_model(model: Any, input_path: str) -> None:
    """Read the weights first, as the inputs of the graph depend on their sizes."""
    weights = model.load_weights(input_path)
    model.load_weights, model.rotary = lambda _: weights, weights.base_model.rotary_emb
    attention = [layer.self_attn for layer in weights.base_model.layers]
    if isinstance(model, OLMoModel):
        model.layernorm_attrs |= {"simple": False, "epsilon": 1e-5}  # as transformers has it, by no field
    model.heads = [[p.out_features // model.head_size for p in (each.q_proj, each.k_proj)] for each in attention]
    stock["make_model"](model, input_path)


def make_key_value_cache_shape(model: Any, layer: int, shape: Any) -> Any:
    """Return the shape of a layer's cache, [batch, heads, length, head_dim]."""
    batch, _, *rest = stock["make_key_value_cache_shape"](model, layer, shape)
    return [batch, model.heads[layer][1], *rest]


def make_attention(model: Any, layer: int, *arguments: Any, **keywords: Any) -> None:
    """Make the attention of a layer with its own numbers of heads."""
    model.num_attn_heads, model.num_kv_heads = model.heads[layer]
    model.q_size, model.kv_size = (count * model.head_size for count in model.heads[layer])
    stock["make_attention"](model, layer, *arguments, **keywords)


def make_rotary_embedding_caches_from_scratch(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines of the model's own frequencies, [length, dims]."""
    angles = torch.outer(torch.arange(model.rope_attrs["cache_length"]).float(), model.rotary.inv_freq.float())
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * model.rotary.attention_scaling, angles.sin() * model.rotary.attention_scaling


if __name__ == "__main__":
    transformers.AutoConfig.from_pretrained = config_from  # type: ignore[method-assign]
    del LlamaModel.make_rope_init
    for function in (
        make_rope_init, make_model, make_key_value_cache_shape, make_attention, make_rotary_embedding_caches_from_scratch,
    ):  # fmt: skip
        setattr(Model, function.__name__, function)
    runpy.run_module("builder", run_name="__main__")
