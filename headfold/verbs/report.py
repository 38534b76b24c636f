"""Write one page of HTML on folds, comparisons and frontiers: what was folded how, what it saves, and what it loses."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..budget.points import read_front
from ..conversion.outputs import owned_file
from ..core.errors import UserError
from ..core.progress import Progress, counter, no_progress
from ..hf_models import check_device
from ..pages.contents import Contents, Fold, Front, Original, Served, TextSample
from ..pages.continuations import NEW_TOKENS, PROMPTS, continuations
from ..pages.folders import kind_of_path, name_of, read_methods, refuse_same_names
from ..pages.folds import open_fold, open_original
from ..pages.page import require_charts, titled
from ..pages.results import read_result
from ..pages.writing import NAME, write_page
from ..parallel import main_only
from .check import check


@dataclass(frozen=True, slots=True)
class Report:
    """A page that was written, and what is on it."""

    out: Path
    num_bytes: int
    folds: list[str]
    comparisons: list[str]
    frontiers: list[str]
    results: int
    samples: int

    def to_json(self) -> dict[str, Any]:
        """Return the machine-readable form, as --json prints it."""
        return {**asdict(self), "out": str(self.out)}


@main_only
def report(
    paths: str | Path | Sequence[str | Path],
    *,
    out: str | Path = NAME,
    original: str | Path | None = None,
    prompts: Sequence[str] = (),
    new_tokens: int = NEW_TOKENS,
    force: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a self-contained page of HTML on folds, comparisons and frontiers.

    Args:
        paths: Directories that `headfold.fold`, `headfold.compare` or `headfold.frontier` wrote, and files with what the command line
            printed with --json: an evaluation, a benchmark, a check of engines. A single one may be given alone.
        out: The file to write.
        original: The checkpoint that the folds were made of, a directory or a hub id; with it the page has samples of text.
        prompts: What the samples continue; by default three beginnings of texts.
        new_tokens: Tokens that each model writes after a prompt.
        force: Replace what is at `out`.
        device: "cpu" or "cuda", for the samples.
        progress: Called with (stage, done, total).

    Raises:
        UserError: nothing to report, a path that is none of these, two directories of one name, corrupt files, an original that a fold
            was not made of, or a library that is not installed.
    """
    out, progress, place = Path(out), progress or no_progress, check_device(device)
    require_charts()
    named = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not named:
        raise UserError("report: expected a fold, or a folder of headfold compare or frontier, got nothing; name one")
    kinds = [(path, kind_of_path(path)) for path in named]
    refuse_same_names([path for path, kind in kinds if kind != "result"])
    if prompts and original is None:
        raise UserError("--prompt: expected --original DIR beside it, as both models continue a prompt; give it")
    with owned_file(out, force):
        advance = counter(progress, "read", len(kinds))
        folds, tables, fronts, results = [], [], [], []
        for path, kind in kinds:
            match kind:
                case "fold":
                    folds.append(open_fold(path, name_of(path)))
                case "comparison":
                    tables.append(read_methods(path))
                case "frontier":
                    fronts.append(Front(name_of(path), str(path), *read_front(path)))
                case _:
                    results.append(read_result(path))
            advance(1)
        if original is not None and not folds:
            raise UserError(f"--original {original}: expected a fold of it among what is reported, got none; name one")
        opened = None if original is None else open_original(str(original), folds)
        samples, reason = _samples(opened, folds, prompts or PROMPTS, new_tokens, place, progress)
        contents = Contents(
            folds, opened, tables, fronts, results, samples, reason, {fold.name: _served(fold) for fold in folds}
        )
        names = [name_of(path) for path, kind in kinds if kind != "result"] or [path.name for path in named]
        size = write_page(out, contents, titled(names))
    return Report(
        out,
        size,
        [fold.name for fold in folds],
        [table.name for table in tables],
        [front.name for front in fronts],
        len(results),
        len(samples),
    )


def _samples(
    original: Original | None,
    folds: Sequence[Fold],
    prompts: Sequence[str],
    new_tokens: int,
    device: str,
    progress: Progress,
) -> tuple[Sequence[TextSample], str]:
    """Return samples of text, or why there are none."""
    if original is None:
        return [], "No samples of text: with --original DIR the original and each fold continue the same prompts."
    writers = {fold.name: fold.path for fold in folds if fold.kind == "text"}
    if not writers:
        return [], "No samples of text: these models do not continue a text."
    found = continuations(original.path, writers, prompts, new_tokens=new_tokens, device=device, progress=progress)
    return found, ""


def _served(fold: Fold) -> Sequence[Served] | str:
    """Return how engines serve a fold, or why `headfold check` does not say."""
    try:
        return [Served(row.engine.title, row.engine.install, row.serve) for row in check(fold.path).rows]
    except UserError as error:
        return str(error)
