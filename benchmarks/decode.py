"""Time new tokens of `generate`: headfold's attention and caches against stock ones, in turns within each run.

    python benchmarks/decode.py [--parts main padded sweep alone kernel shapes figure6] [--dtypes bfloat16 float32]

main     the shape `attention` (2 layers of 32 query heads of 128, little else) at 8 and 32 K/V heads, prompt 2048, batch 4
padded   the same, half of the batch padded on the left
sweep    1,024 to 16,384 tokens of context, batch 1 and 4, 1 / 4 / 8 / 32 K/V heads
alone    the attention alone, as a share of the read bandwidth measured beside it
kernel   main with and without the C++ kernel among the candidates
shapes   Llama-2-7B and T5-XXL cut to a few layers, MHA, 8 and 1 K/V heads, and where the time goes
figure6  T5-XXL of one layer against the number of K/V heads, as in figure 6 of 2305.13245

Results go to benchmarks/results/decode.json, one entry per part and dtype, with the processor's flags. CPU or GPU, whatever there is.
"""

import argparse
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from machine import describe

import headfold
from headfold.hf_models import default_device
from headfold.reports.timings import plot_bench, show_bench
from headfold.runtime import decoding
from headfold.runtime.cache import generate_in_place
from headfold.timing.generation import Setting, generate
from headfold.timing.machine import read_bandwidth
from headfold.timing.shapes import random_model, shape_config

RESULTS = Path(__file__).parent / "results"
ROUNDS = 5


def main_row(dtype: str) -> dict[str, Any]:
    """Time the shape `attention`."""
    return shown(
        headfold.bench(shape="attention", kv_heads=(8, 32), contexts=(2048,), batches=(4,), dtype=dtype, rounds=3)
    )


def padded(dtype: str) -> dict[str, Any]:
    """Time it with half of the batch padded."""
    options = dict(kv_heads=(8, 32), contexts=(2048,), batches=(4,), dtype=dtype, padded=True, skip_prefill=True)
    return shown(headfold.bench(shape="attention", **options, rounds=ROUNDS))


def sweep(dtype: str) -> dict[str, Any]:
    """Time it over contexts, batches and counts of K/V heads."""
    options = dict(contexts=(1024, 4096, 16384), batches=(1, 4), dtype=dtype, skip_prefill=True)
    return shown(headfold.bench(shape="attention", kv_heads=(1, 4, 8, 32), **options, new_tokens=12, rounds=3))


def alone(dtype: str) -> dict[str, Any]:
    """Time the chosen candidate on (4, kv, 32 / kv, 128) over (4, kv, keys, 128)."""
    kind, device, rows, before = getattr(torch, dtype), default_device(), [], len(decoding.TIMINGS)
    for kv, keys in [(8, 2048), (8, 4096), (8, 16384), (1, 4096), (4, 4096), (32, 4096)]:
        query = torch.randn(4, kv, 32 // kv, 128, device=device).to(kind)
        key, value = (torch.randn(4, kv, keys, 128, device=device).to(kind) for _ in range(2))
        chosen = decoding.choose(query, key, value, None)
        run = functools.partial(chosen, None, query, key, value, None)
        taken = statistics.median(timed(run) for _ in range(5 * ROUNDS))
        read = max(read_bandwidth(device) for _ in range(3))
        rate = 2 * key.nbytes / taken
        rows.append(
            {
                "num_kv_heads": kv, "keys": keys, "candidate": chosen.__name__, "seconds": taken, "bytes_per_second": rate,
                "read_bandwidth": read, "share": rate / read,
            }
        )  # fmt: skip
        print(
            f"{dtype} {kv:2d} K/V heads, {keys:6,} keys: {chosen.__name__} {taken * 1e3:.2f} ms, {rate / read:.1%} of {read / 1e9:.1f} GB/s"
        )
    return {"rows": rows, "paths": [str(trial) for trial in decoding.TIMINGS[before:]]}


def timed(run: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


@contextmanager
def candidates(*, kernel: bool) -> Iterator[None]:
    """Decode with or without the kernel among the candidates; what was measured for one choice does not count for the other."""
    before = decoding.CANDIDATES, decoding.fastest
    known = {name: run for name, run in decoding.CANDIDATES.items() if kernel or name != "kernel"}
    decoding.CANDIDATES, decoding.fastest = known, MEASURED[kernel]
    try:
        yield
    finally:
        decoding.CANDIDATES, decoding.fastest = before


MEASURED = {choice: functools.cache(decoding.fastest.__wrapped__) for choice in (True, False)}


def kernel(dtype: str) -> dict[str, Any]:
    """Time it with and without the kernel, in turns."""
    rows = []
    for kv in (8, 32):
        model = random_model(shape_config("attention"), kv, dtype=getattr(torch, dtype), where="attention")
        model.set_attn_implementation("headfold")
        generate_in_place(model)
        setting = Setting(2048, 4, 32, skip_prefill=True)
        tokens: dict[bool, list[float]] = {True: [], False: []}
        for number in range(ROUNDS + 1):
            for choice, found in tokens.items():
                with candidates(kernel=choice):
                    timing = generate(model, setting, grows=True)
                found += timing.tokens if number else ()
        medians = {choice: statistics.median(found) for choice, found in tokens.items()}
        ratio = medians[False] / medians[True]
        rows.append({"num_kv_heads": kv, "with_kernel": medians[True], "without": medians[False], "ratio": ratio})
        print(
            f"{dtype} {kv:2d} K/V heads: {medians[True] * 1e3:.2f} ms with the kernel, {ratio:.2f} × without",
            flush=True,
        )
    return {"rows": rows}


def shapes(dtype: str) -> dict[str, Any]:
    """Time the shapes of published models, and where the time goes."""
    found = {}
    for shape, layers, counts in (("llama-2-7b", 4, (32, 8, 1)), ("t5-xxl", 2, (64, 8, 1))):
        for batch in (1, 16 if dtype == "bfloat16" else 4):
            made = headfold.bench(
                shape=shape, kv_heads=counts, layers=layers, contexts=(2048,), batches=(batch,), dtype=dtype, skip_prefill=True,
                new_tokens=12, rounds=3, profile=RESULTS.parent / "traces",
            )  # fmt: skip
            found[f"{shape}, batch {batch}"] = shown(made)
            gc.collect()
    return found


def figure6(dtype: str) -> dict[str, Any]:
    """Time T5-XXL against the number of K/V heads, and plot it."""
    made = headfold.bench(
        shape="t5-xxl", kv_heads=(1, 4, 8, 16, 64), layers=1, contexts=(2048,), batches=(4,), dtype=dtype, skip_prefill=True,
        new_tokens=16, rounds=2,
    )  # fmt: skip
    plot_bench(RESULTS / f"figure6-{dtype}.png", made)
    return shown(made)


def shown(made: Any) -> dict[str, Any]:
    """Print a result and return its machine-readable form."""
    show_bench(made)
    print(flush=True)
    return made.to_json()


PARTS = {
    "main": main_row, "padded": padded, "sweep": sweep, "alone": alone, "kernel": kernel, "shapes": shapes, "figure6": figure6,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.json")
    options = parser.parse_args()
    for part in options.parts:
        for dtype in options.dtypes:
            result = PARTS[part](dtype)
            known = json.loads(options.out.read_text()) if options.out.exists() else {}
            known |= {"machine": describe(), f"{part} {dtype}": result}
            options.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
