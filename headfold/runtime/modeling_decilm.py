"""DeciLM in transformers: Llama layers with a number of K/V heads each, as `block_configs` says.

Written by headfold; needs torch and transformers alone. Blocks that an architecture search removed or made linear are not known.
"""

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, SeedOssConfig, SeedOssForCausalLM, SeedOssModel
from transformers.models.seed_oss.modeling_seed_oss import SeedOssDecoderLayer


class Block(dict[str, Any]):
    """A JSON object whose members are attributes too, as engines read them."""

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(name) from None
        return Block(value) if isinstance(value, dict) else value


class DeciLMConfig(SeedOssConfig):
    """Fields of Llama and `block_configs`. Seed-OSS is the Llama in transformers that tells the biases of q, k, v and o apart."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **fields: Any) -> None:
        fields = {"attention_dropout": 0.0, "residual_dropout": 0.0, "attention_bias": False, **fields}
        super().__init__(**{**fields, "num_key_value_heads": fields.get("num_attention_heads")})
        self.block_configs = [Block(block) for block in block_configs]

    def of_layer(self, layer: int) -> "DeciLMConfig":
        """Return the config of a model whose layers are all as this one."""
        block = self.block_configs[layer]
        if any(part.get(sign) for part in block.values() for sign in ("no_op", "replace_with_linear")):
            raise ValueError(f"block_configs: block {layer}: expected attention and MLP, got one that is replaced")
        config = copy.copy(self)
        config.num_key_value_heads = self.num_attention_heads // block.attention.n_heads_in_group
        config.attention_out_bias = self.attention_bias
        config.attention_bias = getattr(self, "qkv_bias", self.attention_bias)
        config.intermediate_size = getattr(block.ffn, "intermediate_size", None) or self._width_of(block.ffn.ffn_mult)
        return config

    def _width_of(self, multiple: float) -> int:
        """Return the intermediate size that a multiple stands for, as all readers of this config round it."""
        size = int(2 * multiple * self.hidden_size / 3)
        return size + -size % 256


class _DeciLM(PreTrainedModel):
    """The base of the classes below, in front of a stock class."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        layers: Any = self.base_model.layers
        for index in range(len(layers)):
            layers[index] = SeedOssDecoderLayer(config.of_layer(index), index)
            layers[index].self_attn.config = config
        if self.base_model is not self:
            self.post_init()

    def save_pretrained(self, save_directory: Any, *arguments: Any, **keywords: Any) -> None:
        """Save as the stock class does, and the code beside the weights."""
        super().save_pretrained(save_directory, *arguments, **keywords)
        (Path(save_directory) / "modeling_decilm.py").write_text(Path(__file__).read_text())

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: the code is saved, and the config's `auto_map` kept, without it."""


class DeciLMModel(_DeciLM, SeedOssModel):
    """The layers alone."""


class DeciLMForCausalLM(_DeciLM, SeedOssForCausalLM):
    """The layers and the language-model head."""
