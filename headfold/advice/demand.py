"""What a model keeps in memory, and reads for a new token, at each number of K/V heads."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from math import gcd, prod
from typing import Any

from ..conversion.source import Source
from ..core.heads import kv_bytes
from ..families.cached import encoder_positions
from ..families.context import sliding_window
from ..families.layout import planned_shapes
from ..families.spec import Site
from ..families.wrapped import language_config, place_of

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_ACTIVE = ("num_experts_per_tok", "experts_per_token", "num_selected_experts")


@dataclass(frozen=True, slots=True)
class CachedBlock:
    """An attention block whose K and V are cached, at some number of K/V heads."""

    bytes_per_token: int
    window: int | None = None
    """Tokens that it looks back over, and keeps, at most; None for all."""
    reads_encoder: bool = False
    """Whether its cache has an entry for each token of the encoder rather than of the decoder."""


@dataclass(frozen=True, slots=True)
class Demand:
    """The demand of a model at one number of K/V heads: bytes of weights, and the blocks that cache."""

    num_kv_heads: int
    weight_bytes: int
    """Of all tensors."""
    dense_bytes: float
    """Of the tensors that every new token reads."""
    expert_bytes: float
    """Of all experts together."""
    itemsize: int
    blocks: tuple[CachedBlock, ...] = ()
    active_experts: float = 1.0
    """The share of the experts that one token uses."""
    encoder_tokens: int | None = None
    """Tokens of the encoder; None where an input has any number of them."""

    def cache_bytes(self, context: int) -> int:
        """Return the bytes of the cache of one sequence of `context` tokens, with an input of as many where the model reads one."""
        return sum(block.bytes_per_token * self._kept(block, context) for block in self.blocks)

    def _kept(self, block: CachedBlock, context: int) -> int:
        if block.reads_encoder:
            return self.encoder_tokens or context
        return context if block.window is None else min(context, block.window)

    def read_bytes(self, batch: int) -> float:
        """Return the bytes of weights that one decoding step of a batch reads; tokens choose their experts independently."""
        return self.dense_bytes + self.expert_bytes * (1 - (1 - self.active_experts) ** batch)

    @property
    def operations_per_token(self) -> float:
        """The floating-point operations of the linear layers for one token."""
        return 2 * (self.dense_bytes + self.expert_bytes * self.active_experts) / self.itemsize


def demands(source: Source) -> Iterator[Demand]:
    """Yield the demand of a model as it is, then of its folds, from the most K/V heads to one.

    They are the folds with one number of K/V heads and the source's head_dim. Weights and cache are counted in the checkpoint's dtype.
    """
    yield _demand(source, None)
    fewest = reduce(gcd, (site.num_kv_heads for site in source.sites))
    for count in range(fewest, 0, -1):
        if fewest % count == 0 and count < source.num_kv_heads:
            yield _demand(source, count)


def _demand(source: Source, num_kv_heads: int | None) -> Demand:
    config, stored = language_config(source.config), source.checkpoint.tensors
    shapes = _shapes(source, num_kv_heads)
    dtypes = {name: stored[name].dtype if name in stored else source.dtype for name in shapes}
    sizes = {name: prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    skipped = _not_read(source, shapes)
    experts = _field(config, _EXPERTS)
    expert_names = {name for name, shape in shapes.items() if experts and _is_expert(name, shape, experts)}
    return Demand(
        num_kv_heads=num_kv_heads or source.num_kv_heads,
        weight_bytes=sum(sizes.values()),
        dense_bytes=sum(size for name, size in sizes.items() if name not in expert_names | skipped),
        expert_bytes=sum(sizes[name] for name in expert_names - skipped),
        itemsize=source.dtype.itemsize,
        blocks=tuple(
            _block(source, site, layer, num_kv_heads)
            for layer, site in enumerate(source.every_site)
            if source.caches and site in source.cached_sites
        ),
        active_experts=min(1.0, (_field(config, _ACTIVE) or experts or 1) / (experts or 1)),
        encoder_tokens=encoder_positions(config),
    )


def _block(source: Source, site: Site, layer: int, num_kv_heads: int | None) -> CachedBlock:
    folded = num_kv_heads is not None and site in source.sites
    count = num_kv_heads if folded and num_kv_heads is not None else site.num_kv_heads
    size = kv_bytes(count, site.head_dim, source.dtype.itemsize)
    window = None if site.reads_encoder or site.stack else sliding_window(source.config, layer)
    return CachedBlock(size, window, site.reads_encoder)


def _shapes(source: Source, num_kv_heads: int | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors by name, as a fold to `num_kv_heads` leaves them (None: as they are)."""
    shapes = {name: tuple(info.shape) for name, info in source.checkpoint.tensors.items()}
    if num_kv_heads is None:
        return shapes
    for site in source.sites:
        before = planned_shapes(site, site.num_kv_heads, shapes.__getitem__)
        after = planned_shapes(site, num_kv_heads, shapes.__getitem__)
        for name in before:
            del shapes[name]
        shapes |= after
    return shapes


def _not_read(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Return the tensors that a decoding step does not read: tables of which it takes rows, the encoder, K and V of its output."""
    text = language_config(source.config)
    text = text.get("text_config") or text
    tables = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == text.get("vocab_size")]
    skipped = set(tables) - set(sorted(tables, key=lambda name: "head" in name or "out" in name)[-1:])
    if not source.caches:
        return set(tables)
    place = place_of(source.config, shapes, is_base_model=False)
    if place is not None:  # of a wrapper, a token runs through its language model alone
        skipped |= {name for name in shapes if not name.startswith(place.on_disk) and "lm_head" not in name}
    for site in source.every_site:
        if site.reads_encoder:
            heads = tuple(f"{site.weights[role]}." for role in "kv" if role in site.weights)
            skipped |= {name for name in shapes if name.startswith(heads)}
        elif site not in source.cached_sites:
            # `model.encoder.layers.3.self_attn.k_proj` → every tensor of the layers of that stack.
            stack = re.split(r"\.\d+\.", site.weights["o"])[0]
            skipped |= {name for name in shapes if name.startswith(f"{stack}.")}
    return skipped


def _is_expert(name: str, shape: tuple[int, ...], num_experts: int) -> bool:
    """Return whether a tensor belongs to experts, one each or all of them stacked."""
    return "experts" in name.split(".") or (len(shape) == 3 and shape[0] == num_experts)


def _field(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """Return the first of these fields that has a positive whole number."""
    found = (config.get(name) for name in names)
    return next((value for value in found if type(value) is int and value > 0), None)
