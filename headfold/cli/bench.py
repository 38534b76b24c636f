"""headfold bench."""

from pathlib import Path
from typing import Annotated

import typer

from .options import DATA, HOW, MEASURE, OUTPUT, WHERE, Debug, Device, Force, Json, option
from .output import answered, counts, given

EXAMPLES = (
    "headfold bench my-model my-model-gqa --context 2048,8192",
    "headfold bench --shape llama-2-7b --layers 2 --kv-heads 32,8 --skip-prefill",
)


def bench(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Checkpoint directories or hub ids, folded or not.")
    ] = None,
    shape: Annotated[
        str | None,
        option(
            "--shape", panel=MEASURE, metavar="SHAPE",
            help="Time a random model instead, before there is a fold: attention, llama-2-7b, llama-2-13b, t5-large, t5-xl, t5-xxl, "
            "gpt2-xl, or a checkpoint directory for its shape.",
        ),
    ] = None,
    kv_heads: Annotated[
        str | None,
        option("--kv-heads", panel=MEASURE, metavar="N,N", help="K/V heads of the shape, one model for each count."),
    ] = None,
    layers: Annotated[
        int | None, option("--layers", panel=MEASURE, metavar="N", min=1, help="Layers of the shape; by default all.")
    ] = None,
    attention: Annotated[
        str,
        option(
            "--attention", panel=HOW, metavar="NAME,NAME",
            help="Attention implementations: headfold, with caches that grow in place, or those of stock transformers by name.",
        ),
    ] = "headfold,sdpa",
    rounds: Annotated[
        int, option("--rounds", panel=HOW, metavar="N", min=1, help="Number of rounds to take medians over.")
    ] = 5,
    skip_prefill: Annotated[
        bool,
        option(
            "--skip-prefill", panel=HOW,
            help="Do not read the prompt: fill the cache with arbitrary numbers, and time new tokens alone.",
        ),
    ] = False,
    context: Annotated[
        str | None,
        option("--context", panel=DATA, metavar="N,N", help="Tokens of the prompt. Default: 2048, or what the model takes."),
    ] = None,
    batch: Annotated[str, option("--batch", panel=DATA, metavar="N,N", help="Samples at once.")] = "4",
    new_tokens: Annotated[
        int, option("--new-tokens", panel=DATA, metavar="N", min=2, help="Tokens to generate after the prompt.")
    ] = 32,
    padded: Annotated[bool, option("--padded", panel=DATA, help="Pad half of the samples on the left.")] = False,
    device: Device = None,
    dtype: Annotated[
        str | None,
        option("--dtype", panel=WHERE, metavar="DTYPE", help="Default: the checkpoint's; bfloat16 for a shape."),
    ] = None,
    profile: Annotated[
        Path | None,
        option("--profile", panel=OUTPUT, metavar="DIR", help="Show where time goes, and write a trace of each case there."),
    ] = None,
    plot: Annotated[
        Path | None,
        option("--plot", panel=OUTPUT, metavar="FILE.png", help="Draw time against K/V heads, or the context."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Time decoding on this machine.

    Times every new token inside generate, of folds and of their originals, with headfold's attention and with that of stock
    transformers, alternating within one run. Reports which decoding kernel was chosen on this machine, and why."""
    from ..outputs import refuse_existing
    from ..parallel import is_main
    from ..reports import timings
    from ..reports.plot import require_plot
    from ..reports.progress import ProgressReport
    from ..verbs import bench as verb

    if plot is not None:
        require_plot(plot)
        refuse_existing(plot, force)
    chosen = given(
        contexts=context and counts("--context", context),
        kv_heads=kv_heads and counts("--kv-heads", kv_heads),
        shape=shape, layers=layers, dtype=dtype, device=device, profile=profile,
    )  # fmt: skip
    with ProgressReport(brief=as_json) as progress:
        found = verb.bench(
            models or (), attentions=[name.strip() for name in attention.split(",")], batches=counts("--batch", batch),
            new_tokens=new_tokens, rounds=rounds, padded=padded, skip_prefill=skip_prefill, force=force, progress=progress, **chosen,
        )  # fmt: skip
    if not answered(found.to_json(), as_json):
        timings.show_bench(found)
    if plot is not None and is_main():
        timings.plot_bench(plot, found)
