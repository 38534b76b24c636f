"""Export folds of models that `headfold check` does not run, and compare what the engine of each format computes with headfold's runtime.

    python benchmarks/formats.py MODEL… --work DIR

Each MODEL (a T5, Whisper, ViT, BERT …) is folded by mean pooling to half of its K/V heads and to one, and exported as ct2 and onnx, which
`headfold export` runs and compares before it puts them in place: logits, log probabilities or hidden states. Results go to
benchmarks/results/formats.json.
"""

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import describe

OUT = Path(__file__).parent / "results" / "formats.json"
ENGINES = {"ct2": "ctranslate2", "onnx": "onnxruntime"}
"""Layout → the distribution of the engine that reads it."""
COUNTS = ("1/2", "1")


def said(*words: object) -> subprocess.CompletedProcess[str]:
    """Run headfold."""
    return subprocess.run([sys.executable, "-m", "headfold", *map(str, words)], capture_output=True, text=True)


def compared(fold: Path, layout: str) -> dict[str, Any]:
    """Return how far the engine is from headfold's runtime, or what is refused."""
    done = said("export", fold, fold.with_name(f"{fold.name}-{layout}"), "--layout", layout, "--force", "--json")
    if done.returncode:
        return {"refused": done.stderr.strip().removeprefix("headfold: ").replace(str(fold), "FOLD")[:300]}
    found = json.loads(done.stdout)
    return {"difference": found["difference"], "tolerance": found["tolerance"]}


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    reader.add_argument("--work", type=Path, required=True, help="folder of the folds")
    options = reader.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in options.models:
        for count in COUNTS:
            fold = options.work / f"{model.name}-{count.replace('/', '-of-')}"
            how = ("--kv-heads", count, "--merge", "mean", "--group", "contiguous", "--no-refit", "--no-verify")
            done = said("fold", model, fold, *how, "--force")
            if done.returncode:
                raise SystemExit(done.stderr)
            for layout, package in ENGINES.items():
                row = {"model": model.name, "kv_heads": count, "layout": layout, "version": version(package)}
                rows.append(row | compared(fold, layout))
                print(rows[-1], flush=True)
    OUT.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
