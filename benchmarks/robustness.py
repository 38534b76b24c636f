"""Run the hostile campaign of tests/hostile for a table: corrupted inputs, kills, races, full disks and interrupts, counted by class.

    python benchmarks/robustness.py [--cases 11000] [--minutes 120] [--seed 0]

Of a hundred cases 92 are inputs, 5 kills, and a race, a full disk and an interrupt one each. Results go to
benchmarks/results/robustness.json, findings among them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from machine import describe

RESULTS = Path(__file__).parent / "results"
TESTS = Path(__file__).parents[1] / "tests"


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("--cases", type=int, default=11000)
    reader.add_argument("--minutes", type=float, default=120)
    reader.add_argument("--seed", type=int, default=0)
    options = reader.parse_args()
    out = RESULTS / "robustness.json"
    words = [f"--{name}={getattr(options, name)}" for name in ("cases", "minutes", "seed")]
    subprocess.run([sys.executable, "-m", "hostile", *words, f"--out={out}"], cwd=TESTS, check=False)
    report = json.loads(out.read_text())
    out.write_text(json.dumps({"machine": describe(), "seeds": [options.seed], **report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
