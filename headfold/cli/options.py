"""Arguments and options of the command line that several verbs share, in the panels in which --help shows them."""

from pathlib import Path
from typing import Annotated, Any

import typer

WHAT, HOW, DATA, WHERE, OUTPUT = "What to fold", "How", "Data", "Where it runs", "Output"
MEASURE = "What to measure"
"""Titles of the panels."""


def option(*flags: str, panel: str, help: str, metavar: str | None = None, **limits: Any) -> Any:
    """Return a typer option in a panel."""
    return typer.Option(*flags, rich_help_panel=panel, help=help, metavar=metavar, **limits)


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory, a GGUF file or a hub id.")]
Adapter = Annotated[
    str | None,
    option(
        "--adapter", panel=WHAT, metavar="DIR", help="A LoRA adapter of peft, merged into the model before folding."
    ),
]
TrustRemoteCode = Annotated[
    bool,
    option(
        "--trust-remote-code",
        panel=WHAT,
        help="Run code that the checkpoint brings for its class, once you have read it. Without this, none is run.",
    ),
]
StatsFile = Annotated[
    Path | None, option("--stats", panel=DATA, metavar="STATS", help="Statistics that headfold calibrate wrote.")
]
KvHeads = Annotated[
    str | None,
    option(
        "--kv-heads",
        panel=WHAT,
        metavar="N",
        help="K/V heads to keep: a count (4) or a share of the model's (1/2, 50%).",
    ),
]
To = Annotated[
    str | None,
    option(
        "--to", panel=WHAT, metavar="mla",
        help="mla: one latent for K and V of all heads, and a rotary key, as DeepseekV3ForCausalLM has them. Default: fewer K/V heads.",
    ),
]  # fmt: skip
KvRank = Annotated[
    str | None,
    option(
        "--kv-rank", panel=WHAT, metavar="R",
        help="With --to mla: dims of the latent (512), or the share of the cache that latent and rotary key have (1/4, 25%).",
    ),
]  # fmt: skip
RopeDim = Annotated[
    int | None,
    option(
        "--rope-dim", panel=WHAT, metavar="D",
        help="With --to mla: dims of the rotary key. Default: of a share the best by predicted error, beside R dims 64 or the head_dim.",
    ),
]  # fmt: skip
Encoder = Annotated[
    bool,
    option(
        "--encoder",
        panel=WHAT,
        help="Fold the encoder of an encoder-decoder, or the tower of a "
        "wrapper (LLaVA …), too; by default only the decoder.",
    ),
]
HeadDimMultiple = Annotated[
    str | None,
    option(
        "--head-dim-multiple",
        panel=HOW,
        metavar="N|auto",
        help="Multiply head_dim by N and divide the number of K/V heads by N: the same cache, a smaller loss, W_q and W_o N times larger, "
        "and on a CPU a slower decode than with usual heads of that cache. auto: the largest head_dim up to 256.",
    ),
]
HeadWidth = Annotated[str | None, typer.Option("--head-width", hidden=True, help="Former name of --head-dim-multiple.")]
Group = Annotated[
    str | None,
    option(
        "--group", panel=HOW, metavar="METHOD", help="How K/V heads are grouped; see headfold methods. Default: swap."
    ),
]
Merge = Annotated[
    str | None,
    option(
        "--merge",
        panel=HOW,
        metavar="METHOD",
        help="How the heads of a group are merged; see headfold methods. Default: absorb.",
    ),
]
Refit = Annotated[
    bool,
    option(
        "--refit/--no-refit",
        panel=HOW,
        help="Refit the projections of every site to the original's attention and output (W_q and W_k given 16 tokens or more per "
        "hidden dim).",
    ),
]
Seed = Annotated[int, option("--seed", panel=HOW, help="Seed of everything drawn at random.")]
Calibration = Annotated[
    str | None,
    option(
        "--calibration",
        panel=DATA,
        metavar="SOURCE",
        help="A text file or folder, FILE.jsonl[:COLUMN], FILE.parquet[:COLUMN], a hub dataset (hub:NAME[:CONFIG][:SPLIT][:COLUMN]), "
        "stdlib (this machine's Python sources), self (text that a language model writes), two aligned files (SRC.en,TGT.de), or a folder "
        "of images or sound. Default: self. Models that are no language models need a source.",
    ),
]
Tokens = Annotated[
    int | None,
    option("--tokens", panel=DATA, metavar="N", min=1, help="Calibration tokens of a language model. Default: 65536."),
]
Items = Annotated[
    int | None,
    option(
        "--items",
        panel=DATA,
        metavar="N",
        min=1,
        help="Calibration items of other models. Default: 2048 pairs or sentences, 512 images, captions or recordings.",
    ),
]
Columns = Annotated[
    str | None,
    option(
        "--columns", panel=DATA, metavar="NAME,NAME", help="Columns of a table. Default: source,target or image,label."
    ),
]
Context = Annotated[
    int | None,
    option(
        "--context",
        panel=DATA,
        metavar="N",
        min=2,
        help="Tokens per window, or where texts are cut. Default: the model's own context, at most 1024.",
    ),
]
Layout = Annotated[
    str | None,
    option(
        "--layout",
        panel=OUTPUT,
        metavar="LAYOUT",
        help="native, padded (unequal groups), per-layer or decilm (a count per layer), "
        "another file of exports/layouts, headfold (its own "
        "runtime's), or for export alone gguf (a file for llama.cpp, "
        "not compared), ct2 (a directory for CTranslate2) or onnx (graphs for onnxruntime). Default: "
        "the one that stock transformers loads, if there is one.",
    ),
]
Verify = Annotated[
    bool,
    option(
        "--verify/--no-verify",
        panel=OUTPUT,
        help="Open the result again and compare its logits with those of the original with repeated shared heads.",
    ),
]
Force = Annotated[bool, option("--force", panel=OUTPUT, help="Overwrite the output.")]
Json = Annotated[
    bool, option("--json", panel=OUTPUT, help="Print one JSON value on stdout, and only now and then a line on stderr.")
]
Debug = Annotated[bool, option("--debug", panel=OUTPUT, help="Show the full traceback of an error.")]
Device = Annotated[
    str | None,
    option("--device", panel=WHERE, metavar="DEVICE", help="cpu or cuda. Default: the accelerator, if there is one."),
]
Dtype = Annotated[
    str | None,
    option(
        "--dtype",
        panel=WHERE,
        metavar="DTYPE",
        help="What models compute in: bfloat16, float16, float32 or float64. Default: the fastest that holds the weights.",
    ),
]
Workers = Annotated[int, option("--workers", panel=WHERE, metavar="N", min=1, help="Threads that group sites.")]
Allowed = Annotated[
    str | None,
    option(
        "--allowed",
        panel=WHAT,
        metavar="N,N",
        help="Counts of K/V heads that a budget may use, in addition to a layer's own. Default: all divisors.",
    ),
]
Tp = Annotated[
    int,
    option(
        "--tp",
        panel=WHAT,
        metavar="N",
        min=1,
        help="Number of tensor-parallel devices; every count is a multiple of it.",
    ),
]
Sensitivity = Annotated[
    Path | None,
    option(
        "--sensitivity",
        panel=DATA,
        metavar="FILE",
        help="File that stores measured sensitivities of single layers and is reused. Default: beside the output.",
    ),
]
