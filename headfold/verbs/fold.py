"""Fold a model end to end: calibrate, plan, refit, heal, write, verify, and only then rename the output into its place."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.cards import write_card
from ..checkpoint.staging import refuse_overlap
from ..checkpoint.upload import check_upload
from ..conversion import single_pass
from ..conversion.fold_job import FoldJob
from ..conversion.fold_request import resolve_fold
from ..conversion.fold_result import FoldResult
from ..conversion.plans import sites_with_assumed_distances
from ..conversion.provenance import Fitting, calibration_reach, card_facts, notes_on, write_recipe
from ..conversion.serving_cost import serving_cost
from ..conversion.source import open_source, open_stats, with_encoder
from ..conversion.teacher import Teacher
from ..conversion.twin import Twin
from ..conversion.verification import verification_sample, verify_fold
from ..conversion.writing import choose_fold_layout, write_fold
from ..core.plan import Plan
from ..core.progress import Progress, no_progress
from ..exports.card import exported_card
from ..hf_models import check_device, dtype_named
from ..in_memory.data import calibration_data
from ..in_memory.models import folds_in_memory
from ..latent.job import LatentFold
from ..latent.request import LatentRequest
from ..latent.result import LatentResult
from ..parallel import on_all, on_main, on_main_only
from ..refine.scope import Fits
from ..reports.card import model_card
from ..trusted_code import trusts_code


@folds_in_memory
@trusts_code("model")
def fold(
    model: Any,
    out: str | Path | None = None,
    *,
    kv_heads: str | int | None = None,
    plan: str | Path | Plan | None = None,
    to: str | None = None, kv_rank: str | int | None = None, rope_dim: int | None = None,
    head_dim_multiple: str | int = 1,
    group: str = "swap", merge: str = "absorb",
    refit: bool = True,
    refit_by: str | None = None,
    heal: bool = False, heal_tokens: int | None = None, heal_by: str | None = None,
    calibration: str | Iterable[Any] | None = None, tokens: int | None = None, items: int | None = None, columns: Sequence[str] = (),
    context: int | None = None,
    encoder: bool = False,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    stats: str | Path | None = None, quantised_cache: bool = False, layout: str | None = None,
    seed: int = 0, force: bool = False, verify: bool = True,
    push_to_hub: str | None = None, tokenizer: Any = None,
    device: str | None = None, dtype: str | None = None,
    progress: Progress | None = None, say: Callable[[str], None] = lambda line: None,
) -> FoldResult | LatentResult:  # fmt: skip
    """Write `model` again as `out` with fewer K/V heads, or return a grouped model for a model in memory.

    The output has plan.json and a card, and is a stock checkpoint where the architecture allows it. It grows as `OUT.partial`, and is
    renamed once it equals its head-repeated twin under stock transformers. After a kill the same call resumes to the same bytes.

    Args:
        model: A checkpoint directory, a GGUF file, a hub id, or a `PreTrainedModel`, which is not changed. Quantised weights are decoded.
        out: The directory to write. Without it, a model in memory is returned as `headfold.load` opens it, with the dtype and devices of
            `model`; its `headfold` is the `FoldResult`.
        kv_heads, plan: K/V heads to keep at every site, a count or a share such as 4 or "1/4"; or a plan of `headfold.plan`, or its file.
        to, kv_rank, rope_dim: "mla" for a latent of `kv_rank` dims instead (a share: of the cache) and a rotary key of `rope_dim`.
        head_dim_multiple: With 2 there are half as many K/V heads with twice the head_dim: the same cache, a better fold, larger W_q
            and W_o. "auto" takes the largest that attention kernels take.
        group, merge: Methods with their options, as `headfold methods` lists them.
        refit: Refit the projections by least squares to the original's attention and output. `refit_by` is what is trained then: the
            "model" as a whole (the default for large language models and decoders of speech), each "block", or nothing ("squares").
        heal: Then train the attention on `heal_tokens` tokens or items of the data, together or each alone (`heal_by`).
        calibration: A source of `headfold.corpus` that suits the model, or data as `headfold.calibrate` takes them; by default what `stats`
            or `plan` were measured on. Statistics, refit and healing use the same data.
        tokens, items, columns, context: Calibration tokens of a language model or items of others, columns of a table, length of a text.
        encoder, stats: Fold the encoder or a wrapper's tower too, on images (sound) with texts; a file that `headfold.calibrate` wrote.
        adapter: A LoRA adapter of peft, a directory or a hub id, whose weights are merged into the model before it is folded.
        trust_remote_code: Run the code that the model brings for its class, which the fold then brings too.
        quantised_cache: Rotate K and V, which changes no output, so that a KV cache quantised with offsets rounds them less.
        layout: A checkpoint layout (`headfold.export`); by default the one that stock transformers loads, if there is one.
        seed, force: Seed of everything drawn at random; replace what is at `out`, once the new directory is complete.
        verify, push_to_hub: Compare the output's logits with the twin's; the repository that it is then uploaded to (`--push-to-hub`).
        tokenizer: The tokenizer or processor of a model in memory; by default what lies beside the files that it was opened from.
        device, dtype, progress, say: As for `headfold.calibrate`.

    Raises:
        UserError: options that exclude each other, a model that cannot be folded, data or files that cannot be used, a wrong fold.
    """
    assert out is not None  # `folds_in_memory` names one
    out, progress, place, compute_dtype = Path(out), progress or no_progress, check_device(device), dtype_named(dtype)
    fits = Fits(refit, refit_by, heal, heal_tokens, heal_by)
    latent = LatentRequest.of(
        to, kv_rank, rope_dim, kv_heads=kv_heads, plan=plan, head_dim_multiple=head_dim_multiple, group=group, merge=merge, fits=fits,
        quantised_cache=quantised_cache, encoder=encoder, layout=layout,
    )  # fmt: skip
    source = on_all(lambda: open_source(model, encoder, adapter, progress, say))
    refuse_overlap(source.plain.given, out)
    on_main(lambda: check_upload(push_to_hub))
    given = on_main_only(lambda: open_stats(stats, source))
    data, drawn, said = on_main(lambda: calibration_data(source, calibration, tokens, items, columns, context, seed))
    if latent is not None:
        to_mla = LatentFold(source, latent, data, given, drawn, refit, verify, seed, place, compute_dtype, progress)
        return to_mla.run(out, force, push_to_hub, said, say)
    request = on_main(lambda: resolve_fold(
        source, kv_heads=kv_heads, plan=plan, head_dim_multiple=head_dim_multiple, group=group, merge=merge, fits=fits, device=place,
        data=data, stats=given, layout=layout, quantised_cache=quantised_cache,
    ))  # fmt: skip
    source = with_encoder(source, request.encoder)
    settings = {**request.settings, "layout": layout, "seed": seed, **({"dtype": dtype} if dtype else {})}
    teacher = Teacher(source, request.calibration, place, compute_dtype, progress, drawn, said)
    teacher.use_sample(None if data.names_data else given)
    with FoldJob.opened(out, settings, force, teacher, request, given, push_to_hub) as job:
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
        refits, fitting = None, Fitting()
        if refit and shrinks:
            refits, fitting = job.refitted(teacher, made, statistics)
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
            reach = calibration_reach(source, made, statistics, fitting)
            notes += notes_on(source, job.staging, made, blind, reach)
            costs, times = (serving_cost(source), serving_cost(source, made, layout)), (job.seconds, job.estimated)
            facts = card_facts(
                source, out, job.staging, made, settings, costs, fitting, statistics, reach, verification, times
            )
            write_card(job.staging, exported_card(model_card(source.checkpoint.path, facts), written.export))
            write_recipe(job.staging, source, settings)
            notes += job.committed(out, force, say)
            return FoldResult.of(out, source, made, costs, fitting, verification, notes, *times)

        return on_main(write)
