"""The report of `headfold report`: the page that was written."""

from typing import Any

from .tables import size


def show_page_written(found: Any) -> None:
    """Print what is on the page, and where it lies."""
    parts = {
        "folds": found.folds,
        "comparisons": found.comparisons,
        "frontiers": found.frontiers,
    }
    for kind, names in parts.items():
        if names:
            print(f"{kind}: {', '.join(names)}")
    if found.results:
        print(f"results: {found.results}")
    if not found.samples and found.folds:
        print("note: no samples of text; the page says how to have them")
    print(f"wrote {found.out} ({size(found.num_bytes)})")
