"""Add a merge without changing the package, and compare it with mean pooling on the bundled model.

A merge is a file with one function (examples/merges/largest.py). Methods are found by folder, so one more folder on the path of
`headfold.merge` is enough.

python examples/custom_merge.py
"""

import tempfile
from pathlib import Path

import headfold
import headfold.merge

BUNDLED = Path(headfold.__file__).parent / "bundled"


def main() -> None:
    headfold.merge.__path__.append(str(Path(__file__).parent / "merges"))
    for merge in ("largest", "mean"):
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "folded"
            headfold.fold(BUNDLED, out, kv_heads="1/2", merge=merge, group="contiguous", refit=False)
            found = headfold.eval(out, reference=BUNDLED, limit=8192)
        print(f"{merge:8s} perplexity {found.perplexity:.1f} (original {found.reference_perplexity:.1f})")


if __name__ == "__main__":
    main()
