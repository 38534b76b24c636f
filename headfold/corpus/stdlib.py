"""The Python standard library of this machine: text that every Python user already has."""

import random
import sysconfig
from collections.abc import Iterator
from importlib import resources
from pathlib import Path


def heldout_files() -> frozenset[str]:
    """Return the paths, relative to the standard library, that no default calibration may read: the bundled model is evaluated on
    them."""
    return frozenset(resources.files("headfold").joinpath("bundled", "heldout-files.txt").read_text().split())


def stdlib_files() -> list[Path]:
    """Return every `.py` file of the standard library and its tests, sorted, without held-out files and third-party packages."""
    root, held_out = Path(sysconfig.get_paths()["stdlib"]), heldout_files()
    # Third-party packages may be many times as large as the library: not even walked.
    folders = [entry for entry in root.iterdir() if entry.is_dir() and entry.name != "site-packages"]
    paths = [*root.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    return sorted(path for path in paths if path.relative_to(root).as_posix() not in held_out)


def documents(seed: int | None = None) -> Iterator[str]:
    """Yield the text of each file, in path order or in an order drawn from `seed`; files that are not UTF-8 (a few tests of the
    decoder) are skipped."""
    paths = stdlib_files()
    if seed is not None:
        random.Random(seed).shuffle(paths)
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
