"""The verb that times: bench."""

from pathlib import Path
from typing import Annotated

import typer

from ..report.progress import ProgressReport
from .answers import answer, counts, given
from .options import Debug, Json


def bench(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Checkpoint directories or hub ids, folded or not.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="SHAPE",
            help="Time a random model instead, before there is a fold: attention, llama-2-7b, llama-2-13b, t5-large, t5-xl, t5-xxl, "
            "gpt2-xl, or a checkpoint directory for its shape.",
        ),
    ] = None,
    kv_heads: Annotated[
        str | None, typer.Option("--kv-heads", metavar="N,N", help="K/V heads of the shape, one model for each count.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", metavar="N", min=1, help="Layers of the shape; by default all.")
    ] = None,
    attention: Annotated[
        str,
        typer.Option(
            "--attention",
            metavar="NAME,NAME",
            help="headfold is ours, with caches that grow in place; any other name is stock transformers'.",
        ),
    ] = "headfold,sdpa",
    context: Annotated[
        str | None,
        typer.Option("--context", metavar="N,N", help="Tokens of the prompt. Default: 2048, or what the model takes."),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", metavar="N,N", help="Samples at once.")] = "4",
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", metavar="N", min=2, help="Tokens to generate behind the prompt.")
    ] = 32,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Rounds that medians are over.")] = 5,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="Default: the checkpoint's; bfloat16 of a shape."),
    ] = None,
    padded: Annotated[bool, typer.Option("--padded", help="Pad half of the samples on the left.")] = False,
    skip_prefill: Annotated[
        bool,
        typer.Option(
            "--skip-prefill",
            help="Do not read the prompt: fill the cache with arbitrary numbers, and time new tokens alone.",
        ),
    ] = False,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", metavar="DIR", help="Show where time goes, and write a trace of each case there."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw time against K/V heads, or the context.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time decoding on this machine.

    Times every new token inside generate: of folds beside their originals, under headfold's attention and under stock ones, in turns
    inside one run. Says which way of decoding was chosen here, and why."""
    from ..recipe import benching
    from ..report import timings
    from ..report.plot import require_plot

    if plot is not None:
        require_plot(plot)
    chosen = given(
        contexts=context and counts("--context", context),
        kv_heads=kv_heads and counts("--kv-heads", kv_heads),
        shape=shape, layers=layers, dtype=dtype, profile=profile,
    )  # fmt: skip
    with ProgressReport(silent=as_json) as progress:
        found = benching.bench(
            models or (), attentions=[name.strip() for name in attention.split(",")], batches=counts("--batch", batch),
            new_tokens=new_tokens, rounds=rounds, padded=padded, skip_prefill=skip_prefill, progress=progress, **chosen,
        )  # fmt: skip
    answer(found.to_json(), as_json) or timings.show_bench(found)
    if plot is not None:
        timings.plot_bench(plot, found)
