"""headfold export."""

from pathlib import Path
from typing import Annotated

import typer

from .options import OUTPUT, Debug, Device, Dtype, Force, Json, Layout, Verify, option
from .output import answered

EXAMPLES = (
    "headfold export my-pythia-gqa my-pythia-phi --layout native",
    "headfold export my-model-gqa my-model.gguf --layout gguf --quantise q8_0",
)


def export(
    folded: Annotated[Path, typer.Argument(metavar="FOLDED", help="A checkpoint that headfold fold wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write, or the file of --layout gguf.")],
    layout: Layout = None,
    quantise: Annotated[
        str | None,
        option(
            "--quantise",
            "--quantize",
            panel=OUTPUT,
            metavar="TYPE",
            help="What --layout gguf stores matrices as: f32, bf16, f16, q8_0, q4_0 (then K, V, O and "
            "embeddings as q8_0) or q4_0-pure; --layout ct2: int8, float16, bfloat16 and others of CTranslate2; --layout onnx: f16. "
            "Default: the checkpoint's own, for onnx float32.",
        ),
    ] = None,
    verify: Verify = True,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rewrite a fold in another layout; it computes the same function.

    Layouts are checkpoint forms that stock classes or engines read: see --layout."""
    from ..reports.exports import show_export
    from ..reports.progress import ProgressReport
    from ..verbs import export as verb

    with ProgressReport(brief=as_json) as progress:
        result = verb.export(
            folded,
            out,
            layout=layout,
            quantise=quantise,
            force=force,
            verify=verify,
            device=device,
            dtype=dtype,
            progress=progress,
        )
    if not answered(result.to_json(), as_json):
        show_export(result)
