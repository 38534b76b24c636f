"""Write one page of HTML on folds, comparisons and frontiers: what was folded how, what it saves, and what it loses."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..budget.points import read_front
from ..core.errors import UserError
from ..core.progress import Progress, counter, no_progress
from ..hf_models import check_device
from ..outputs import owned_file
from ..pages.contents import Contents, Fold, Front, Served
from ..pages.folders import name_of, read_methods, refuse_same_names, with_kinds
from ..pages.folds import open_fold, open_original
from ..pages.page import require_charts, titled
from ..pages.results import read_result
from ..pages.samples import SamplesRequest, samples
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
    text: str | None = None,
    columns: Sequence[str] = (),
    new_tokens: int | None = None,
    force: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a self-contained page of HTML on folds, comparisons and frontiers.

    Args:
        paths: Directories that `headfold.fold`, `headfold.run`, `headfold.compare` or `headfold.frontier` wrote, and files with what the
            command line printed with --json: an evaluation, a benchmark, a check of engines. A single one may be given alone.
        out: The file to write.
        original: The checkpoint that the folds were made of, a directory or a hub id; with it the page has samples of text.
        prompts: What language models continue, by default three beginnings of texts; or what encoder-decoders read.
        text: Data whose first items encoder-decoders and models of speech write for: pairs of text, or recordings.
        columns: Columns of a table in `text`, or the languages of `text` or `prompts` as the tokenizer names them.
        new_tokens: Tokens that each model writes; by default 64 after a prompt, else as `headfold.eval`.
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
    kinds = with_kinds(named)
    refuse_same_names([path for path, kind in kinds if kind != "result"])
    request = SamplesRequest(prompts, text, columns, new_tokens)
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
        request.check(original is not None, folds)
        opened = None if original is None else open_original(str(original), folds)
        written, reason = samples(opened, folds, request, place, progress)
        contents = Contents(
            folds, opened, tables, fronts, results, written, reason, {fold.name: _served(fold) for fold in folds}
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
        len(written),
    )


def _served(fold: Fold) -> Sequence[Served] | str:
    """Return how engines serve a fold, or why `headfold check` does not say."""
    try:
        return [Served(row.engine.title, row.engine.install, row.serve) for row in check(fold.path).rows]
    except UserError as error:
        return str(error)
