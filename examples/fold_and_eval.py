"""Fold the bundled model to half of its K/V heads, and measure its perplexity before and after.

python examples/fold_and_eval.py [--kv-heads 1/2] [--tokens 4096]
"""

import argparse
import tempfile
from pathlib import Path

import headfold

BUNDLED = Path(headfold.__file__).parent / "bundled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-heads", default="1/2", help="a count, or a share of the existing heads")
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens; more is better")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "folded"
        headfold.fold(BUNDLED, out, kv_heads=options.kv_heads, calibration="stdlib", tokens=options.tokens)
        found = headfold.eval(out, reference=BUNDLED, limit=8192)
    print(f"perplexity of the original {found.reference_perplexity:.2f}, of the fold {found.perplexity:.2f}")
    print(f"KL divergence from the original {found.kl:.4f} nats per token")


if __name__ == "__main__":
    main()
