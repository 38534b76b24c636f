"""Time a new token of folds in the engines that serve them, by the number of tokens before it.

    python benchmarks/engine_speed.py --work DIR --engine llama-cpp=PYTHON --engine vllm=PYTHON [--depths 0,1024,4096,8192] [--rounds 2]

The model is one of random weights, of Llama's class, in a shape whose cache matters: 32 heads of 64. It is folded to fewer K/V heads,
to groups of different sizes, and to heads of twice the head_dim. llama.cpp computes from Q8_0 weights with a cache in float16, vLLM in
bfloat16, both with as many threads as there are cores. Models take turns; a figure is the median over rounds. Keep the machine idle.
Results go to benchmarks/results/engine_speed.json after each run; a run with the same settings on the same machine adds rounds to those
that are there.
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from engines import said
from machine import describe
from real import command
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import headfold

RESULTS = Path(__file__).parent / "results"
PACKAGE = Path(headfold.__file__).parent
MEAN = ("--merge", "mean", "--no-refit", "--no-verify")
FOLDS: dict[str, tuple[str, ...]] = {
    "original": (),
    "8 of 32 heads": ("--kv-heads", "8", "--group", "contiguous", *MEAN),
    "4 of 32 heads": ("--kv-heads", "4", "--group", "contiguous", *MEAN),
    "1 of 32 heads": ("--kv-heads", "1", "--group", "contiguous", *MEAN),
    "8 of 32 heads, groups of different sizes": ("--kv-heads", "8", "--group", "swap:unequal=true", *MEAN),
    "4 heads of twice the head_dim": ("--kv-heads", "4", "--head-dim-multiple", "2", "--no-refit", "--no-verify"),
}
"""Name → options of `headfold fold`."""


def source(work: Path, layers: int) -> Path:
    """Return the original, made once."""
    out = work / f"original-{layers}"
    if not out.exists():
        config = LlamaConfig(
            hidden_size=2048, num_attention_heads=32, num_key_value_heads=32, intermediate_size=5504, num_hidden_layers=layers,
            vocab_size=2048, max_position_embeddings=16384, dtype="bfloat16",
        )  # fmt: skip
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(out)
        AutoTokenizer.from_pretrained(PACKAGE / "bundled").save_pretrained(out)
    return out


def folded(original: Path, work: Path, name: str) -> Path:
    """Return a fold, made once."""
    if not FOLDS[name]:
        return original
    out = work / name.replace(" ", "-").replace(",", "")
    if not out.exists():
        data = ("--calibration", str(PACKAGE / "bundled/heldout.txt"), "--tokens", "4096")
        data = () if "contiguous" in FOLDS[name] else data
        command("fold", original, out, *FOLDS[name], *data)
    return out


def timed(engine: str, python: str, model: Path, work: Path, request: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of a new token by depth."""
    read = model
    if engine == "llama-cpp":
        read = work / f"{model.name}.gguf"
        if not read.exists():
            command("export", model, read, "--layout", "gguf", "--quantise", "q8_0")
    answer = said(engine.replace("-", "_"), python, read, request)
    if "refused" in answer:
        raise SystemExit(f"{engine}, {model.name}: {answer['refused']}")
    return answer["seconds_at"]


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("--work", type=Path, required=True, help="folder of models, some GB")
    reader.add_argument("--engine", action="append", required=True, metavar="NAME=PYTHON", help="llama-cpp or vllm")
    reader.add_argument("--depths", default="0,1024,4096,8192", help="tokens before the new one")
    reader.add_argument("--layers", type=int, default=4)
    reader.add_argument("--new-tokens", type=int, default=24)
    reader.add_argument("--rounds", type=int, default=2)
    reader.add_argument("--folds", default="", help="folds, separated by ; (default: all)")
    options = reader.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    original, depths = source(options.work, options.layers), [int(depth) for depth in options.depths.split(",")]
    request = {"depths": depths, "new_tokens": options.new_tokens, "threads": os.cpu_count()}
    chosen = options.folds.split(";") if options.folds else list(FOLDS)
    models = {name: folded(original, options.work, name) for name in chosen}
    out, settings = RESULTS / "engine_speed.json", {"layers": options.layers, **request}
    earlier = json.loads(out.read_text()) if out.exists() else {}
    same = (earlier.get("settings"), earlier.get("machine")) == (settings, describe())
    kept = earlier["rows"] if same else []
    found: dict[tuple[str, str], list[dict[str, float]]] = {(row["engine"], row["fold"]): row["runs"] for row in kept}
    for _ in range(options.rounds):
        for named in options.engine:
            engine, _, python = named.partition("=")
            for name, model in models.items():
                seconds = timed(engine, python, model, options.work, request)
                found.setdefault((engine, name), []).append(seconds)
                rows = [
                    {
                        "engine": engine, "fold": name, "num_rounds": len(runs), "runs": runs,
                        "seconds_at": {depth: statistics.median(run[depth] for run in runs) for depth in runs[0]},
                    }
                    for (engine, name), runs in found.items()
                ]  # fmt: skip
                out.write_text(json.dumps({"machine": describe(), "settings": settings, "rows": rows}, indent=1) + "\n")
                print(engine, name, seconds, flush=True)


if __name__ == "__main__":
    main()
