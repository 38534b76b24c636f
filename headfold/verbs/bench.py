"""Time decoding: several models, attention implementations, contexts and batches, in turns inside one run."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from ..checkpoint.ownership import refuse_contents
from ..core.errors import UserError
from ..core.progress import Progress, no_progress
from ..hf_models import check_device, dtype_named, processor_flags
from ..parallel import main_only
from ..runtime.decoding import TIMINGS, fastest
from ..timing.cases import (
    ATTENTIONS,
    BenchResult,
    BenchRow,
    bench_row,
    check_settings,
    longest_context,
    notes_on,
    opened_models,
    random_models,
    run_round,
)
from ..timing.generation import Setting
from ..timing.machine import read_bandwidth

CONTEXT, BATCH, NEW_TOKENS, ROUNDS = 2048, 4, 32, 5
MIN_KEYS_TO_REPORT = 64
"""Keys below which the choice of a decoding kernel does not matter."""
FLAGS = ("avx", "amx", "sve", "bf16", "fma", "f16c")
"""Prefixes of the processor flags that matter to decoding."""


@main_only
def bench(
    models: Sequence[str | Path] = (),
    *,
    shape: str | None = None,
    kv_heads: Sequence[int] = (),
    layers: int | None = None,
    attentions: Sequence[str] = ATTENTIONS,
    contexts: Sequence[int] = (),
    batches: Sequence[int] = (BATCH,),
    new_tokens: int = NEW_TOKENS,
    rounds: int = ROUNDS,
    dtype: str | None = None,
    padded: bool = False,
    skip_prefill: bool = False,
    profile: Path | None = None,
    force: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Time a new token, and a whole sample, of checkpoints or of random models of a shape.

    Every model runs with each of `attentions`; all cases of a setting alternate, and the first round is not counted.

    Args:
        models: Checkpoint directories or hub ids, folded or not.
        shape: A name of `timing.shapes.SHAPES`, or a checkpoint directory for its shape: random models of it are timed.
        kv_heads: K/V heads of the shape, one model for each count; by default its own.
        layers: Layers of the shape; by default all.
        attentions: Attention implementations. "headfold" is headfold's, with caches that grow in place; any other name is that of
            stock transformers.
        contexts: Tokens of the prompt; by default 2,048 or what the models take.
        batches: Samples at once.
        new_tokens: Tokens to generate after the prompt.
        rounds: Number of rounds to take medians over.
        dtype: dtype of the models; by default the checkpoint's, and bfloat16 for a shape.
        padded: Pad half of the samples on the left.
        skip_prefill: Fill the cache with arbitrary numbers instead of reading the prompt.
        profile: A directory for a trace of each case; the rows then say where time goes.
        force: Write the traces beside other files, and over those of the same names.
        device: "cpu" or "cuda".
        progress: Called with (stage, done, total).

    Raises:
        UserError: nothing to time, a model that does not generate, a setting that it or this machine cannot hold, or files in the way.
    """
    progress, device, kind = progress or no_progress, check_device(device), dtype_named(dtype)
    if profile is not None:
        refuse_contents(Path(profile), force)
    cases = [
        *opened_models(models, attentions, kind, device),
        *random_models(shape, kv_heads, layers, attentions, kind or torch.bfloat16, device),
    ]
    if not cases:
        raise UserError("bench: expected a MODEL or --shape NAME, got neither; name what to time")
    contexts = contexts or (max(1, min(CONTEXT, *(longest_context(case.model) - new_tokens for case in cases))),)
    settings = [Setting(c, b, new_tokens, padded, skip_prefill) for c, b in product(contexts, batches)]
    check_settings(cases, settings, device)
    fastest.cache_clear()  # decoding kernels are chosen, and reported, anew in this run
    first_timing = len(TIMINGS)
    rows: list[BenchRow] = []
    for number, setting in enumerate(settings):
        step = number * (rounds + 1)
        for round_number in range(rounds + 1):
            progress("bench", step + round_number, len(settings) * (rounds + 1))
            run_round(cases, setting, round_number, profile)
        rows += [bench_row(case, name, setting) for case in cases for name in case.attentions]
    progress("bench", 1, 1)
    return BenchResult(
        rows=rows,
        dtype=", ".join(sorted({str(case.model.dtype).removeprefix("torch.") for case in cases})),
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        threads=torch.get_num_threads(),
        flags=sorted(flag for flag in processor_flags() if flag.startswith(FLAGS)),
        read_bandwidth=read_bandwidth(device),
        new_tokens=new_tokens,
        rounds=rounds,
        padded=padded,
        skip_prefill=skip_prefill,
        paths=[str(trial) for trial in TIMINGS[first_timing:] if trial.keys >= MIN_KEYS_TO_REPORT],
        notes=notes_on(cases, device),
    )
