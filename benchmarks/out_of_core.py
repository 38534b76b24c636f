"""Fold layers of a 70B shape, more than memory holds: seconds per layer, peak anonymous memory, and a kill in the middle.

    python benchmarks/out_of_core.py --work DIR [--shape 70b] [--layers 1,2] [--tokens 2048] [--jobs calibrate,mean,absorb]

Writes checkpoints of random weights in bfloat16 with so many layers (2 GB each at 70B, and as much for the folds), measures statistics of
them, and folds each to 8 K/V heads by mean pooling and by `absorb`, without verification. The larger one is folded again by mean pooling,
killed when half of its bytes are written, and folded once more: the two results are compared. Pages of files that the system caches are no
memory of the process, so anonymous memory is what is counted. Results go to benchmarks/results/out_of_core.json.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layers import BUNDLED, SHAPES, write_model
from machine import describe

RESULTS = Path(__file__).parent / "results"
MEAN = ("--merge", "mean", "--group", "contiguous", "--no-refit", "--no-verify")
PAUSE = 0.02
"""Seconds between two looks at a running process."""


def watched(words: tuple[Any, ...], stop: Callable[[], bool] = lambda: False) -> tuple[dict[str, Any], float, int]:
    """Run `headfold` with these words; return its JSON, its seconds and its peak of anonymous memory in bytes.

    Where `stop` says so, the process is killed, and there is no JSON.
    """
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "headfold", *map(str, words), "--json"], stdout=subprocess.PIPE, text=True
    )
    killed = False
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        peak = max(peak, 1024 * int(found[1]) if found else 0)
        if stop():
            process.kill()
            killed = True
        time.sleep(PAUSE)
    assert process.stdout is not None
    text = process.stdout.read()
    if process.returncode and not killed:
        raise SystemExit(f"headfold {' '.join(map(str, words))}: exit code {process.returncode}")
    return {} if killed else json.loads(text), time.monotonic() - started, peak


def written(folder: Path) -> int:
    """Return the bytes on the disk below a folder."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of weights."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def killed_and_resumed(words: tuple[Any, ...], made: Path) -> dict[str, Any]:
    """Fold again what lies in `made`, kill the run when half of its bytes are written, run it once more, and compare."""
    whole, size = digests(made), written(made)
    shutil.rmtree(made)
    _, until, _ = watched(words, lambda: written(made.with_name(f"{made.name}.partial")) > size / 2)
    _, seconds, _ = watched(words)
    return {
        "killed_after_seconds": round(until, 1), "seconds_of_the_rest": round(seconds, 1), "same_bytes": digests(made) == whole,
    }  # fmt: skip


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("--work", type=Path, required=True, help="folder with room for twice the layers")
    reader.add_argument("--shape", default="70b", choices=SHAPES)
    reader.add_argument("--layers", default="1,2", help="two numbers of layers")
    reader.add_argument("--tokens", type=int, default=2048, help="calibration tokens")
    reader.add_argument("--jobs", default="calibrate,mean,absorb", help="jobs to run; the result of others is kept")
    options = reader.parse_args()
    few, more = map(int, options.layers.split(","))
    out, chosen = RESULTS / "out_of_core.json", options.jobs.split(",")
    earlier = json.loads(out.read_text()) if out.exists() else {"runs": {}, "kill": {}}
    runs: dict[str, dict[str, Any]] = {
        name: {} if name in chosen else earlier["runs"][name] for name in ("calibrate", "mean", "absorb")
    }
    kill: dict[str, Any] = earlier["kill"]
    for layers in (few, more):
        source, stats, made = (
            options.work / f"{layers}-layers",
            options.work / "stats.safetensors",
            options.work / "folded",
        )
        for leftover in (source, made, options.work / "folded.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        write_model(source, options.shape, layers, 4096)
        data = ("--calibration", BUNDLED / "heldout.txt", "--tokens", options.tokens, "--context", 1024)
        absorb = ("--no-refit", "--no-verify", "--stats", stats)
        jobs: dict[str, tuple[Any, ...]] = {
            "calibrate": ("calibrate", source, stats, *data, "--force"),
            "mean": ("fold", source, made, "--kv-heads", 8, *MEAN),
            "absorb": ("fold", source, made, "--kv-heads", 8, *absorb),
        }
        for name, words in jobs.items():
            if name not in chosen:
                continue
            found, seconds, peak = watched(words)
            runs[name][str(layers)] = {
                "seconds": round(seconds, 1),
                "stages": found.get("seconds"),
                "peak_anonymous_bytes": peak,
            }
            print(layers, name, runs[name][str(layers)], flush=True)
            if name == "mean" and layers == more:
                kill = killed_and_resumed(jobs["mean"], made)
            shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(source)
        stats.unlink(missing_ok=True)
    hidden, heads, inner, whole_layers = SHAPES[options.shape]
    row = {
        "shape": options.shape, "hidden": hidden, "heads": heads, "inner": inner, "layers": whole_layers, "tokens": options.tokens,
        "attention_bytes": 8 * hidden * hidden, "block_bytes": 8 * hidden * hidden + 6 * hidden * inner,
        "seconds_per_layer": {
            name: round((found[str(more)]["seconds"] - found[str(few)]["seconds"]) / (more - few), 1) for name, found in runs.items()
        },
        "kill": kill, "runs": runs,
    }  # fmt: skip
    out.write_text(json.dumps({"machine": describe(), **row}, indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
