"""The bytes of K and V that a token adds to the cache of a model: of an original, of what a plan makes of it, and of a fold on disk."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..core.heads import kv_bytes
from ..core.plan import Plan
from . import all_families
from .context import context_length
from .folded import kv_heads_by_layer
from .spec import COUNTS, Family, Site, read_count, read_field, sites
from .wrapped import attention_type

_NAMES = {
    "layers": "num_hidden_layers|num_layers|n_layer|n_layers",
    "heads": "num_attention_heads|num_heads|n_head|n_heads",
    "kv_heads": "|".join(COUNTS),
    "hidden_size": "hidden_size|d_model|n_embd|dim",
}
"""Names that config classes have for the same numbers; a literal says which one a family has."""


def cached_sites(every_site: Iterable[Site]) -> list[Site]:
    """Return the sites whose K and V are cached; an encoder beside a decoder caches nothing."""
    listed = list(every_site)
    return [site for site in listed if not site.optional] or listed


LONGEST = 32_768
"""Tokens of a full cache, where the model takes more or has no limit."""


def cache_bytes(config: Mapping[str, Any], every_site: Iterable[Site], itemsize: int, plan: Plan | None = None) -> int:
    """Return the bytes of the cache of one sequence of the whole context, of at most `LONGEST` tokens, as `plan` folds it.

    Cross-attention caches the positions of an encoder of sound, which are as many for every input; other encoders read as many tokens
    as the decoder writes.
    """
    tokens = min(context_length(config) or LONGEST, LONGEST)
    encoder = encoder_positions(config) or tokens
    return _bytes(every_site, itemsize, plan, lambda site: encoder if site.reads_encoder else tokens)


def encoder_positions(config: Mapping[str, Any]) -> int | None:
    """Return the positions of an encoder of sound, which are as many for every input; None where an input decides."""
    positions = config.get("max_source_positions")
    return positions if type(positions) is int and positions > 0 and "num_mel_bins" in config else None


def kv_bytes_per_token(every_site: Iterable[Site], itemsize: int, plan: Plan | None = None) -> int:
    """Return the bytes of K and V that one token adds to the cache over all sites, as `plan` folds them.

    A token of an encoder-decoder is one of the decoder for self-attention and one of the encoder for cross-attention.
    """
    return _bytes(every_site, itemsize, plan, lambda site: 1)


def _bytes(every_site: Iterable[Site], itemsize: int, plan: Plan | None, entries: Callable[[Site], int]) -> int:
    """Return the bytes of K and V that `entries` of every cached site take."""
    planned = {} if plan is None else plan.sites
    total = 0
    for site in cached_sites(every_site):
        fold = planned.get(site.name)
        heads = (site.num_kv_heads, site.head_dim) if fold is None else (fold.groups.num_kv_heads, fold.head_dim)
        total += entries(site) * kv_bytes(*heads, itemsize)
    return total


def stored_kv_bytes_per_token(config: Mapping[str, Any], tensors: Mapping[str, Any], itemsize: int) -> int:
    """Return the same of a checkpoint as it is on disk, an original or a fold in any layout.

    `config` has all fields of its class, `tensors` are those on disk by name, each with a `shape`. An architecture without a literal is
    counted by the names that such fields usually have.

    Raises:
        UserError: tensors that the literal names are missing, or the config has no such fields.
    """
    counts, listed = kv_heads_by_layer(config), (config.get("headfold") or {}).get("sites") or []
    family = next((one for one in all_families().values() if attention_type(config) in one.model_types), None)
    if counts is not None:
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return sum(kv_bytes(count, head_dim, itemsize) for count in counts)
    if family is not None and family.attentions:
        folded = {site["module"]: site for site in listed}
        made = [_as_listed(site, folded.get(site.core)) for site in sites(family, config, tensors)]
        return kv_bytes_per_token(made, itemsize)
    if listed:
        return sum(kv_bytes(*_listed_heads(site), itemsize) for site in listed)
    return _usual_kv_bytes(config.get("text_config") or config, itemsize)


def _as_listed(site: Site, entry: Mapping[str, Any] | None) -> Site:
    """Return the site with the heads that the config of a fold lists for it."""
    if entry is None:
        return site
    num_kv_heads, head_dim = _listed_heads(entry)
    return replace(site, num_kv_heads=num_kv_heads, head_dim=head_dim)


def _listed_heads(entry: Mapping[str, Any]) -> tuple[int, int]:
    return entry["kv_heads"], entry["head_dim"] * entry.get("slots", 1)


def _usual_kv_bytes(config: Mapping[str, Any], itemsize: int) -> int:
    unknown = Family(())
    layers, heads = (read_count(unknown, config, _NAMES[name]) for name in ("layers", "heads"))
    if config.get("kv_lora_rank"):  # multi-head latent attention
        return (
            layers * itemsize * sum(read_count(unknown, config, name) for name in ("kv_lora_rank", "qk_rope_head_dim"))
        )
    num_kv_heads = read_count(unknown, config, _NAMES["kv_heads"], heads)
    head_dim = read_field(unknown, config, "head_dim") or read_count(unknown, config, _NAMES["hidden_size"]) // heads
    return layers * kv_bytes(num_kv_heads, head_dim, itemsize)
