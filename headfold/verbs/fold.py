"""Fold a model end to end: calibrate, plan, refit, heal, write, verify, and only then rename the output into its place."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..checkpoint.cards import write_card
from ..checkpoint.staging import commit, refuse_overlap
from ..conversion import single_pass
from ..conversion.calibration_config import CalibrationRequest
from ..conversion.fold_job import FoldJob
from ..conversion.fold_request import resolve_fold
from ..conversion.fold_result import FoldResult
from ..conversion.plans import sites_with_assumed_distances
from ..conversion.provenance import Fitting, card_facts, notes_on
from ..conversion.serving_cost import serving_cost
from ..conversion.source import open_source, open_stats
from ..conversion.teacher import Teacher
from ..conversion.twin import Twin
from ..conversion.verification import verification_sample, verify_fold
from ..conversion.writing import choose_fold_layout, write_fold
from ..core.errors import UserError
from ..core.progress import Progress, no_progress
from ..exports.card import exported_card
from ..hf_models import check_device, dtype_named
from ..parallel import on_all, on_main, on_main_only, spmd
from ..report.card import model_card


@spmd
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
    heal_by: str | None = None,
    calibration: str | None = None,
    tokens: int | None = None,
    items: int | None = None,
    columns: Sequence[str] = (),
    context: int | None = None,
    encoder: bool = False,
    adapter: str | Path | None = None,
    stats: str | Path | None = None,
    layout: str | None = None,
    seed: int = 0,
    force: bool = False,
    verify: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> FoldResult:
    """Write `model` again as `out` with fewer K/V heads.

    The output is a checkpoint directory, a stock one where the architecture allows it, with plan.json and a card. It grows as
    `OUT.partial` and is renamed when it is complete and, unless `verify=False`, equal to its head-repeated twin under stock
    transformers. After a kill the same call resumes and writes the same bytes, but for the times on the card.

    Args:
        model: A checkpoint directory, a GGUF file or a hub id. Quantised weights are decoded first (docs/how-to/sources.md).
        out: The directory to write.
        kv_heads: K/V heads to keep at every site: a count or a share of the source's, such as 4 or "1/4".
        plan: A file that `headfold.plan` wrote, instead of `kv_heads`.
        head_dim_multiple: With 2 there are half as many K/V heads with twice the head_dim: the same cache, a better fold, larger W_q
            and W_o. "auto" takes the largest that attention kernels take.
        group, merge: Methods with their options, as `headfold methods` lists them.
        refit: Refit W_q of every block to the original's attention where there are data enough, W_v and W_o to its output.
        heal: Train the attention after that, on `heal_tokens` tokens or items of the calibration data, repeated where there are fewer;
            all sites together by the output of the "model", or each "block" alone, in the memory of one (`heal_by`; by default "model"
            for language models of 2^26 parameters or more, "block" for all others).
        calibration: A source of `headfold.corpus` that suits the model; by default what `stats` or `plan` were measured on. Statistics,
            refit and healing use the same data.
        tokens, items: Calibration tokens of a language model, calibration items of other models.
        columns, context: Columns of a table of calibration data; length of its windows, or where its texts are cut.
        encoder: Fold the encoder of an encoder-decoder too.
        adapter: A LoRA adapter of peft, a directory or a hub id, whose weights are merged into the model before it is folded.
        stats: A file that `headfold.calibrate` wrote.
        layout: A checkpoint layout (`headfold.export`); by default the one that stock transformers loads, if there is one.
        seed: Seed of everything drawn at random.
        force: Replace what is at `out`, once the new directory is complete.
        verify: Open the output and compare its logits with the twin's.
        device: Where the original runs: "cpu" or "cuda".
        dtype: What the original computes in, such as "float32"; by default the fastest dtype that holds its weights.
        progress, say: Called with (stage, done, total), and with lines to print.

    Raises:
        UserError: a model that cannot be folded, a file that cannot be read or written, or a fold that differs from its twin.
    """
    if (kv_heads is None) == (plan is None):
        raise UserError("fold: expected either kv_heads or plan, got both or none; give one")
    if not heal and (heal_tokens is not None or heal_by is not None):
        raise UserError("fold: heal_tokens and heal_by go with heal; add it (--heal --heal-tokens N) or leave them out")
    out, progress = Path(out), progress or no_progress
    place, compute_dtype = check_device(device), dtype_named(dtype)
    source = on_all(lambda: open_source(model, encoder, adapter, progress, say))
    refuse_overlap(source.plain.given, out)
    given = on_main_only(lambda: open_stats(stats, source))
    data = CalibrationRequest(calibration, tokens, items, tuple(columns), context, seed)
    request = on_main(lambda: resolve_fold(
        source, kv_heads=kv_heads, plan=plan, head_dim_multiple=head_dim_multiple, group=group, merge=merge, refit=refit, heal=heal,
        heal_tokens=heal_tokens, heal_by=heal_by, data=data, stats=given, layout=layout,
    ))  # fmt: skip
    source = replace(source, encoder=request.encoder)
    on_all(lambda: request.healing.check_memory(source.checkpoint, source.sites, place))
    settings = {**request.settings, "layout": layout, "seed": seed, **({"dtype": dtype} if dtype else {})}
    with FoldJob.opened(out, settings, force) as job:
        teacher = Teacher(source, request.calibration, place, compute_dtype, progress)
        if not data.names_data:
            teacher.use_sample(given)
        job.draw_texts(teacher, request, given)
        once = on_main(lambda: single_pass.suits(source, request, given))
        if line := on_main_only(lambda: job.estimate(teacher, request, given, verify, single_pass=once)):
            say(line)
        if once:
            statistics, made = single_pass.calibrate_plan_and_refit(job, teacher, request)
        else:
            statistics = job.calibrated(teacher, given, request.statistics)
            made = job.planned(teacher, request, statistics)
        written_layout = on_main(lambda: choose_fold_layout(source, made, layout))
        shrinks = any(made.num_kv_heads[site.name] < site.num_kv_heads for site in source.sites)
        refits, fitting = job.refitted(teacher, made, statistics) if refit and shrinks else (None, Fitting())
        if heal and shrinks:
            refits, fitting = job.healed(teacher, made, statistics, refits, fitting, request.healing)
        teacher.close()

        def write() -> FoldResult:
            notes = teacher.notes
            with job.timed("write"):
                written = write_fold(source, made, statistics, refits, job.staging, job.work, written_layout, progress)
            notes += [f"layout {written_layout}: {written.export.description}"] if written.export else []
            verification = None
            with job.timed("verify"):
                if verify:
                    sample = verification_sample(source, teacher, notes)
                    unrounded = written.unrounded(job.staging, source.dtype)
                    twin = Twin(source, made, statistics, refits)
                    verification = verify_fold(source, job.staging, twin, sample, unrounded, notes, progress)
            blind = sites_with_assumed_distances(source, made, statistics)
            notes += notes_on(source, job.staging, request.group, blind, statistics)
            costs = serving_cost(source), serving_cost(source, made, layout)
            measured_on, times = statistics.metadata if statistics else {}, (job.seconds, job.estimated)
            facts = card_facts(
                source, out, job.staging, made, settings, costs, fitting, measured_on, verification, times
            )
            card = model_card(source.checkpoint.path, facts)
            write_card(job.staging, exported_card(card, written.export) if written.export else card)
            shutil.rmtree(job.work)
            commit(job.staging, out, force)
            return FoldResult.of(out, source, made, costs, fitting, verification, notes, *times)

        return on_main(write)
