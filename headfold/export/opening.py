"""The class that opens an export in this process, without code from the directory."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_class(config: Mapping[str, Any]) -> "type[PreTrainedModel] | None":
    """Headfold's own where the export brings code along, None where a stock class opens it."""
    name = config["architectures"][0]
    if name.startswith("PerLayer"):
        from .modeling_per_layer import per_layer_class

        return per_layer_class(name.removeprefix("PerLayer"))
    if name == "DeciLMForCausalLM":
        from transformers import AutoConfig

        from .modeling_decilm import DeciLMConfig, DeciLMForCausalLM

        AutoConfig.register(DeciLMConfig.model_type, DeciLMConfig, exist_ok=True)
        return DeciLMForCausalLM
    return None
