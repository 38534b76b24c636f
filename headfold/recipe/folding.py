"""Fold a model end to end: calibrate, plan, refit, write, verify, and only then put it into its place."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from .. import planning
from ..checkpoint.staging import refuse_overlap
from ..core.errors import UserError
from ..core.plan import Plan
from ..refine import heal as healing
from ..refine.refit import num_passes
from .deciding import needs_statistics, plan_source
from .job import FoldResult, Job
from .measuring import CalibrationData, Teacher, default_device
from .source import Progress, Source, open_source, open_stats, silent
from .widths import possible, widest


def fold(
    model: str | Path,
    out: str | Path,
    *,
    kv_heads: str | int | None = None,
    plan: str | Path | None = None,
    head_dim_multiple: str | int = 1,
    group: str = "swap",
    merge: str = "absorb",
    refit: bool = True,
    heal: bool = False,
    heal_tokens: int | None = None,
    calibration: str | None = None,
    tokens: int | None = None,
    items: int | None = None,
    columns: Sequence[str] = (),
    context: int | None = None,
    encoder: bool = False,
    stats: str | Path | None = None,
    layout: str | None = None,
    seed: int = 0,
    force: bool = False,
    verify: bool = True,
    device: str | None = None,
    progress: Progress | None = None,
) -> FoldResult:
    """Write `model` again as `out`, with `kv_heads` K/V heads, or as the file `plan` says.

    With a `head_dim_multiple` of 2 there are half as many, twice as wide: the same cache, a better fold, larger W_q and W_o; `auto` takes the
    widest heads that kernels take.

    With `heal` every block's attention is then trained alone, with `heal_tokens` tokens of the calibration data (default
    `refine.heal.TOKENS`, or `ITEMS` where there are no tokens), drawn anew where the source has more of them.

    The result is a checkpoint directory that stock engines load, with plan.json and a card. It grows as `OUT.partial` and is
    renamed when it is whole and, unless `verify=False`, equal to its head-repeated twin under stock transformers; the same
    call after a kill goes on from there and gives the same bytes. Statistics and refit use the same text: `calibration`, else
    what `stats` or `plan` were measured on, else the default.

    Raises:
        UserError: what cannot be folded, read or written; a fold that differs from its twin (nothing is renamed then).
    """
    if (kv_heads is None) == (plan is None):
        raise UserError("fold: expected either kv_heads or plan, got both or none; give one")
    if heal_tokens is not None and not heal:
        raise UserError("fold: heal_tokens goes with heal; pass both (--heal --heal-tokens N) or leave it out")
    source = open_source(model, encoder)
    refuse_overlap(source.checkpoint.path, Path(out))
    given = open_stats(stats, source)
    ready = None if plan is None else Plan.load(Path(plan))
    if ready is None:
        planning.counts_of(source.sites, kv_heads, planning.parse_group(group))
        needs_data = needs_statistics(group, merge)
        width = widest(source, possible(source, head_dim_multiple, group, merge), kv_heads, group)
    else:
        width = 1
        # With the encoder's sites if the plan has any of them, else without.
        source = replace(source, encoder=any(s.optional and s.name in ready.sites for s in source.every_site))
        ready.check_source(source.checkpoint.fingerprint(), source.sites)
        group, merge = ready.group, next(iter(ready.sites.values())).merge
        needs_data = needs_statistics("contiguous", merge)
    said = given.metadata if given is not None else ready.calibration if ready else {}
    same_data = (calibration, tokens, items, context) == (None, None, None, None)
    data = _data(source, calibration, tokens, items, tuple(columns), context, seed, said, needs_data or refit or heal)
    if heal:
        assert data is not None
        heal_tokens = heal_tokens or (healing.ITEMS if data.kind in ("images", "audio") else healing.TOKENS)
    settings = {
        "version": version("headfold"), "source": source.checkpoint.fingerprint(), "kv_heads": str(kv_heads), "head_dim_multiple": width,
        "plan": ready and ready.to_json(), "group": group, "merge": merge, "refit": num_passes() if refit else 0, "heal": heal_tokens or 0,
        "data": data and asdict(data),
        "encoder": source.encoder, "layout": layout, "seed": seed, "stats": given and given.metadata,
    }  # fmt: skip
    job = Job(source, Path(out), settings, force, progress or silent)
    run = Teacher(source, data, device or default_device(), job.progress)
    if same_data:
        run.use_sample(given)
    with job.worth_keeping():
        statistics = job.statistics(run, given, needs_data)
        with job.timed("plan"):
            made = ready or plan_source(source, kv_heads, group, merge, statistics, seed, job.progress, width)
        return job.carry_out(run, made, statistics, refit=refit, heal=heal_tokens or 0, verify=verify)


def _data(
    source: Source,
    calibration: str | None,
    tokens: int | None,
    items: int | None,
    columns: tuple[str, ...],
    context: int | None,
    seed: int,
    said: Mapping[str, str],
    needed: bool,
) -> CalibrationData | None:
    """As asked for, else as `said` of statistics, else the default; None where nothing asks for any and none is named.

    The seed of the data is not that of the fold: the same text serves folds of any seed.
    """
    if calibration is None and said.keys() >= {"source", "seed", "tokens"}:
        context = context or (int(said["context"]) if said.get("kind", "text") == "text" else None)
        amount, columns = int(said["tokens"]), tuple(filter(None, said.get("columns", "").split(",")))
        chosen = (said["source"], tokens or amount, items or amount, columns, context, int(said["seed"]))
        return CalibrationData.chosen(source, *chosen)
    if not needed and calibration is None:
        return None
    return CalibrationData.chosen(source, calibration, tokens, items, columns, context, seed)
