"""Time the complete plan of a 7B shape from its statistics: 32 heads of 128 and a hidden size of 4096, on all cores.

    python benchmarks/plan_time.py DIRECTORY [--layers 32] [--kv-heads 8]

DIRECTORY needs room for 0.7 GB per layer for a while: random weights in bf16 and statistics of random inputs with a falling spectrum.
Layers are planned one by one and alike, so `seconds_of_32_layers` is what `--layers` of them took times 32 over their number. Results go to
benchmarks/results/plan_time.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from conversion_time import SEVEN_BILLION, make_checkpoint
from machine import describe

from headfold.conversion.source import open_source
from headfold.core.stats import SiteStats
from headfold.stats_file import write_stats

RESULT = Path(__file__).parent / "results" / "plan_time.json"
HEADFOLD = Path(sys.executable).with_name("headfold")
TOKENS = 8192


def make_stats(model: Path, path: Path) -> None:
    """Write second moments of random inputs whose spectrum falls, as that of real ones does; the seed of a layer is its number."""
    source = open_source(model)
    dim = SEVEN_BILLION.hidden_size
    made = {}
    for layer, site in enumerate(source.sites):
        generator = torch.Generator().manual_seed(layer)
        scale = torch.arange(1, dim + 1, dtype=torch.float32).rsqrt()
        x = torch.randn(TOKENS, dim, generator=generator) * scale
        x = torch.cat([x, torch.ones(TOKENS, 1)], 1)
        second = (x.T @ x).double()
        made[site.name] = SiteStats({"second": second, "scatter": second[:-1, :-1].clone()}, TOKENS)
    write_stats(path, made, {"model": source.checkpoint.fingerprint(), "source": "random inputs"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[8])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=options.directory) as work:
        model, stats = Path(work) / "model", Path(work) / "stats.safetensors"
        make_checkpoint(model, replace(SEVEN_BILLION, num_layers=options.layers, vocab_size=512))
        make_stats(model, stats)
        for count in options.kv_heads:
            for workers in (1, 2):
                words = ["plan", model, Path(work) / f"{count}-{workers}.json", "--kv-heads", count, "--stats", stats]
                started = time.monotonic()
                subprocess.run(
                    [HEADFOLD, *map(str, words), "--workers", str(workers)], check=True, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"},
                )  # fmt: skip
                seconds = time.monotonic() - started
                rows.append({
                    "num_kv_heads": count, "workers": workers, "num_layers": options.layers, "seconds": round(seconds, 1),
                    "seconds_of_32_layers": round(seconds * 32 / options.layers, 1),
                })  # fmt: skip
                print(rows[-1], flush=True)
                facts = {"machine": describe(), "seeds": list(range(options.layers))}
                RESULT.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
