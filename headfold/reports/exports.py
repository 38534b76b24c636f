"""The report of an export: the layout that was written, and whether it was compared."""

from typing import Any


def show_export(result: Any) -> None:
    """Print what was written and what the comparison with headfold's runtime found."""
    print(f"layout {result.layout}: {result.description}")
    if result.difference is None and result.out.is_file():
        print("not compared with headfold's runtime: run the file in its engine")
    elif result.difference is None:
        print("not compared with headfold's runtime: --no-verify, or --quantise, which rounds the weights")
    else:
        found = f"differs from headfold's runtime by {result.difference:.2g} (tolerance {result.tolerance:.2g})"
        print(f"verified: the largest logit {found}")
    print(f"wrote {result.out}")
