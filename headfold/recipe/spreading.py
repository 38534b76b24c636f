"""Spread a K/V budget over layers: loss curves of every site on one scale, and the counts that lose least."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import planning
from ..budget import Option, Options, check_bytes, spread, spread_qcqa
from ..checkpoint.staging import write_json
from ..checkpoint.stats_file import StatsFile
from ..core.errors import UserError
from ..core.fitted import FittedHeads
from ..core.plan import Plan
from ..core.stats import SiteStats
from ..evaluate.sensitivity import alone, replaced
from ..families.spec import Site
from ..hf_models import is_streamed
from ..planning import Choice
from ..refine.refit import refit
from ..runtime.regrouping import installed_heads
from ..surgery import query_order, site_heads, site_tensors
from .measuring import Teacher
from .source import Progress, Source
from .wish import BudgetRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 8192
"""Of the calibration data, on which the damage of one site is measured."""
MEASURED = 3
"""Counts of a site at which its damage is measured; between them it follows the predicted error."""
MEASURED_UNEQUAL = 5
"""The same where groups may differ in size: there are more counts between. With three, a site's damage at 2 of 8 heads, between 1 and 4,
was found a fifth too high on a small decoder, and heads went to the wrong layers."""
FORMAT = "headfold-sensitivity-2"


@dataclass(frozen=True, slots=True)
class Curves:
    """What every choice of heads costs and loses. `measured` is the damage of single sites by name and count."""

    source: Source
    choices: Sequence[Choice]
    options: Options
    measured: Mapping[str, Mapping[int, float]]
    group: str
    seed: int
    calibration: Mapping[str, str]

    def plan(self, counts: Mapping[str, int]) -> Plan:
        """The plan with these counts, by the first site of each choice."""
        chosen = [(choice, counts[choice.sites[0].name]) for choice in self.choices]
        fingerprint = self.source.checkpoint.fingerprint()
        return planning.assemble(self.source.sites, chosen, self.group, fingerprint, self.seed, self.calibration)


def curves(
    source: Source,
    wish: BudgetRequest,
    group: str,
    merge: str,
    stats: StatsFile,
    seed: int,
    run: Teacher,
    sensitivity: Path,
    workers: int,
    progress: Progress,
    *,
    refitting: bool = True,
) -> Curves:
    """Group every site at every count, measure the sites alone or read what was measured, and put both together.

    `refitting`: a site is measured after a refit of its own, since that changes which sites are dear.

    Raises:
        UserError: a file of other measurements, or a model that does not fit into memory.
    """
    names = [site.name for site in source.sites]
    choices = planning.choices(
        source.sites, source.checkpoint.read, lambda site: [*wish.counts(site), site.num_kv_heads],
        grouping=planning.parse_group(group), merge=merge, stats=stats, seed=seed, head_dim_multiple=wish.head_dim_multiple, workers=workers,
        progress=lambda name: progress("plan", names.index(name), len(names)),
    )  # fmt: skip
    about = {
        "source": source.checkpoint.fingerprint(), "group": group, "merge": merge, "refit": refitting, "seed": seed,
        "head_dim_multiple": wish.head_dim_multiple,
        "stats": dict(stats.metadata),
    }  # fmt: skip
    measured = _read(sensitivity, about)
    number = MEASURED_UNEQUAL if wish.unequal else MEASURED
    wanted = {choice.sites[0].name: _measured_counts(list(choice.plans)[:-1], number) for choice in choices}
    missing = [(c, n) for c in choices for n in wanted[c.sites[0].name] if n not in measured.get(c.sites[0].name, {})]
    if missing:
        found = _measure(source, missing, group, seed, stats, run, progress, refitting=refitting)
        measured = {name: {**measured.get(name, {}), **found.get(name, {})} for name in {**measured, **found}}
        write_json(sensitivity, {"format": FORMAT, **about, "damage": measured})
    # A file may hold counts of earlier plans: what stands between is of those that this plan asks for alone, the same on every call.
    used = {name: {count: measured[name][count] for count in counts} for name, counts in wanted.items()}
    options = {choice.sites[0].name: _options(choice, source, used[choice.sites[0].name]) for choice in choices}
    return Curves(source, choices, options, used, group, seed, stats.metadata)


def _measured_counts(counts: Sequence[int], number: int) -> list[int]:
    """The least, the most and others between, evenly spaced in their logarithms."""
    if len(counts) <= number:
        return list(counts)
    spaced = (counts[0] * (counts[-1] / counts[0]) ** (at / (number - 1)) for at in range(number))
    return sorted({min(counts, key=lambda count: abs(math.log(count / ideal))) for ideal in spaced})


def _read(path: Path, about: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        same = found["format"] == FORMAT and all(found[name] == value for name, value in about.items())
        damage = {name: {int(n): float(x) for n, x in row.items()} for name, row in found["damage"].items()}
        if not all(math.isfinite(lost) for row in damage.values() for lost in row.values()):
            raise ValueError("a damage that is no number")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: expected sensitivities that headfold wrote; remove the file or name another"
        ) from error
    if not same:
        raise UserError(f"{path}: measured on another model, data or method; remove the file or name another")
    return damage


def _measure(
    source: Source,
    missing: Sequence[tuple[Choice, int]],
    group: str,
    seed: int,
    stats: StatsFile,
    run: Teacher,
    progress: Progress,
    *,
    refitting: bool,
) -> dict[str, dict[int, float]]:
    """The damage that each choice does alone, on the end of the calibration data; refits see its beginning."""
    if is_streamed(run.model):
        raise UserError(f"{source.name}: too large for this machine's memory, which sensitivities need; use --kv-heads")

    def change(choice: Choice, count: int) -> AbstractContextManager[None]:
        plans = {site.name: plan for site, plan in zip(choice.sites, choice.plans[count], strict=True)}
        plan = Plan(plans, group, "", seed)
        refits = refitted(choice.sites, plan, source, stats, run.model, few(run.sample)) if refitting else None
        return folded_in_memory(run.model, choice.sites, plan, source, stats, refits)

    changes = {(choice.sites[0].name, count): lambda c=choice, n=count: change(c, n) for choice, count in missing}
    done = iter(range(len(changes)))
    sample = few(run.sample, last=True)
    return alone(run.model, sample, changes, lambda name: progress("sensitivity", next(done), len(changes)))


def refitted(
    sites: Sequence[Site],
    plan: Plan,
    source: Source,
    stats: Mapping[str, SiteStats],
    model: "PreTrainedModel",
    sample: Mapping[str, Tensor],
) -> dict[str, FittedHeads]:
    """Refits of some sites on a little data, the others being the original's."""
    read = source.checkpoint.read
    return refit(
        model,
        list(sites),
        lambda site: site_heads(site, plan, read, stats),
        sample,
        order=lambda site: query_order(site, plan),
    )


def twin_parameters(
    sites: Sequence[Site],
    plan: Plan,
    source: Source,
    stats: Mapping[str, SiteStats] | None,
    refits: Mapping[str, FittedHeads] | None = None,
) -> dict[str, Tensor]:
    """By the model's names, the parameters of these sites with shared heads repeated: the fold in the source's shapes."""
    made = {}
    for site in sites:
        named = site.parameters
        tensors = site_tensors(site, plan, source.checkpoint.read, stats, refits, num_kv_heads=site.num_kv_heads)
        made.update({named.get(name, name): tensor for name, tensor in tensors.items()})
    return made


@contextmanager
def folded_in_memory(
    model: "PreTrainedModel",
    sites: Sequence[Site],
    plan: Plan,
    source: Source,
    stats: Mapping[str, SiteStats] | None,
    refits: Mapping[str, FittedHeads] | None = None,
) -> Iterator[None]:
    """The original with these sites folded as the plan says, by shared heads repeated or, where they are wide, slot by slot."""
    widths = plan.head_dim_multiples(sites)
    narrow = [site for site in sites if widths[site.name] == 1]
    read = source.checkpoint.read
    clothes = (
        (site, site_tensors(site, plan, read, stats, refits, num_kv_heads=site.num_kv_heads), site.num_kv_heads, width)
        for site in sites
        if (width := widths[site.name]) > 1
    )
    with replaced(model, twin_parameters(narrow, plan, source, stats, refits)), installed_heads(model, clothes):
        yield


def few(sample: Mapping[str, Tensor], *, last: bool = False) -> dict[str, Tensor]:
    """As much of the calibration data as a measurement takes: from its beginning, or its end."""
    first = next(iter(sample.values()))
    per_item = first[0].numel() if first.ndim == 2 else 64
    # At most half, so that what is measured is not what was fitted.
    count = max(1, min(len(first) // 2, TOKENS // per_item))
    return {name: tensor[-count:] if last else tensor[:count] for name, tensor in sample.items()}


def _options(choice: Choice, source: Source, measured: Mapping[int, float]) -> list[Option]:
    predicted = {count: predicted_error(choice, count) for count in choice.plans}
    return [
        Option(count, _bytes(choice, count, source), max(0.0, loss_at(count, predicted, measured))) for count in choice.plans
    ]  # fmt: skip


def predicted_error(choice: Choice, count: int) -> float:
    """Relative errors of K and V, summed."""
    return sum(p.error.key / p.energy.key + p.error.value / p.energy.value for p in choice.plans[count])


def _bytes(choice: Choice, count: int, source: Source) -> int:
    return sum(2 * count * site.head_dim * source.dtype.itemsize for site in choice.sites)


def loss_at(count: int, predicted: Mapping[int, float], measured: Mapping[int, float]) -> float:
    """Measured damage where there is some; elsewhere a power of the predicted error through the nearest measured points.

    `predicted` has every count, the full one with error 0, where nothing is lost.
    """
    if predicted[count] <= 0 or count == max(predicted):
        return 0.0
    if count in measured:
        return measured[count]
    points = sorted((predicted[n], measured[n]) for n in measured if predicted[n] > 0 and measured[n] > 0)
    if not points:
        return 0.0
    here = predicted[count]
    above = next((place for place, (error, _) in enumerate(points) if error >= here), len(points) - 1)
    above = max(above, min(1, len(points) - 1))
    (x0, y0), (x1, y1) = points[max(0, above - 1)], points[above]
    power = math.log(y1 / y0) / math.log(x1 / x0) if x1 > x0 and y1 > y0 else 1.0
    return y1 * (here / x1) ** power


def refuse_unreachable(source: Source, wish: BudgetRequest) -> None:
    """Refuse, before anything is measured, what the fewest heads everywhere cannot do.

    Raises:
        UserError: no count is left, even the fewest heads take more bytes, or an encoder beside a decoder is to be folded, which caches
            nothing.
    """
    cached = source.cached_sites
    if any(site not in cached for site in source.sites):
        raise UserError(
            f"{source.name}: expected layers that cache K and V, got an encoder, which no budget in bytes makes smaller; use --kv-heads, "
            "or leave --encoder out"
        )
    least = sum(2 * min(wish.counts(site)) * site.head_dim * source.dtype.itemsize for site in source.sites)
    check_bytes(least, wish.limit(source))


def choose(found: Curves, wish: BudgetRequest) -> dict[str, int]:
    """The counts that the wish asks for.

    Raises:
        UserError: it cannot be had.
    """
    limit = wish.limit(found.source)
    if limit is None:
        return spread(found.options, max_loss=wish.max_loss_increase)
    if wish.spread == "qcqa":
        return spread_qcqa(found.options, limit, seed=found.seed)
    return spread(found.options, max_bytes=limit)
