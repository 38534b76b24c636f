"""Export a fold for OpenVINO by optimum-intel, in an environment that has optimum-intel and openvino.

    python for_openvino.py export openvino --model FOLD --task text-generation-with-past --trust-remote-code OUT

The options are those of `optimum-cli`. That traces a model with an example of a cache that has as many K/V heads in all layers, and does
not know DeciLM; here the example has the heads of each layer, and DeciLM is exported as a Llama. Written by headfold; imports nothing of
it.

In OpenVINO 2026.4 paged attention on a CPU, which OpenVINO GenAI uses by default, is wrong without an error where layers with the same
number of K/V heads differ in their query heads: run these with `LLMPipeline(OUT, "CPU", ATTENTION_BACKEND="SDPA")`.
"""

import sys
from collections.abc import Callable
from typing import Any

from optimum.commands.optimum_cli import main
from optimum.exporters.openvino.model_configs import LlamaOpenVINOConfig, register_in_tasks_manager
from optimum.utils import input_generators as examples


def heads_of_layers(config: Any, num_layers: int, name: str = "num_key_value_heads") -> list[int]:
    """Return the number of K/V heads, or of `num_attention_heads`, of each layer."""
    if hasattr(config, "block_configs"):
        groups = [block["attention"]["n_heads_in_group"] for block in config.block_configs]
        return [config.num_attention_heads // (size if name == "num_key_value_heads" else 1) for size in groups]
    listed = getattr(config, "per_layer_config", None) or {}
    count = getattr(config, name, None) or config.num_attention_heads
    return [listed.get(str(layer), {}).get(name, count) for layer in range(num_layers)]


def warn_of_paged_attention(config: Any, num_layers: int) -> None:
    """Print a warning where paged attention on a CPU would be wrong."""
    counts = heads_of_layers(config, num_layers)
    if len({*zip(counts, heads_of_layers(config, num_layers, "num_attention_heads"), strict=True)}) > len({*counts}):
        print('Warning: on a CPU, run this in OpenVINO GenAI with ATTENTION_BACKEND="SDPA" alone', file=sys.stderr)


def with_heads_of_layers(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes the example of a cache as `generate` does, with the heads of each layer."""

    def generated(generator: Any, *arguments: Any, **keywords: Any) -> Any:
        example = generate(generator, *arguments, **keywords)
        pairs = zip(example, heads_of_layers(generator.config, len(example)), strict=True)
        return [tuple(part[:, :1].repeat(1, count, 1, 1) for part in pair) for pair, count in pairs]

    return generated


def with_config(start: Callable[..., None]) -> Callable[..., None]:
    """Return a constructor that keeps the config, too."""

    def started(generator: Any, task: str, normalized_config: Any, **sizes: Any) -> None:
        start(generator, task, normalized_config, **sizes)
        if getattr(normalized_config.config, "per_layer_config", None):
            warn_of_paged_attention(normalized_config.config, generator.num_layers)
        generator.config = normalized_config.config

    return started


@register_in_tasks_manager("nemotron-nas", "text-generation", "text-generation-with-past", library_name="transformers")
class DeciLMOpenVINOConfig(LlamaOpenVINOConfig):
    """DeciLM, whose layers are Llama's."""


if __name__ == "__main__":
    examples.DummyPastKeyValuesGenerator.__init__ = with_config(examples.DummyPastKeyValuesGenerator.__init__)
    for kind in ("", "Mistral", "Gemma"):
        generator = getattr(examples, f"{kind}DummyPastKeyValuesGenerator")
        generator.generate = with_heads_of_layers(generator.generate)
    main()
