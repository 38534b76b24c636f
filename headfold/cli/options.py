"""Arguments and options that several verbs share, with their help."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory or a hub id.")]
StatsFile = Annotated[Path | None, typer.Option("--stats", metavar="STATS", help="What headfold calibrate wrote.")]
KvHeads = Annotated[
    str | None, typer.Option("--kv-heads", metavar="N", help="K/V heads to keep: a count (4) or a share (1/2).")
]
HeadDimMultiple = Annotated[
    str | None,
    typer.Option(
        "--head-dim-multiple",
        "--head-width",
        metavar="N",
        help="Make K/V heads N times as wide and N times fewer: the same cache, a better fold, N times larger W_q and W_o. auto: as wide "
        "as kernels take (256).",
    ),
]
Group = Annotated[
    str | None,
    typer.Option("--group", metavar="METHOD", help="Who shares a head; see headfold methods. Default: swap."),
]
Merge = Annotated[
    str | None,
    typer.Option("--merge", metavar="METHOD", help="How they become one; see headfold methods. Default: absorb."),
]
Route = Annotated[
    str, typer.Option("--route", metavar="ROUTE", help="How to divide them; see headfold methods. Default: kdgqa.")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="SOURCE",
        help="A text file or folder, FILE.jsonl[:COLUMN], FILE.parquet[:COLUMN], a hub dataset "
        "(hub:NAME[:CONFIG][:SPLIT][:COLUMN]), stdlib (this machine's Python sources) or self (text that the model writes). Default: self.",
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option("--tokens", metavar="N", min=1, help="Calibration tokens of a language model. Default: 65536."),
]
Items = Annotated[
    int | None,
    typer.Option(
        "--items",
        metavar="N",
        min=1,
        help="Calibration items of other models. Default: 2048 pairs or sentences, 512 images or sounds.",
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns", metavar="NAME,NAME", help="Where a source has them under other names than source,target or image."
    ),
]
Encoder = Annotated[
    bool, typer.Option("--encoder", help="Fold an encoder-decoder's encoder too; by default only its decoder.")
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context", metavar="N", min=2, help="Tokens per window. Default: the model's own, at most 1024 (eval: 2048)."
    ),
]
Layout = Annotated[
    str | None,
    typer.Option(
        "--layout",
        metavar="LAYOUT",
        help="native, padded (unequal groups), per-layer or decilm (a count per layer), or headfold (its own runtime's). "
        "Default: the one that stock transformers loads, if there is one.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of everything that is drawn at random.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]

KvBudget = Annotated[
    str | None,
    typer.Option(
        "--kv-budget", metavar="SHARE", help="Share of the K/V cache to keep, spread over layers: 25% or 1/4."
    ),
]
KvBytes = Annotated[
    str | None,
    typer.Option("--kv-bytes", metavar="SIZE", help="K/V bytes per token to keep, spread over layers: 40KiB."),
]
MaxLossIncrease = Annotated[
    float | None,
    typer.Option(
        "--max-loss-increase",
        "--max-rise",
        metavar="NATS",
        help="The least cache whose predicted loss per token is at most this.",
    ),
]
Allowed = Annotated[
    str | None,
    typer.Option("--allowed", metavar="N,N", help="Counts of K/V heads that a layer may get, beside its own."),
]
Tp = Annotated[
    int, typer.Option("--tp", metavar="N", min=1, help="Devices of tensor parallelism: counts are multiples of it.")
]
Spread = Annotated[
    str, typer.Option("--spread", metavar="METHOD", help="exact, or qcqa: its second stage, for comparison.")
]
Sensitivity = Annotated[
    Path | None,
    typer.Option(
        "--sensitivity",
        metavar="FILE",
        help="Where the damage of single layers is kept, and read again. Default: beside the plan.",
    ),
]
Workers = Annotated[int, typer.Option("--workers", metavar="N", min=1, help="Layers that are decided side by side.")]
Heal = Annotated[
    bool, typer.Option("--heal", help="Then train every block's attention alone to the original's output (minutes).")
]
HealTokens = Annotated[
    int | None,
    typer.Option(
        "--heal-tokens",
        metavar="N",
        min=1,
        help="Tokens (or items) of the calibration source that --heal trains every block with, more than once where there are fewer. "
        "Default: 524288 tokens, 16384 images.",
    ),
]
Refit = Annotated[
    bool, typer.Option("--refit/--no-refit", help="Refit W_o and W_v of every block to the original's output.")
]
