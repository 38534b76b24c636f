"""Look at a checkpoint: what it caches, and what folding it is predicted to cost, without running it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..advice.advise import Advice, advise, workload
from ..conversion.source import Source, open_source, open_stats
from ..core.groups import Groups
from ..core.moments import Moments, site_moments
from ..core.predict import grouped_error, site_energy
from ..core.progress import Progress, counter, no_progress, silent
from ..core.stats import SiteStats
from ..corpus.samples import kind_of
from ..families.context import context_length
from ..families.layout import read_heads
from ..families.spec import APPROXIMATE, Site
from ..group import swap
from ..group.costs import absorb
from ..parallel import main_only
from ..trusted_code import trusts_code

FASTEST = "heads of the model's own head_dim"
"""What engines serve faster than heads of a multiple of it with the same cache, as benchmarks/engine_speed.py finds."""
SHARES = 3
"""Errors are predicted for so many shares of the K/V heads, from the largest: a half, a quarter and an eighth of eight heads."""
MAX_SEARCHED = 12
"""K/V heads up to which the grouping that fold would choose is searched for; above, neighbours share: an upper bound of the error."""


@dataclass(frozen=True, slots=True)
class SiteInspection:
    """Predicted error of K and of V of one site, as shares of their energy, by the share of K/V heads kept ("1/2" …)."""

    name: str
    key: dict[str, float]
    value: dict[str, float]


@dataclass(frozen=True, slots=True)
class Inspection:
    """One checkpoint at a glance. Bytes are of the K/V cache, over all layers, in the checkpoint's dtype."""

    model: str
    family: str
    architecture: str
    dtype: str
    num_parameters: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    key_freedom: str
    query_order: str
    context: int | None
    """Tokens that the model takes at once; None where its config names no limit."""
    caches: bool
    """Whether the model caches K and V: it generates token by token."""
    kv_bytes_per_token: int
    cache_bytes: int
    """Of one sequence of the whole context, of at most 32,768 tokens."""
    fastest_in_engines: str | None
    """The form of a fold that engines serve fastest; None where that was not measured, in models that do not continue a text."""
    basis: str
    """What the predictions rest on."""
    advice: Advice | None
    """On the workload that was named; None where none was."""
    sites: list[SiteInspection]

    def to_json(self) -> dict[str, Any]:
        """Return the machine-readable form, as --json prints it."""
        return asdict(self)


@main_only
@trusts_code("model")
def inspect(
    model: str | Path,
    *,
    stats: str | Path | None = None, context: int | None = None, batch: int | None = None, memory: str | None = None,
    gpu: str | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = silent,
) -> Inspection:  # fmt: skip
    """Return heads, cache size and predicted errors of a checkpoint; with any of the last options, whether folding pays.

    Args:
        model, adapter: A checkpoint directory, a GGUF file or a hub id, and a LoRA adapter of peft that is merged into it first.
        trust_remote_code: Run the code that the model brings for its class.
        stats: A file that `headfold.calibrate` wrote; without it the gains of the norms stand in for statistics.
        context, batch, memory, gpu: What the model is to be served for, as `advice.advise.workload` takes it.
        progress, say: Called with (stage, done, total), and with lines to print.

    Raises:
        UserError: a source that cannot be folded or read, or a workload that the model does not take.
    """
    source = open_source(model, adapter=adapter, progress=progress, say=say)
    known, named = open_stats(stats, source), (context, batch, memory, gpu)
    advice = None if named == (None,) * 4 else advise(source, workload(source, *named))
    first, config = source.sites[0], source.config
    sites, advance = [], counter(progress or no_progress, "inspect", len(source.every_site))
    for site in source.every_site:
        sites.append(_inspect_site(source, site, known))
        advance(1)
    return Inspection(
        model=str(model),
        family=config["model_type"],
        architecture=next(iter(config.get("architectures") or []), "unknown"),
        dtype=str(source.dtype).removeprefix("torch."),
        num_parameters=source.checkpoint.num_parameters,
        num_layers=len(source.every_site),
        num_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        key_freedom=_freedom(first),
        query_order=first.query_order,
        context=context_length(config),
        caches=source.caches,
        kv_bytes_per_token=source.kv_bytes_per_token(),
        cache_bytes=source.cache_bytes(),
        fastest_in_engines=FASTEST if kind_of(config) == "text" else None,
        basis="norm gains alone" if known is None else f"statistics of {Path(str(stats)).name}",
        advice=advice,
        sites=sites,
    )


def _freedom(site: Site) -> str:
    dims, common = site.key_freedom.rotary_dim, site.key_freedom.norm_spans_heads
    part = f" on {dims} of {site.head_dim} dims" if 0 < dims < site.head_dim else ""
    return site.key_freedom.kind + part + (f" {APPROXIMATE}" if common else "")


def _inspect_site(source: Source, site: Site, known: Mapping[str, SiteStats] | None) -> SiteInspection:
    heads = read_heads(site, source.read_finite)
    stats = known[site.name] if known is not None else _stats_from_gains(source, site, heads.q.shape[2] - 1)
    moments = site_moments(heads, stats)
    energy, key, value = site_energy(moments), {}, {}
    for share in [number for number in range(2, site.num_kv_heads + 1) if site.num_kv_heads % number == 0][:SHARES]:
        groups = _grouping(moments, site.num_kv_heads, site.num_kv_heads // share)
        error = grouped_error(moments, groups)
        key[f"1/{share}"], value[f"1/{share}"] = error.key / energy.key, error.value / energy.value
    return SiteInspection(site.name, key, value)


def _grouping(moments: Moments, num_heads: int, num_kv_heads: int) -> Groups:
    if num_heads > MAX_SEARCHED:
        return Groups.contiguous(num_heads, num_kv_heads)
    return swap.group(absorb.cost_from_moments(moments), num_heads, num_kv_heads)


def _stats_from_gains(source: Source, site: Site, hidden_size: int) -> SiteStats:
    if site.input_norm is None:
        return SiteStats.isotropic(hidden_size)
    return SiteStats.from_gains(source.read_finite(site.input_norm).to(torch.float64) + site.norm_gain_offset)
