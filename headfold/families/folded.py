"""The config.json of a fold: counts of K/V heads where the stock class reads them, else a list of sites for headfold's runtime."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from ..core.errors import UserError
from ..core.groups import Groups
from .old_names import ROTARY_NAMES, with_old_names
from .spec import Family, Site
from .wrapped import language_config, with_language_config

_COUNT_IS_READ = ("bert", "roberta", "xlm-roberta", "camembert")
"""Model types whose class in transformers has no grouped heads, and that llama.cpp runs with as many as the config says."""


def folded_config(
    family: Family,
    config: Mapping[str, Any],
    sites: Iterable[Site],
    num_kv_heads: Mapping[str, int],
    uneven: Mapping[str, Groups] = MappingProxyType({}),
    head_dim_multiples: Mapping[str, int] = MappingProxyType({}),
    rotary: Callable[[int], Mapping[str, Any]] = lambda head_dim_multiple: {},
) -> dict[str, Any]:
    """Return the config of a fold with `num_kv_heads` by site name; all other fields are kept.

    If the stock class reads a count of K/V heads and all its sites have the same one, its field is set. Otherwise the sites are
    listed under `headfold`, for headfold's runtime. `uneven` has the groups of query heads, in standard order, of the sites where
    they are not equal. `head_dim_multiples` are 1 where no site is named; `rotary` returns the config fields of a table of
    frequencies for heads with a multiple of the source's head_dim.

    Raises:
        UserError: q, k and v are one tensor on disk, and groups are not equal or not equally many; or sites of a stock class have
            different multiples of head_dim.
    """
    outer, config = config, language_config(config)
    fields = {attention.kv_heads for attention in family.attentions if attention.kv_heads}
    folded = [site for site in sites if site.name in num_kv_heads]
    stock = [site for site in folded if site.stock_gqa]
    counts = {num_kv_heads[site.name] for site in stock}
    multiples = {head_dim_multiples.get(site.name, 1) for site in stock}
    in_slots = multiples != {1} and not all(site.any_head_dim for site in stock)
    has_one_count = len(counts) == 1 and not in_slots and not any(site.name in uneven for site in stock)
    if not has_one_count and any("qkv" in site.weights for site in stock):
        raise UserError(
            f"{config.get('model_type')}: expected equal groups, as many at every site, because q, k and v are one tensor on disk; "
            f"got {', '.join(map(str, sorted(counts)))} K/V heads; make the plan with --kv-heads"
        )
    changes: dict[str, Any] = dict.fromkeys(fields, counts.pop()) if has_one_count else {}
    if stock and not in_slots and multiples != {1}:
        if len(multiples) > 1:
            raise UserError(
                f"{config.get('model_type')}: expected one multiple of head_dim at every site, got {sorted(multiples)}; "
                "make the plan with --head-dim-multiple"
            )
        multiple = multiples.pop()
        changes |= {attention.head_dim: multiple * stock[0].head_dim for attention in family.attentions}
        if stock[0].key_freedom.rotary_dim:
            changes |= rotary(multiple)
            config = {name: value for name, value in config.items() if name not in ROTARY_NAMES}
    listed = [
        runtime_entry(
            site,
            num_kv_heads[site.name],
            uneven.get(site.name),
            head_dim_multiples.get(site.name, 1),
            in_slots=in_slots or not site.stock_gqa,
        )
        for site in folded
        if not (has_one_count and site.stock_gqa)
    ]
    counts_after = {num_kv_heads[site.name] for site in folded}
    if (
        config.get("model_type") in _COUNT_IS_READ
        and len(counts_after) == 1
        and not uneven
        and set(head_dim_multiples.values()) <= {1}
    ):
        changes["num_key_value_heads"] = counts_after.pop()
    made = with_old_names({**config, **changes, **({"headfold": {"sites": listed}} if listed else {})})
    return with_language_config(outer, made)


def runtime_entry(
    site: Site, num_kv_heads: int, uneven: Groups | None = None, head_dim_multiple: int = 1, *, in_slots: bool = True
) -> dict[str, Any]:
    """Return what the runtime reads of a folded site.

    Heads with a multiple of the source's head_dim are that many slots or, without `in_slots`, heads of a larger head_dim. If the
    class of the site takes any head_dim, W_q includes the softmax scale of the larger one (`surgery.site_heads`), which slots undo.
    """
    local = {role: site.paths[role].removeprefix(f"{site.core}.") for role in "qkv" if role in site.paths}
    fused = {}
    if "qkv" in site.paths:
        local = {role: f"{role}_proj" for role in "qkv"}
        fused = {"fused": site.paths["qkv"].removeprefix(f"{site.core}.")}
    if site.key_freedom.norm_spans_heads:
        local["k_norm"] = site.paths["k_norm"].removeprefix(f"{site.core}.")
    counts = {"heads": site.num_heads, "kv_heads": num_kv_heads, "head_dim": site.head_dim}
    groups = {} if uneven is None else {"kv_of_query": list(uneven.group_of_head)}
    wide: dict[str, Any] = {}
    if head_dim_multiple > 1 and in_slots:
        wide = {"slots": head_dim_multiple, "o": site.paths["o"]}
        wide |= {"scale": head_dim_multiple**-0.5} if site.any_head_dim and site.scale_from_head_dim else {}
    elif head_dim_multiple > 1:
        counts["head_dim"] *= head_dim_multiple
    return {"module": site.core, **local, **fused, **counts, **groups, **wide}


def kv_heads_by_layer(config: Mapping[str, Any]) -> list[int] | None:
    """Return the number of K/V heads of each layer where the config lists them by layer (layouts per-layer and decilm), else None."""
    name, num_heads = (config.get("architectures") or [""])[0], config.get("num_attention_heads")
    if name == "DeciLMForCausalLM":
        sizes = [block["attention"]["n_heads_in_group"] for block in config.get("block_configs") or []]
        return [num_heads // size for size in sizes] if sizes and all(sizes) else None
    if name.startswith("PerLayer") and "per_layer_config" in config:
        usual, own = config["num_key_value_heads"], config["per_layer_config"]
        layers = range(config["num_hidden_layers"])
        return [own.get(str(layer), {}).get("num_key_value_heads", usual) for layer in layers]
    return None
