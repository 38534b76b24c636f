"""The arithmetic of a forward pass, counted from the shapes of the tensors on disk."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ..families.spec import Site
from ..families.wrapped import AUDIO, VISION, language_config

_PATCHES = {"image_size": 224, "patch_size": 16}
"""What image models are told of their input, and the sizes that their classes assume."""
_FRAMES = 400
"""Positions of a piece of sound that an encoder of its samples sees."""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Floating-point operations of one forward pass of one item: a window of text, a pair, an image."""

    blocks: float
    sites: Mapping[str, float]
    """By site, those of its projections and its attention; `blocks` contains them."""
    queries: Mapping[str, int]
    """Queries by site."""
    logits: Mapping[str, int]
    """Attention logits of a query by site: those of all heads for all keys."""
    head: float
    """Operations of the output head, if it reads every position."""
    encoder: float = 0.0
    """Operations of the stack that another one reads by cross-attention; `blocks` contains them."""


def arithmetic(
    sites: Sequence[Site], tensors: Mapping[str, Any], config: Mapping[str, Any], kind: str, length: int
) -> Arithmetic:
    """Return the operations on one item of `kind` (`corpus.samples.kind_of`), whose texts have `length` tokens.

    `tensors` are those on disk by name, each with a `shape`. Of routed experts, those count that a token is sent to; without
    an encoder in the checkpoint, its output is taken to be as long as a text.
    """
    stacks: dict[str, int] = {}
    read, products, queries, logits = {}, {}, {}, {}
    for site in sites:
        own = _positions(site, config, kind, length)
        keys = max(stacks.values(), default=own) if site.reads_encoder else own
        stacks[_stack(site.weights["o"])] = own
        read[site.name] = {
            site.tensor(role): keys if role in ("k", "v") else own
            for role in ("q", "k", "v", "qkv", "o")
            if role in site.weights and site.tensor(role) in tensors
        }
        queries[site.name], logits[site.name] = own, keys * site.num_heads
        causal = kind in ("text", "pairs", "audio") and not (site.reads_encoder or site.optional)
        products[site.name] = 4 * own * keys * site.num_heads * site.head_dim / (2 if causal else 1)
    language = language_config(config)
    num_experts = next((n for name in _EXPERTS if (n := language.get(name))), 1)
    sent = (language.get("num_experts_per_tok") or num_experts) / num_experts
    matrices = {n: info.shape for n, info in tensors.items() if len(info.shape) > 1 and not n.endswith("bias")}
    rows = {name: n for site in read.values() for name, n in site.items()}
    inside = {name: rows.get(name, stacks[stack]) for name in matrices if (stack := _stack(name)) in stacks}
    work = {name: 2 * n * prod(matrices[name]) * (sent if ".experts." in name else 1) for name, n in inside.items()}
    by_site = {name: products[name] + sum(work[tensor] for tensor in read[name]) for name in products}
    decoders = {_stack(site.weights["o"]) for site in sites if site.reads_encoder}
    encoders = stacks.keys() - decoders if decoders else set()
    encoder = sum(n for name, n in work.items() if _stack(name) in encoders)
    encoder += sum(products[site.name] for site in sites if _stack(site.weights["o"]) in encoders)
    head = 2 * length * max((prod(shape) for name, shape in matrices.items() if name not in inside), default=0)
    return Arithmetic(sum(work.values()) + sum(products.values()), by_site, queries, logits, head, encoder)


def _stack(name: str) -> str:
    """Return what a tensor's name has before the first number: `model.layers` of `model.layers.3.mlp.up_proj.weight`, or all of it."""
    return name[: found.start()] if (found := re.search(r"(^|\.)\d+\.", name)) else name


def _pair(config: Mapping[str, Any], name: str, usual: int) -> tuple[int, int]:
    """Return height and width, which a config gives as one number where they are equal."""
    size = config.get(name) or usual
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _positions(site: Site, config: Mapping[str, Any], kind: str, length: int) -> int:
    """Return the positions of an item in the stack of the site: frames, patches and the class token, or tokens."""
    if kind == "sound":
        return _FRAMES
    if site.stack == AUDIO or (kind == "audio" and site.optional):
        return (config.get("audio_config") or config).get("max_source_positions", 1500)
    if kind == "images" or site.stack == VISION:
        vision = config.get("vision_config") or config
        (height, width), (rows, columns) = (_pair(vision, name, usual) for name, usual in _PATCHES.items())
        return (height // rows) * (width // columns) + 1
    return length
