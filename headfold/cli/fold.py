"""headfold fold."""

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import UserError
from .options import (
    HOW,
    OUTPUT,
    WHAT,
    Adapter,
    Calibration,
    Columns,
    Context,
    Debug,
    Device,
    Dtype,
    Encoder,
    Force,
    Group,
    HeadDimMultiple,
    HeadWidth,
    Items,
    Json,
    KvHeads,
    KvRank,
    Layout,
    Merge,
    Model,
    Refit,
    RopeDim,
    Seed,
    StatsFile,
    To,
    Tokens,
    TrustRemoteCode,
    Verify,
    option,
)  # fmt: skip
from .output import answered, given, names, renamed

EXAMPLES = (
    "headfold fold my-model my-model-gqa --kv-heads 1/4",
    "headfold fold my-t5 my-t5-gqa --kv-heads 2 --calibration pairs.jsonl",
)


def fold(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint directory to write.")],
    kv_heads: KvHeads = None,
    plan: Annotated[
        Path | None, option("--plan", panel=WHAT, metavar="PLAN.json", help="A plan that headfold plan wrote.")
    ] = None,
    to: To = None,
    kv_rank: KvRank = None,
    rope_dim: RopeDim = None,
    encoder: Encoder = False,
    adapter: Adapter = None,
    trust_remote_code: TrustRemoteCode = False,
    head_dim_multiple: HeadDimMultiple = None,
    group: Group = None,
    merge: Merge = None,
    refit: Refit = True,
    refit_by: Annotated[
        str | None,
        option(
            "--refit-by", panel=HOW, metavar="WHAT",
            help="model: at its end the refit trains all sites together by the model's output, in one pass over the calibration data. "
            "block: one at a time by its own output, in the memory of one block. squares: it ends with least squares, which is fastest. "
            "Default: model for language models of 67 M parameters or more and for the decoder of a model of speech, if memory holds it; "
            "squares before a --heal-by model that sees at least as much data once; else block.",
        ),
    ] = None,
    heal: Annotated[
        bool, option("--heal", panel=HOW, help="After the refit, train attention to reproduce the original's output (takes minutes).")
    ] = False,
    heal_tokens: Annotated[
        int | None,
        option(
            "--heal-tokens", panel=HOW, metavar="N", min=1,
            help="Tokens (or items) of the calibration source that --heal trains on; data is repeated if there is less. "
            "Default: by model 131072 tokens, 8192 images, 2048 windows of sound; by block 524288, 16384 and 4096.",
        ),
    ] = None,
    heal_by: Annotated[
        str | None,
        option(
            "--heal-by", panel=HOW, metavar="WHAT",
            help="model: train all sites together by the model's output. block: one at a time by its own output, in the memory of one "
            "block. Default: model for language models of 67 M parameters or more, block for all others.",
        ),
    ] = None,
    quantised_cache: Annotated[
        bool,
        option(
            "--quantised-cache", panel=HOW,
            help="Rotate K and V, which changes no output, so that an engine that quantises the KV cache with an offset per group "
            "(transformers, mlx-lm) rounds them less. llama.cpp rotates such a cache itself.",
        ),
    ] = False,
    seed: Seed = 0,
    calibration: Calibration = None,
    tokens: Tokens = None,
    items: Items = None,
    columns: Columns = None,
    context: Context = None,
    stats: StatsFile = None,
    device: Device = None,
    dtype: Dtype = None,
    layout: Layout = None,
    verify: Verify = True,
    push_to_hub: Annotated[
        str | None,
        option(
            "--push-to-hub", panel=OUTPUT, metavar="REPO",
            help="Upload OUT to this repository on the hub at the end, with your token (hf auth login). A new one is public, unless the "
            "account's or organisation's default is private.",
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
    head_width: HeadWidth = None,
) -> None:  # fmt: skip
    """Write the model again with fewer K/V heads.

    OUT is a checkpoint directory, a stock one where the architecture allows it, with a card (README.md) and the plan (plan.json) beside
    the weights."""
    head_dim_multiple = renamed("--head-width", "--head-dim-multiple", head_width, head_dim_multiple)
    if (to, kv_rank, rope_dim) == (None, None, None):
        _check(kv_heads, plan, group, merge, head_dim_multiple)
    from ..reports import views
    from ..reports.progress import ProgressReport
    from ..verbs import fold as verb

    chosen = given(
        kv_heads=kv_heads, plan=plan, group=group, merge=merge, calibration=calibration, tokens=tokens, items=items,
        columns=names(columns), context=context, stats=stats, layout=layout, head_dim_multiple=head_dim_multiple, adapter=adapter,
        heal_tokens=heal_tokens, heal_by=heal_by, refit_by=refit_by, push_to_hub=push_to_hub, to=to,
        kv_rank=kv_rank, rope_dim=rope_dim,
    )  # fmt: skip
    with ProgressReport(brief=as_json) as progress:
        result = verb.fold(
            model, out, refit=refit, heal=heal, encoder=encoder, seed=seed, force=force, verify=verify, device=device, dtype=dtype,
            quantised_cache=quantised_cache, trust_remote_code=trust_remote_code, progress=progress, say=progress.say, **chosen,
        )  # fmt: skip
    if not answered(result.to_json(), as_json):
        (views.show_fold if to is None else views.show_latent_fold)(result)


def _check(
    kv_heads: str | None, plan: Path | None, group: str | None, merge: str | None, head_dim_multiple: str | None
) -> None:
    """Refuse options that exclude each other."""
    if (kv_heads is None) == (plan is None):
        number = "none" if plan is None else "both"
        raise UserError(f"fold: expected either --kv-heads N or --plan PLAN.json, got {number}; give one")
    decided = {"--group": group, "--merge": merge, "--head-dim-multiple": head_dim_multiple}
    refused = [option for option, value in decided.items() if value is not None]
    if plan is not None and refused:
        raise UserError(
            f"fold: {' and '.join(refused)} beside --plan {plan}; the plan decides, leave them out or make another plan"
        )
