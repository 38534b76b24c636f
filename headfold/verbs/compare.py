"""Fold by every method at every count of K/V heads on the user's model and data: one table, and no row is computed twice."""

import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..comparison import (
    STATISTICS,
    MethodComparison,
    MethodRow,
    earlier_rows,
    scored,
    write_rows,
)
from ..conversion.comparison_methods import DEFAULT, METHODS, REFIT, check_methods, common_counts
from ..conversion.source import open_source, open_stats
from ..core.errors import UserError
from ..core.files import file_digest
from ..core.progress import Progress, no_progress
from ..corpus.samples import kind_of
from ..evaluate.data import DataEvaluation, check_source
from ..evaluate.perplexity import Evaluation
from ..hf_models import check_device, dtype_named
from ..outputs import owned_directory, remove_output
from ..pages.writing import methods_page
from ..parallel import ProcessLost, on_all, on_main, spmd
from ..stats_file import StatsFile
from ..timing.machine import peak_memory
from ..trusted_code import trusts_code
from .calibrate import calibrate
from .evaluate import evaluate
from .fold import fold

FOLDED = ".headfold-folded"
"""Name of the directory that holds the fold of a row while it is measured; no directory of a user has it."""


@spmd
@trusts_code("model")
def compare(
    model: str | Path,
    kv_heads: Sequence[str | int],
    *,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    methods: Sequence[str] = DEFAULT,
    out: str | Path | None = None,
    text: str | None = None,
    limit: int | None = None,
    calibration: str | None = None,
    tokens: int | None = None,
    items: int | None = None,
    columns: Sequence[str] = (),
    context: int | None = None,
    stats: str | Path | None = None,
    seed: int = 0,
    force: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> MethodComparison:
    """Fold `model` by each of `methods` to each of `kv_heads`, and measure the loss increase.

    Statistics are measured once, for all methods, or taken from `stats`. Rows are kept in the directory `out`, and another call with the
    same settings goes on from there.

    Args:
        model, adapter: A checkpoint directory, a GGUF file or a hub id, and a LoRA adapter of peft that is merged into it first.
        trust_remote_code: Run the code that the model brings for its class.
        kv_heads: Counts of K/V heads, or shares of the source's.
        methods: Names of `METHODS`, with `+refit` for a refit.
        out: The directory of the rows; by default the model's name with `.compare`.
        text, limit: Data to measure on, as in `headfold.eval`, and how many items of them, or tokens of plain text.
        calibration: A source of calibration data (`headfold.calibrate`).
        tokens, items: Calibration tokens of a language model, and calibration items of other models.
        columns, context: Columns of a table, and tokens per window, of calibration data and of what is measured on.
        stats: A file that `headfold.calibrate` wrote; `context` is then that of what is measured on alone.
        seed, force: Seed of everything drawn at random; start over if `out` holds rows of other settings.
        device, dtype: "cpu" or "cuda", and what the models compute in, such as "float32".
        progress: Called with (stage, done, total).

    Raises:
        UserError: an unknown method, a count that no site can have, options that contradict each other, data that does not suit the
            model, or no method that could be folded.
    """
    check_methods(methods)
    dtype_named(dtype)  # refuses here what every verb that compare calls would refuse
    progress, device = progress or no_progress, check_device(device)
    source = on_all(lambda: open_source(model, adapter=adapter, progress=progress))
    measures = {"calibration": calibration, "tokens": tokens, "items": items}
    if stats is not None and (named := [f"--{name}" for name, value in measures.items() if value is not None]):
        raise UserError(
            f"compare: --stats and {' and '.join(named)} exclude each other, as statistics name their own data; give one"
        )
    check_source(text, kind_of(source.config), model)
    wanted = [(name, count) for count in common_counts(source, kv_heads, methods) for name in methods]
    directory = Path(out or f"{source.checkpoint.path.resolve().name}.compare")
    measured = Path(stats) if stats is not None else directory / STATISTICS

    def begin() -> tuple[dict[str, Any], list[MethodRow], bool]:
        open_stats(stats, source)
        settings = {
            "version": version("headfold"), "model": source.checkpoint.fingerprint(), "text": text, "limit": limit,
            "calibration": calibration, "tokens": tokens, "items": items, "columns": list(columns), "context": context, "seed": seed,
            "dtype": dtype, "stats": stats and StatsFile(Path(stats)).metadata,
            "files": [file_digest(name) for name in (text, calibration)],
        }  # fmt: skip
        known = earlier_rows(directory, settings, force)
        write_rows(directory, settings, known)  # before anything else lies there: it says whose directory this is
        return settings, known, measured.exists()

    with owned_directory(directory):
        settings, known, calibrated = on_main(begin)
        if not calibrated:
            calibrate(
                model, measured, calibration=calibration, tokens=tokens, items=items, columns=columns, context=context, seed=seed,
                adapter=adapter, device=device, dtype=dtype, progress=progress,
            )  # fmt: skip
        rows, skipped = {(row.method, row.num_kv_heads): row for row in known}, {}
        for number, (name, count) in enumerate(wanted):
            progress("compare", number, len(wanted))
            if (name, count) in rows:
                continue
            made = directory / FOLDED
            on_main(partial(remove_output, made))
            started = time.monotonic()
            try:
                with peak_memory(device) as peak:
                    result = fold(
                        source.name, made, kv_heads=f"{count}/{source.num_kv_heads}", refit=name.endswith(REFIT), stats=measured, seed=seed,
                        verify=False, adapter=adapter, device=device, dtype=dtype, **METHODS[name.removesuffix(REFIT)],
                    )  # fmt: skip
            except ProcessLost:
                raise
            except UserError as error:
                skipped[f"{name} at {count}"] = str(error)
                continue
            seconds = round(time.monotonic() - started, 2)
            try:
                found = evaluate(
                    made, reference=source.name, adapter=adapter, text=text, limit=limit, columns=columns or None, device=device,
                    dtype=dtype, max_new_tokens=0, context=context,
                )  # fmt: skip
            finally:
                on_main(partial(remove_output, made))
            assert isinstance(found, Evaluation | DataEvaluation)
            cost = result.after
            rows[name, count] = MethodRow(
                name, count, cost.kv_bytes_per_token, *scored(found), seconds, peak.num_bytes, cost.weight_bytes, cost.flops_per_token
            )  # fmt: skip
            on_main(lambda: write_rows(directory, settings, list(rows.values())))
        page = on_main(lambda: methods_page(directory))
    progress("compare", len(wanted), len(wanted))
    if skipped and not rows:
        raise UserError(f"compare: no method could be folded; {next(iter(skipped))}: {next(iter(skipped.values()))}")
    chosen = [rows[pair] for pair in dict.fromkeys(wanted) if pair in rows]
    return MethodComparison(str(model), text or "the bundled text", str(directory), chosen, skipped, page)
