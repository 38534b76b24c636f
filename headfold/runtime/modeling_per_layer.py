"""Stock causal models whose layers differ in their counts of heads, as `per_layer_config` says: `PerLayer<StockClass>`.

Written by headfold; needs torch and transformers alone.
"""

import copy
import functools
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel


def configs_of_layers(config: Any) -> Any:
    """Return the config of each layer, also where transformers (before 5.15) leaves `per_layer_config` as it is written."""
    listed = config.per_layer_config
    if not isinstance(listed, dict) or 0 in listed:
        return listed
    found = []
    for layer in range(config.num_hidden_layers):
        found.append(copy.deepcopy(config))
        for name, value in listed.get(str(layer), {}).items():
            setattr(found[-1], name, value)
    return found


class PerLayerModel(PreTrainedModel):
    """The base of all such classes, in front of a stock class."""

    def __init__(self, config: Any, *arguments: Any, **keywords: Any) -> None:
        layers = configs_of_layers(config)
        # Stock classes read counts that such a config refuses to tell as a whole; that of one layer tells them.
        first = layers[0]
        super().__init__(first, *arguments, **keywords)
        stack: Any = self.base_model.layers
        for index in range(1, len(stack)):
            stack[index] = type(stack[index])(layers[index], index)
        config._attn_implementation_internal = first._attn_implementation
        # From here on modules read the config of the model, so that an attention implementation set later reaches all layers.
        for module in self.modules():
            if hasattr(module, "config"):
                module.config = config
        if self.base_model is not self:
            self.post_init()

    def save_pretrained(self, save_directory: Any, *arguments: Any, **keywords: Any) -> None:
        """Save as the stock class does, and the code beside the weights."""
        super().save_pretrained(save_directory, *arguments, **keywords)
        (Path(save_directory) / "modeling_per_layer.py").write_text(Path(__file__).read_text())

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: the code is saved, and the config's `auto_map` kept, without it."""


@functools.cache
def per_layer_class(name: str) -> type[PreTrainedModel]:
    """Return the per-layer class of a stock one by its name.

    Raises:
        AttributeError: transformers has no model class of that name.
    """
    stock = getattr(transformers, name, None)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise AttributeError(f"transformers {transformers.__version__} has no model class {name}")
    return type(f"PerLayer{name}", (PerLayerModel, stock), {"__module__": __name__, "__doc__": stock.__doc__})


def __getattr__(name: str) -> Any:
    if name.startswith("PerLayer"):
        return per_layer_class(name.removeprefix("PerLayer"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
