"""Experts in GGUF files: llama.cpp stacks those of a layer, a tensor for each projection; a checkpoint has a tensor for each expert."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float32
from numpy import ndarray

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MIXTURES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
"""Architectures of llama.cpp by the names under which transformers lists those that it reads."""
_SIZES = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Fields of a GGUF file that transformers does not read, and what configs call them."""
_STACKED = re.compile(r"blk\.\d+\.ffn_(gate|up|down)_exps")
_JOINED = re.compile(r"(.+\.mlp\.experts)\.(gate_up|down)_proj")


@dataclass(frozen=True, slots=True)
class Experts:
    """Which tensors of a file hold experts, and what those are called in a checkpoint."""

    count: int
    names: Mapping[str, str]
    """Tensor of the file → the names of its experts, with `{}` for the number of each."""

    @classmethod
    def of(cls, names: Mapping[str, str], config: "PreTrainedConfig") -> "Experts":
        """Find them among the names that transformers gives to tensors: parameters of a model that joins what a checkpoint has apart."""
        found = {}
        for name, parameter in names.items():
            stacked, joined = _STACKED.fullmatch(name), _JOINED.fullmatch(parameter)
            if stacked and joined:
                found[f"{name}.weight"] = f"{joined[1]}.{{}}.{stacked[1]}_proj.weight"
        return cls(getattr(config, "num_experts", 0), found)

    def names_in_checkpoint(self, names: Mapping[str, str]) -> tuple[str, ...]:
        """Return the names of all tensors of the checkpoint."""
        found: dict[str, None] = {}
        for name, parameter in names.items():
            pattern = self.names.get(f"{name}.weight", parameter)
            found |= dict.fromkeys(map(pattern.format, range(self.count)) if "{}" in pattern else [parameter])
        return tuple(found)

    def shape(self, name: str, joined: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a tensor of the file; `joined` is that of the parameter, which has gate and up in one."""
        count, outputs, inputs = joined
        return count, outputs if "_down_" in name else outputs // 2, inputs

    def apart(
        self, name: str, numbers: Float32[ndarray, "expert outputs inputs"]
    ) -> Iterator[tuple[str, Float32[ndarray, "outputs inputs"]]]:
        """Yield the experts of a tensor of the file by their names in the checkpoint."""
        for number, weight in enumerate(numbers):
            yield self.names[name].format(number), weight


def set_expert_sizes(config: "PreTrainedConfig", fields: Mapping[str, Any]) -> None:
    """Set the sizes of experts in a config that transformers has made of a file, which leaves them at its defaults."""
    architecture = fields["general.architecture"]
    for field, name in _SIZES.items():
        size = fields.get(f"{architecture}.{field}")
        if hasattr(config, name) and type(size) is int:
            setattr(config, name, size)


def unread_experts(fields: Mapping[str, Any], left: list[str]) -> str:
    """Return what to say of a mixture of experts among whose tensors some have no names, such as Mixtral's; an empty text of another."""
    architecture = fields["general.architecture"]
    count = fields.get(f"{architecture}.expert_count")
    if not count or not any("_exps" in name for name in left):
        return ""
    return f"a mixture of {count} experts of the architecture {architecture} (such as Mixtral), with "
