"""Write a fold again in another layout: the same function in a form that other classes or engines read."""

from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoint.cards import read_card, write_card
from ..checkpoint.reader import Checkpoint
from ..checkpoint.staging import commit, copy_file, job_key, refuse_overlap
from ..conversion.layouts import compare_layouts
from ..core.errors import UserError
from ..core.progress import Progress, no_progress
from ..divergence import TOLERANCE
from ..exports.card import exported_card
from ..exports.folded import Folded, open_folded
from ..exports.formats import EngineFormat, check_format, engine_formats
from ..exports.layout import choose_layout, make_export
from ..exports.misread import misread_by
from ..exports.pieces import Export, write_export
from ..hf_models import check_device, dtype_named
from ..latent.gguf import export_latent, is_latent
from ..outputs import owned_file, staged
from ..parallel import main_only

EXACT = "float32"
"""The number type whose output is compared, as one without a number type is: others round."""


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export wrote. `difference` and `tolerance` are of logits, absolute; None where they were not compared."""

    out: Path
    layout: str
    model_class: str
    description: str
    """One line on what the layout is and what loads it."""
    num_kv_heads: tuple[int, ...]
    """By layer; empty for a fold to MLA."""
    difference: float | None
    tolerance: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the machine-readable form, as --json prints it."""
        return {name: getattr(self, name) for name in self.__slots__} | {"out": str(self.out)}


@main_only
def export(
    folded: str | Path,
    out: str | Path,
    *,
    layout: str | None = None,
    quantise: str | None = None,
    force: bool = False,
    verify: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Write what `fold` left in `folded` again as `out`, in another layout.

    Args:
        folded: A checkpoint directory that `headfold.fold` wrote.
        out: The directory to write, or the file where the layout is one.
        layout: native (one count of K/V heads, equal groups), padded (unequal groups), per-layer or decilm (a count per layer), gguf (a
            file for llama.cpp), ct2 (a directory for CTranslate2) or onnx (graphs for onnxruntime); by default the one that stock
            transformers loads.
        quantise: What gguf stores matrices as: f32, bf16, f16, q8_0, q4_0 (K, V, O and embeddings as q8_0) or q4_0-pure; ct2: int8 and
            others; onnx: f16. By default the checkpoint's own numbers, for onnx float32.
        force: Replace what is at `out`.
        verify: Compare the logits of the output with those of headfold's runtime.
        device: Where the logits are compared: "cpu" or "cuda".
        dtype: What they are computed in: "float32" or "float64"; by default the first that holds the weights.
        progress: Called with (stage, done, total).

    Raises:
        UserError: not a fold, a layout that cannot hold it, or an output whose logits differ.
    """
    progress, out = progress or no_progress, Path(out)
    place, compute_dtype = check_device(device), dtype_named(dtype)
    if compute_dtype is not None and compute_dtype not in TOLERANCE:
        raise UserError(f"--dtype {dtype}: expected float32 or float64, to compare logits in; choose one of them")
    refuse_overlap(Path(folded), out)
    if is_latent(Path(folded)):
        said = export_latent(Path(folded), out, layout, quantise, force, partial(progress, "write"))
        return ExportResult(out, str(layout), said.model_class, said.description, (), None, None)
    checkpoint, source = open_folded(folded)
    if layout in engine_formats():
        form = check_format(checkpoint, source, str(layout), out, quantise)
        return _write_format(checkpoint, source, out, form, quantise, force, verify, progress)
    if quantise is not None:
        raise UserError(
            f"--quantise {quantise}: expected --layout {', '.join(engine_formats())} with it; checkpoints keep their numbers"
        )
    chosen = choose_layout(source.config, layout, source.where)
    if chosen is None:
        raise UserError(_nothing_to_export(source))
    made = make_export(checkpoint, source, chosen)
    with staged(out, _key(checkpoint, chosen), force) as staging:
        write_export(checkpoint, made, staging, lambda done, total: progress("write", done, total))
        _copy_plan_and_card(checkpoint, made, staging)
        difference, tolerance = (
            compare_layouts(checkpoint, made, staging, progress, place, compute_dtype) if verify else (None, None)
        )
        commit(staging, out, force)
    description = ". ".join(filter(None, (made.description, misread_by(made.config))))
    return ExportResult(out, chosen, made.model_class, description, source.counts, difference, tolerance)


def _write_format(
    checkpoint: Checkpoint,
    source: Folded,
    out: Path,
    form: EngineFormat,
    number_type: str | None,
    force: bool,
    verify: bool,
    progress: Progress,
) -> ExportResult:
    """Write the file or directory that an engine reads; directories are compared where the format can, and nothing of a kill is kept."""
    advance = partial(progress, "write")
    difference: tuple[float, float] | tuple[None, None] = (None, None)
    if form.suffix:
        with owned_file(out, force):
            made = form.write(checkpoint, source, out, number_type, advance)
    else:
        with staged(out, _key(checkpoint, form.name, number_type), force, resumes=False) as staging:
            made = form.write(checkpoint, source, staging, number_type, advance)
            if verify and form.compare and number_type in (None, EXACT):
                difference = form.compare(checkpoint, staging, progress)
            commit(staging, out, force)
    return ExportResult(out, form.name, made.model_class, made.description, source.counts, *difference)


def _key(checkpoint: Checkpoint, layout: str, number_type: str | None = None) -> str:
    return job_key(
        {"version": version("headfold"), "layout": layout, "numbers": number_type, "source": checkpoint.fingerprint()}
    )


def _nothing_to_export(source: Folded) -> str:
    if "headfold" not in source.config:
        return (
            f"{source.where}: expected a fold in headfold's own form, got the stock class {source.config['architectures'][0]}, which "
            "needs no export; name another layout with --layout"
        )
    return f"{source.where}: {source.model_type} has no stock layout for this fold; headfold's runtime runs it as it is"


def _copy_plan_and_card(checkpoint: Checkpoint, made: Export, staging: Path) -> None:
    if (checkpoint.path / "plan.json").is_file():
        copy_file(checkpoint.path / "plan.json", staging / "plan.json")
    if card := read_card(checkpoint.path):
        write_card(staging, exported_card(card, made))
