"""The rotary tables of a GGUF file, which transformers leaves out when it reads one: factors of frequencies, as fields of a config."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import UserError

TABLES = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The other numbers of the rule, the same in every published model that has it."""
_CLOSE = 1e-4


def with_rotary_tables(
    config: dict[str, Any], fields: Mapping[str, Any], read: Callable[[str], Float[Tensor, " plane"] | None], path: Path
) -> dict[str, Any]:
    """Return a config with the rotary parameters that the file's tables give; `read` returns a table by name, None where there is none.

    Factors by the rule of Llama 3 become that rule, which every engine knows, others `longrope`, which divides by factors as they are.

    Raises:
        UserError: the file scales positions by another rule, of which transformers reads nothing.
    """
    architecture = fields.get("general.architecture")
    kind = fields.get(f"{architecture}.rope.scaling.type", "none")
    factors, short, long = (read(name) for name in TABLES)
    rope = dict(config.get("rope_parameters") or {})
    if kind not in ("none", "longrope") and rope.get("rope_type", "default") == "default":
        raise UserError(
            f"{path}: {architecture}.rope.scaling.type: expected a RoPE that transformers reads from GGUF, got {kind!r:.40}; start from "
            "the checkpoint that it was made of"
        )
    if factors is None and (short is None or long is None):
        return config
    trained = fields.get(f"{architecture}.rope.scaling.original_context_length") or config["max_position_embeddings"]
    if factors is not None and (rule := _llama_3(factors, float(rope["rope_theta"]))):
        rope |= rule
    else:
        first, last = (factors, factors) if factors is not None else (short, long)
        assert first is not None and last is not None
        rope |= {"rope_type": "longrope", "short_factor": first.tolist(), "long_factor": last.tolist()}
        rope["original_max_position_embeddings"] = trained
        scale = fields.get(f"{architecture}.rope.scaling.attn_factor")
        rope |= {"attention_factor": scale} if scale is not None else {}
        if factors is not None:
            rope |= {"attention_factor": 1.0, "factor": 1.0}
    return {**config, "rope_parameters": rope}


def _llama_3(factors: Float[Tensor, " plane"], theta: float) -> dict[str, Any] | None:
    """Return the parameters of the rule of Llama 3 that gives these factors; None where it gives others."""
    dim = 2 * len(factors)
    factor = float(factors.max())
    turns = _LLAMA_3["original_max_position_embeddings"] / (
        2 * torch.pi * theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    )
    low, high = _LLAMA_3["low_freq_factor"], _LLAMA_3["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - share) / factor + share)
    if not torch.allclose(factors.double(), expected, rtol=_CLOSE, atol=0):
        return None
    return {"rope_type": "llama3", "factor": round(factor, 4), **_LLAMA_3}
