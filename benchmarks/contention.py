"""Measure a fold of the bundled model on free cores, beside a busy process, and under a CPU quota of one core.

    python benchmarks/contention.py [--tokens 16384] [--repeats 3]

Each fold is a process of its own, started as a user starts it; the conditions take turns, and stages have medians over the turns. The
quota is that of a control group (version 1 or 2), which takes the right to make one; without it the row is left out and says why.
Results go to benchmarks/results/contention.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import describe

RESULTS = Path(__file__).parent / "results"
BUNDLED = Path(__file__).parents[1] / "headfold" / "bundled"
GROUPS = Path("/sys/fs/cgroup")
PERIOD = 100_000
"""Microseconds over which a quota is counted."""


@contextmanager
def busy() -> Iterator[None]:
    """Keep one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(0.5)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def quota(cores: int) -> Iterator[Path]:
    """Make a control group that may use so many cores' worth of time, and yield the file that takes its processes."""
    first = (GROUPS / "cgroup.controllers").exists()
    group = (GROUPS if first else GROUPS / "cpu") / f"headfold-{os.getpid()}"
    group.mkdir()
    try:
        if first:
            (group / "cpu.max").write_text(f"{cores * PERIOD} {PERIOD}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD))
            (group / "cpu.cfs_quota_us").write_text(str(cores * PERIOD))
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def fold(tokens: int, joins: Path | None = None) -> dict[str, float]:
    """Fold the bundled model to a quarter of its K/V heads; return seconds by stage, and of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            sys.executable, "-m", "headfold", "fold", str(BUNDLED), f"{folder}/out", "--kv-heads", "2", "--calibration",
            str(BUNDLED / "heldout.txt"), "--tokens", str(tokens), "--json",
        ]  # fmt: skip

        def join() -> None:
            if joins is not None:
                joins.write_text(str(os.getpid()))

        started = time.monotonic()
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=join)
        whole = time.monotonic() - started
        return {stage: seconds for stage, seconds in json.loads(done.stdout)["seconds"].items() if seconds} | {
            "whole": whole
        }


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("--tokens", type=int, default=16384, help="calibration tokens")
    reader.add_argument("--repeats", type=int, default=3)
    options = reader.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"free": [], "busy": [], "quota": []}
    skipped = None
    fold(options.tokens)  # files and libraries are read once before
    for _ in range(options.repeats):
        runs["free"].append(fold(options.tokens))
        with busy():
            runs["busy"].append(fold(options.tokens))
        try:
            with quota(1) as joins:
                runs["quota"].append(fold(options.tokens, joins))
        except OSError as error:
            skipped = f"no control group can be made here ({error.strerror})"
    rows: dict[str, Any] = {}
    for condition, found in runs.items():
        if found:
            stages = [stage for stage in found[0] if all(stage in run for run in found)]
            rows[condition] = {stage: round(statistics.median(run[stage] for run in found), 2) for stage in stages}
    ratios = {
        condition: {stage: round(seconds / rows["free"][stage], 2) for stage, seconds in row.items()}
        for condition, row in rows.items()
        if condition != "free"
    }
    facts = {"machine": describe(), "tokens": options.tokens, "repeats": options.repeats, "quota_skipped": skipped}
    text = json.dumps({**facts, "seconds": rows, "ratios": ratios, "runs": runs}, indent=1) + "\n"
    (RESULTS / "contention.json").write_text(text)
    print(json.dumps({"seconds": rows, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
