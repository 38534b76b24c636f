"""Give each layer of the bundled model its own number of K/V heads, within half of its KV cache.

python examples/budget.py [--kv-budget 50%] [--tokens 2048]
"""

import argparse
import tempfile
from pathlib import Path

import headfold

BUNDLED = Path(headfold.__file__).parent / "bundled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.replace("%", "%%"))
    parser.add_argument("--kv-budget", default="50%", help="share of the KV cache to keep")
    parser.add_argument("--tokens", type=int, default=2048, help="calibration tokens; more is better")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        stats = Path(place) / "stats.safetensors"
        headfold.calibrate(BUNDLED, stats, calibration="stdlib", tokens=options.tokens)
        plan = headfold.plan(BUNDLED, Path(place) / "plan.json", kv_budget=options.kv_budget, stats=stats, refit=False)
    for site, count in plan.num_kv_heads.items():
        print(f"{site:16s} {count} K/V heads  {'█' * count}")


if __name__ == "__main__":
    main()
