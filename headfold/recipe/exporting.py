"""Write a fold in the layout of a stock class or an engine, and compare what both say."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.reader import Checkpoint
from ..checkpoint.staging import commit, disown, open_staging, refuse_overlap
from ..core.errors import UserError
from ..evaluate.verify import TOLERANCE
from ..export.card import exported_card
from ..export.folded import Folded, open_folded
from ..export.layout import choose_layout, make_export
from ..export.pieces import Export, write_export
from ..export.rounding import Unrounded
from ..hf_models import open_model, stored_dtype
from ..runtime.load import own_class
from .source import Progress, silent
from .verifying import random_sample


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export wrote. `difference` and `tolerance` are of logits, absolute; None where they were not compared."""

    out: Path
    layout: str
    model_class: str
    said: str
    kv_heads: tuple[int, ...]
    """By layer."""
    difference: float | None
    tolerance: float | None

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__} | {"out": str(self.out)}


def export(
    folded: str | Path,
    out: str | Path,
    *,
    layout: str | None = None,
    force: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> ExportResult:
    """Write what `fold` left in `folded` again as `out`, in `layout`, by default the one that stock transformers loads.

    Layouts are native (one count of K/V heads, equal groups), padded (unequal groups), per-layer and decilm (a count per
    layer). The result is the same function; unless `verify=False` its logits are compared with those of headfold's runtime.

    Raises:
        UserError: not a fold, a layout that is none of this model's, or an output that says something else.
    """
    progress = progress or silent
    refuse_overlap(Path(folded), Path(out))
    checkpoint, source = open_folded(folded)
    chosen = choose_layout(source.config, layout, source.where)
    if chosen is None:
        raise UserError(_nothing_to_do(source))
    made = make_export(checkpoint, source, chosen)
    key = hashlib.sha256(f"{version('headfold')} {chosen} {checkpoint.fingerprint()}".encode()).hexdigest()
    staging = open_staging(Path(out), key, force)
    write_export(checkpoint, made, staging, lambda done, total: progress("write", done, total))
    _copy_papers(checkpoint, made, staging)
    difference, tolerance = _compare(checkpoint, made, staging, progress) if verify else (None, None)
    commit(staging, Path(out), force)
    return ExportResult(Path(out), chosen, made.model_class, made.description, source.counts, difference, tolerance)


def show(result: ExportResult) -> None:
    """Print what was written and whether it was compared."""
    print(f"layout {result.layout}: {result.said}")
    if result.difference is None:
        print("not verified: the comparison with headfold's runtime was skipped")
    else:
        print(
            f"verified: logits are those of headfold's runtime to {result.difference:.2g} (tolerance {result.tolerance:.2g})"
        )
    print(f"wrote {result.out}")


def write_layout(folded: Path, target: Path, layout: str, progress: Callable[[int, int], None]) -> Export:
    """For a fold on its way: what lies whole in `folded` into the existing `target`, in `layout`."""
    checkpoint, source = open_folded(folded)
    made = make_export(checkpoint, source, layout)
    write_export(checkpoint, made, target, progress)
    return made


def _nothing_to_do(source: Folded) -> str:
    if "headfold" not in source.config:
        return (
            f"{source.where}: {source.config['architectures'][0]} is a stock class already, so nothing is to export; "
            "name another layout with --layout"
        )
    return f"{source.where}: {source.model_type} has no stock layout for this fold; headfold's runtime runs it as it is"


def _copy_papers(checkpoint: Checkpoint, made: Export, staging: Path) -> None:
    """The plan, and the card with its section on use rewritten."""
    if (checkpoint.path / "plan.json").is_file():
        shutil.copyfile(checkpoint.path / "plan.json", staging / "plan.json")
    if (checkpoint.path / "README.md").is_file():
        card = (checkpoint.path / "README.md").read_text()
        (staging / "README.md").write_text(exported_card(card, made))


@torch.no_grad()
def _compare(checkpoint: Checkpoint, made: Export, staging: Path, progress: Progress) -> tuple[float, float]:
    """Largest difference of logits on random tokens, and the tolerance: absolute, as for folds.

    Raises:
        UserError: they differ; the output is left as `OUT.partial`.
    """
    sample = random_sample("sentences", checkpoint.config)
    size = sample["input_ids"].numel()
    progress("verify", 0, size)
    dtype = torch.promote_types(stored_dtype(checkpoint.path), torch.float32)
    ours = own_class(checkpoint.config)
    expected = open_model(checkpoint.path, dtype=dtype, model_class=ours)(**sample, use_cache=False).logits
    overlay = Unrounded(checkpoint, made, staging, dtype)
    exported = open_model(staging, dtype=dtype, model_class=own_class(made.config), overlay=overlay)
    found = exported(**sample, use_cache=False).logits
    progress("verify", size, size)
    difference = (found - expected).abs().max().item()
    tolerance = TOLERANCE[dtype] * expected.double().pow(2).mean().sqrt().item()
    if not difference <= tolerance:
        disown(staging)
        raise UserError(
            f"{staging}: expected the logits of {checkpoint.path} within {tolerance:.2g}, got a difference of {difference:.2g}; "
            "not renamed"
        )
    return difference, tolerance
