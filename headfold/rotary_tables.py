"""Rotary tables for heads with a larger head_dim: every frequency of the source's table repeated, in the form of transformers'
`longrope`.

longrope divides each frequency θ^(-2p/dim) of a head by a factor, so any table can be expressed (docs/absorb.md, section 7). `where` names
the config in messages.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .core.errors import UserError
from .families.context import context_length, sliding_window
from .families.spec import Site
from .families.wrapped import language_config
from .hf_models.building import open_config

UNKNOWN_CONTEXT = 2048
"""Tokens that attention is assumed to span where the config names no limit."""


def table_of_multiple(config: Mapping[str, Any], where: str, head_dim_multiple: int) -> dict[str, Any]:
    """Return the config fields of a table `head_dim_multiple` times as large: plane p has the source's frequency p // head_dim_multiple.

    The table is the same at every context length, except for a source that uses longrope: it keeps its two tables.

    Raises:
        KeyError: the source's table changes with the context, or per layer (`families.spec.has_one_table`).
    """
    source = _read(config, where)
    rope = dict(source.rope_parameters)
    longest = source.max_position_embeddings
    trained = rope.get("original_max_position_embeddings", longest) if rope["rope_type"] == "longrope" else longest
    short, scaling = _frequencies(source, None)
    long, _ = _frequencies(source, trained + 1)
    kept = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    fields = {
        "rope_type": "longrope",
        **kept,
        "short_factor": _factors(short, rope["rope_theta"], head_dim_multiple),
        "long_factor": _factors(long, rope["rope_theta"], head_dim_multiple),
        "attention_factor": scaling,
        "factor": 1.0,
        "original_max_position_embeddings": trained,
    }
    return {"rope_parameters" if "rope_parameters" in language_config(config) else "rope_scaling": fields}


def rotary_table(config: Mapping[str, Any], where: str) -> tuple[Float[Tensor, " plane"], float]:
    """Return radians per token of every plane at a length that the model was trained on, and the factor of cosine and sine."""
    return _frequencies(_read(config, where), None)


def with_plane_frequencies(sites: list[Site], config: Mapping[str, Any], where: str) -> list[Site]:
    """Return the sites with the frequencies of their RoPE planes, where the config has one table for all of them.

    Raises:
        UserError: the frequencies are not finite.
    """
    if not any(site.key_freedom.rotary_dim for site in sites):
        return sites
    found = plane_frequencies(config, where)
    return [
        replace(site, key_freedom=replace(site.key_freedom, frequencies=found, context=_attention_span(config, layer)))
        if site.key_freedom.rotary_dim == 2 * len(found) > 0
        else site
        for layer, site in enumerate(sites)
    ]


def _attention_span(config: Mapping[str, Any], layer: int) -> int:
    """Return how many tokens a layer's attention can look back over: its sliding window, or the whole context."""
    whole, window = context_length(config) or UNKNOWN_CONTEXT, sliding_window(config, layer)
    return min(whole, window) if window else whole


def plane_frequencies(config: Mapping[str, Any], where: str) -> tuple[float, ...]:
    """Return radians per token of every plane, at a length that the model was trained on; empty where layers differ or none is known."""
    opened = open_config(language_config(config), where)
    try:
        found = _frequencies(_standardised(opened), None)[0]
    except (AttributeError, KeyError, TypeError, ValueError):  # every class writes its rotary parameters in its own way
        return ()
    if not (torch.isfinite(found).all() and (found >= 0).all()):
        raise UserError(
            f"{where}: expected rotary parameters that give finite frequencies, got others; correct the config"
        )
    return tuple(found.tolist())


def _read(config: Mapping[str, Any], where: str) -> Any:
    """Return the config as its class reads it, with rotary parameters in their present form."""
    return _standardised(open_config(language_config(config), where))


def _standardised(opened: Any) -> Any:
    opened.standardize_rope_params()
    return opened


def _frequencies(source: Any, length: int | None) -> tuple[Float[Tensor, " plane"], float]:
    """Return the frequencies of the source's table, in float32 as it computes them, and the factor of cosine and sine."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = source.rope_parameters
    if rope["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](source, torch.device("cpu"), seq_len=length)
    head_dim = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    theta = float(rope["rope_theta"])  # a whole number may be too long for a tensor
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)), 1.0


def _factors(frequencies: Float[Tensor, " plane"], theta: float, head_dim_multiple: int) -> list[float]:
    """Return one factor per plane, such that longrope's float32 arithmetic comes nearest to the source's frequencies."""
    wanted = frequencies.repeat_interleave(head_dim_multiple)
    dim = 2 * len(wanted)
    own = theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    first = (1.0 / (own.double() * wanted.double())).float()
    steps = [first]
    for direction in (-math.inf, math.inf):
        step = first
        for _ in range(4):
            step = torch.nextafter(step, torch.tensor(direction))
            steps.append(step)
    tried = torch.stack(steps)
    missed = (1.0 / (tried * own) - wanted).abs()
    return tried.gather(0, missed.argmin(0, keepdim=True))[0].tolist()
