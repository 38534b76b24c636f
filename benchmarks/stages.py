"""Time the stages of a fold of a language model beside its forward pass, and compare them with the peak of the machine.

    python benchmarks/stages.py MODEL --text FILE --work DIR [--kv-heads 1] [--tokens 32768] [--context 1024] [--out FILE]

Three parts: matrix products of the machine, in float32 and in the dtype of the weights; the forward pass of the stock model over as
many tokens of the text, without the head, between two folds; and the folds, timed by the command line. Calibration and a fold from its
statistics are run once more in this process, under PyTorch's counter of operations, and not timed; the forward pass that such a refit
needs is not counted, as a whole fold has but one. A stage's share of the peak takes all its operations to be in that dtype. Results go
to benchmarks/results/stages.json.
"""

import argparse
import json
import shutil
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from machine import describe
from real import command
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoTokenizer

import headfold

RESULTS = Path(__file__).parent / "results"
STAGES = ("calibrate", "plan", "refit", "write", "verify")


def product_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Return the operations per second of a matrix product, the best of several."""
    a = torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


@torch.no_grad()
def forward_seconds(model: Path, text: Path, tokens: int, context: int) -> tuple[float, int]:
    """Return the seconds and the operations of the stock model's blocks, in the dtype of its weights."""
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    windows = ids[0, : min(tokens, ids.shape[1]) // context * context].view(-1, context)
    stock = AutoModel.from_pretrained(model, dtype="auto").eval()
    batches = windows.split(max(1, 4096 // context))
    stock(input_ids=batches[0], use_cache=False)
    started = time.perf_counter()
    for batch in batches:
        stock(input_ids=batch, use_cache=False)
    seconds = time.perf_counter() - started
    with FlopCounterMode(display=False) as counter:
        stock(input_ids=batches[0], use_cache=False)
    return seconds, counter.get_total_flops() * len(windows) // len(batches[0])


def counted(model: Path, work: Path, kv_heads: str, forward: int, **data: object) -> Counter[str]:
    """Return the operations of each stage of a fold; `forward` are those of a forward pass."""
    found: Counter[str] = Counter()
    seen = [0]
    with FlopCounterMode(display=False) as counter:

        def progress(stage: str, done: int, total: int) -> None:
            now = counter.get_total_flops()
            found[stage] += now - seen[0]
            seen[0] = now

        stats = work / "stats.safetensors"
        headfold.calibrate(model, stats, progress=progress, **data)
        headfold.fold(model, work / "counted", kv_heads=kv_heads, stats=stats, progress=progress)
    shutil.rmtree(work / "counted")
    found["refit"] -= forward
    return found


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("model", type=Path, help="a checkpoint directory of a language model")
    reader.add_argument("--text", type=Path, required=True, help="a text file to calibrate on")
    reader.add_argument("--work", type=Path, required=True, help="folder for folds")
    reader.add_argument("--kv-heads", default="1", help="K/V heads to keep")
    reader.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    reader.add_argument("--context", type=int, default=1024, help="length of windows")
    reader.add_argument("--folds", type=int, default=3, help="number of timed folds")
    reader.add_argument("--out", type=Path, default=RESULTS / "stages.json", help="where the result goes")
    options = reader.parse_args()
    fold = options.work / "fold"
    words = (
        "fold", options.model, fold, "--kv-heads", options.kv_heads, "--calibration", options.text, "--tokens", str(options.tokens),
        "--context", str(options.context), "--force",
    )  # fmt: skip
    dtype = AutoModel.from_pretrained(options.model, dtype="auto").dtype
    peaks = {str(one).removeprefix("torch."): product_rate(one) for one in (torch.float32, dtype)}
    forwards, folds = [], []
    for number in range(options.folds):
        print(f"forward and fold, {number + 1} of {options.folds}", flush=True)
        seconds, operations = forward_seconds(options.model, options.text, options.tokens, options.context)
        forwards.append(seconds)
        made, whole, memory = command(*words)
        folds.append({**made["seconds"], "whole": whole, "peak_bytes": memory})
    print("operations", flush=True)
    shutil.rmtree(fold)
    data = {"calibration": str(options.text), "tokens": options.tokens, "context": options.context}
    counts = counted(options.model, options.work, options.kv_heads, operations, **data)
    forward, peak = statistics.median(forwards), peaks[str(dtype).removeprefix("torch.")]
    rows = {"forward": {"seconds": forward, "operations": operations, "share_of_peak": operations / forward / peak}}
    for stage in STAGES:
        seconds = statistics.median(one.get(stage, 0.0) for one in folds)
        rows[stage] = {"seconds": seconds, "operations": counts[stage], "times_forward": seconds / forward}
        rows[stage] |= {"share_of_peak": counts[stage] / seconds / peak if seconds else None}
    result = {
        "machine": describe(), "model": options.model.name, "tokens": options.tokens, "context": options.context,
        "products_per_second": peaks, "rows": rows, "forward_seconds": forwards, "folds": folds,
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in rows.items():
        print(name, {key: None if value is None else round(value, 3) for key, value in row.items()})


if __name__ == "__main__":
    main()
