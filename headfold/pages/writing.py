"""Write a page: where the user says, or beside the rows of a comparison or the points of a frontier."""

from collections.abc import Callable
from pathlib import Path

from ..checkpoint.disk import replacing
from ..core.errors import UserError
from .contents import Contents, Front
from .folders import read_methods
from .page import GENERATOR, render

NAME = "report.html"


def write_page(path: Path, contents: Contents, title: str) -> int:
    """Write a page in one step and return its size in bytes.

    Raises:
        UserError: as `page.render`, or the place cannot be written to.
    """
    text = render(contents, title).encode("utf-8", "replace")
    with replacing(path, len(text)) as temporary:
        temporary.write_bytes(text)
    return len(text)


def methods_page(directory: Path) -> str:
    """Write the page of a folder of `headfold compare` into it; return a line that says what became of it."""
    return _write_beside(directory, lambda: Contents(tables=[read_methods(directory)]))


def front_page(directory: Path, front: Callable[[], Front]) -> str:
    """Write the page of a folder of `headfold frontier` into it; return a line that says what became of it."""
    return _write_beside(directory, lambda: Contents(fronts=[front()]))


def _write_beside(directory: Path, contents: Callable[[], Contents]) -> str:
    """Write a page over an earlier one alone: a file of that name that headfold did not write stays."""
    path = directory / NAME
    try:
        if path.is_symlink() or (path.exists() and not _is_page(path)):
            raise UserError(f"{path} is a file that headfold did not write; move it away")
        write_page(path, contents(), f"headfold: {directory.name}")
    except UserError as error:
        return f"no page: {error}"
    return f"wrote {path}"


def _is_page(path: Path) -> bool:
    """Return whether a file is a page of headfold's."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(400)
