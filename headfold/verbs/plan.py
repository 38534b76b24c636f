"""Decide which K/V heads are merged, and predict the error: with one count for all sites, or a budget allocated to them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..budget.allocation import total
from ..budget.curves import CurveRequest, loss_curves, require_statistics, teacher_of_statistics
from ..budget.request import BudgetRequest
from ..budget.sensitivity_file import path_of_multiple, sensitivity_path
from ..checkpoint.staging import write_json
from ..conversion.folded_config import folded_config, refuse_counts_per_layer
from ..conversion.plans import plan_uniform
from ..conversion.source import open_source, open_stats
from ..conversion.teacher import Teacher
from ..core.errors import UserError
from ..core.plan import Plan
from ..core.progress import Progress, no_progress, silent
from ..head_dims import largest_multiple, possible_multiples
from ..hf_models import check_device, dtype_named
from ..in_memory.models import takes_models
from ..outputs import refuse_existing
from ..parallel import on_all, on_main, on_main_only
from ..planning import parse_group
from ..stats_file import StatsFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@takes_models("model")
def plan(
    model: "str | Path | PreTrainedModel",
    out: str | Path | None = None,
    *,
    kv_heads: str | int | None = None,
    kv_budget: str | None = None,
    kv_bytes: str | None = None,
    max_loss_increase: float | None = None,
    head_dim_multiple: str | int = 1,
    allowed: Sequence[int] = (),
    tp: int = 1,
    allocation: str = "exact",
    sensitivity: str | Path | None = None,
    refit: bool = True,
    group: str = "swap",
    merge: str = "absorb",
    stats: str | Path | None = None,
    encoder: bool = False,
    seed: int = 0,
    workers: int = 1,
    force: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    adapter: str | Path | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = silent,
) -> Plan:
    """Return the plan of a fold, and write it to `out` if one is given.

    Either every site gets `kv_heads`, or a budget is allocated: `kv_budget`, `kv_bytes` or `max_loss_increase`. For a budget the original
    runs on a part of its calibration data with each site folded alone, which puts the loss increases of all sites on one scale.

    Args:
        model: A checkpoint directory, a GGUF file, a hub id, or a model of transformers in memory.
        out: The file to write.
        kv_heads: K/V heads to keep at every site: a count or a share of the source's, such as 4 or "1/4".
        kv_budget: Share of the source's K/V bytes to keep, such as "25%".
        kv_bytes: K/V bytes per token to keep, such as "40KiB".
        max_loss_increase: Predicted loss increase to stay within, in nats per token.
        head_dim_multiple: head_dim of the new K/V heads over the source's, with as many times fewer heads; "auto" chooses.
        allowed: Counts of K/V heads that a budget may use; by default all that split the heads equally or, with a `group` whose groups
            may differ in size (`swap:unequal=true`), all.
        tp: Devices of tensor parallelism, of which all counts are multiples.
        allocation: "exact", or "qcqa" for QCQA's second stage.
        sensitivity: The file of measured sensitivities, written and read again; by default beside `out`.
        refit: Refit each measured site, as fold will.
        group: Grouping method with its options.
        merge: Merge method with its options.
        stats: A file that `headfold.calibrate` wrote.
        encoder: With `kv_heads`, plan the encoder of an encoder-decoder, or the tower of a wrapper, too.
        seed: Seed of everything drawn at random.
        workers: Sites that are grouped side by side, in threads.
        force: Replace `out`.
        device: Where sensitivities are measured: "cpu" or "cuda".
        dtype: What the original computes in, such as "float32".
        adapter: A LoRA adapter of peft that is merged into the model first.
        tokenizer: That of a model in memory; by default what lies beside the files that it was opened from.
        progress, say: Called with (stage, done, total), and with lines to print.

    Raises:
        UserError: a source that cannot be folded, counts or a budget that cannot be had, or a method that needs statistics without `stats`.
    """
    unequal = parse_group(group).unequal
    budget = BudgetRequest(kv_budget, kv_bytes, max_loss_increase, tuple(allowed), tp, allocation, unequal=unequal)
    budget.check()
    if budget.has_limit == (kv_heads is not None):
        given = "both" if budget.has_limit else "none"
        raise UserError(
            f"plan: expected --kv-heads, or one of --kv-budget, --kv-bytes and --max-loss-increase; got {given}; give one"
        )
    if not budget.has_limit and (allowed or tp != 1 or allocation != "exact" or sensitivity is not None):
        raise UserError(
            "plan: --allowed, --tp, --allocation and --sensitivity go with a budget, not with --kv-heads; leave them out"
        )
    if out is not None:
        on_main(lambda: refuse_existing(Path(out), force))
    place, compute_dtype = check_device(device), dtype_named(dtype)
    source, progress = on_all(lambda: open_source(model, encoder, adapter, progress, say)), progress or no_progress
    given_stats = on_main_only(lambda: open_stats(stats, source))
    multiples = possible_multiples(source.sites, head_dim_multiple, group, merge)
    if kv_heads is not None:
        multiple = largest_multiple(source.sites, multiples, kv_heads, group)
        made = on_main(
            lambda: plan_uniform(source, kv_heads, group, merge, given_stats, seed, progress, multiple, workers)
        )
    else:
        refuse_counts_per_layer(source)
        on_main(lambda: require_statistics(given_stats))
        teacher = teacher_of_statistics(source, given_stats, place, compute_dtype, progress)
        request = CurveRequest(group, merge, refit, seed, workers)
        path = Path(sensitivity or sensitivity_path(Path(out or Path(source.name).name)))
        made = _best_within_budget(teacher, budget, multiples, request, given_stats, path)
    folded_config(source, made)  # refuses what could not be written
    if out is not None:
        on_main(lambda: write_json(Path(out), made.to_json()))
    return made


def _best_within_budget(
    teacher: Teacher,
    budget: BudgetRequest,
    multiples: Sequence[int],
    request: CurveRequest,
    stats: StatsFile | None,
    sensitivity: Path,
) -> Plan:
    """Return the allocation at the head_dim multiple that loses least or, where the loss is given, takes fewest bytes."""
    best: tuple[float, Plan] | None = None
    refusal: UserError | None = None
    for multiple in multiples:
        at_multiple = replace(budget, head_dim_multiple=multiple)
        try:
            at_multiple.check_reachable(teacher.source)
            curves = loss_curves(teacher, at_multiple, request, stats, path_of_multiple(sensitivity, multiple))
            counts = curves.allocate(at_multiple)
        except UserError as error:  # this multiple leaves no count, or none small enough
            refusal = refusal or error
            continue
        reached = total(curves.options, counts)
        value = reached.loss_increase if budget.max_loss_increase is None else reached.kv_bytes
        if best is None or value < best[0]:
            best = value, curves.plan(counts)
    if best is None:
        assert refusal is not None
        raise refusal
    return best[1]
