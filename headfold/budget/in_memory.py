"""Fold some sites of the running teacher in memory, to measure what that changes before anything is written."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from ..conversion.source import Source
from ..conversion.teacher import Teacher
from ..core.fitted import FittedHeads
from ..core.plan import Plan
from ..core.stats import SiteStats
from ..corpus.samples import main_input
from ..evaluate.sensitivity import replaced_parameters
from ..families.spec import Site
from ..parallel import on_main
from ..refine.refit import refit
from ..runtime.regrouping import installed_heads
from ..surgery import query_order, site_heads, site_tensors

MEASURED_TOKENS = 8192
"""Tokens of the calibration data that one measurement takes."""


@contextmanager
def folded_in_memory(
    teacher: Teacher,
    sites: Sequence[Site],
    plan: Plan,
    stats: Mapping[str, SiteStats] | None,
    *,
    refitted: bool,
) -> Iterator[None]:
    """Run the teacher with these sites folded as the plan says, and with `refitted` refitted on the first part of its data.

    Shared heads are repeated or, where head dims are a multiple of the source's, installed slot by slot.
    """
    model, source = teacher.model, teacher.source
    refits = _refits(teacher, sites, plan, stats) if refitted else None
    multiples = plan.head_dim_multiples(sites)
    plain = [site for site in sites if multiples[site.name] == 1]
    with_multiple = (
        (site, _repeated(source, site, plan, stats, refits), site.num_kv_heads, multiple)
        for site in sites
        if (multiple := multiples[site.name]) > 1
    )
    parameters = twin_parameters(plain, plan, source, stats, refits)
    with replaced_parameters(model, parameters), installed_heads(model, with_multiple):
        yield


def twin_parameters(
    sites: Sequence[Site],
    plan: Plan,
    source: Source,
    stats: Mapping[str, SiteStats] | None,
    refits: Mapping[str, FittedHeads] | None = None,
) -> dict[str, Tensor]:
    """Return by the model's names the parameters of these sites with shared heads repeated: the fold in the source's shapes."""
    made = {}
    for site in sites:
        named = site.parameters
        tensors = _repeated(source, site, plan, stats, refits)
        made.update({named.get(name, name): tensor for name, tensor in tensors.items()})
    return made


def _repeated(
    source: Source,
    site: Site,
    plan: Plan,
    stats: Mapping[str, SiteStats] | None,
    refits: Mapping[str, FittedHeads] | None,
) -> dict[str, Tensor]:
    read = source.checkpoint.read
    return on_main(lambda: site_tensors(site, plan, read, stats, refits, num_kv_heads=site.num_kv_heads))


def _refits(
    teacher: Teacher, sites: Sequence[Site], plan: Plan, stats: Mapping[str, SiteStats] | None
) -> Mapping[str, FittedHeads]:
    """Refit some sites on a little data, all others being the original's."""
    read = teacher.source.checkpoint.read
    return refit(
        teacher.model,
        list(sites),
        lambda site: on_main(lambda: site_heads(site, plan, read, stats)),
        first_part(teacher.sample),
        order=lambda site: query_order(site, plan),
    )


def first_part(sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the beginning of the calibration data, on which measured sites are refitted."""
    return {name: tensor[: _part_size(sample)] for name, tensor in sample.items()}


def last_part(sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the end of the calibration data, on which loss increases are measured."""
    return {name: tensor[-_part_size(sample) :] for name, tensor in sample.items()}


def _part_size(sample: Mapping[str, Tensor]) -> int:
    """Return the number of items of a part: at most half of them, so that no site is measured on what it was fitted on."""
    first = main_input(sample)
    per_item = first[0].numel() if first.ndim == 2 else 64
    return max(1, min(len(first) // 2, MEASURED_TOKENS // per_item))
