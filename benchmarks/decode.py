"""Attention and cache by themselves: time of a new token through `generate`, headfold's against stock's, interleaved in one run.

    python benchmarks/decode.py [--dtype bfloat16] [--prompt 2048] [--batch 4] [--kv-heads 8 32] [--padded] [--rounds 5]

Two layers of 32 query heads of 128 behind a model of width 512 and an MLP of 64, so that little else than attention costs time. The time
of a new token is that of `--new` tokens less that of one, so prefill does not count; medians over rounds. Results are added to
benchmarks/results/decode.json.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe
from transformers import LlamaConfig, LlamaForCausalLM

from headfold.runtime.cache import generate_in_place
from headfold.runtime.decoding import fastest

OUT = Path(__file__).parent / "results" / "decode.json"
HEADS, DIM, LAYERS = 32, 128, 2


def model(kv_heads: int, dtype: torch.dtype, attention: str) -> Any:
    """Random weights; `headfold` with its own cache, everything else as stock."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=512, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=kv_heads, head_dim=DIM, max_position_embeddings=1 << 17,
    )  # fmt: skip
    made = LlamaForCausalLM(config).to(dtype).eval()
    made.set_attn_implementation(attention)
    return generate_in_place(made) if attention == "headfold" else made


def per_token(made: Any, inputs: dict[str, torch.Tensor], new: int) -> float:
    """Seconds of one new token of the whole batch."""
    taken = []
    for count in (1, new + 1):
        started = time.perf_counter()
        made.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        taken.append(time.perf_counter() - started)
    return (taken[1] - taken[0]) / new


def read_bandwidth() -> float:
    """Bytes per second that all cores read: the best of a few sums over 1 GiB."""
    data = torch.ones(1 << 28)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - started)
    return data.nbytes / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--padded", action="store_true", help="pad half of the batch on the left")
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    ids = torch.randint(1, 256, (options.batch, options.prompt), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if options.padded:
        mask[::2, : options.prompt // 8] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    cases = {(kv, name): model(kv, dtype, name) for kv in options.kv_heads for name in ("headfold", "sdpa")}
    times: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    for number in range(options.rounds + 1):
        for case, made in cases.items():
            seconds = per_token(made, inputs, options.new)
            if number:  # the first round warms up, and is where headfold measures its candidates
                times[case].append(seconds)
    medians = {case: statistics.median(found) for case, found in times.items()}
    rows = []
    for (kv, name), seconds in medians.items():
        length = options.prompt + options.new / 2
        num_bytes = 2 * LAYERS * options.batch * kv * DIM * length * dtype.itemsize
        rows.append(
            {
                "kv_heads": kv, "attention": name, "ms_per_token": round(seconds * 1e3, 3),
                "cache_gb_per_s": round(num_bytes / seconds / 1e9, 2),
            }
        )  # fmt: skip
        print(
            f"{kv:3d} K/V heads  {name:9s} {seconds * 1e3:8.2f} ms  {num_bytes / seconds / 1e9:6.2f} GB/s of cache",
            flush=True,
        )
    bandwidth = read_bandwidth()
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s; choices measured: {fastest.cache_info().currsize}")
    setting = {name: getattr(options, name) for name in ("dtype", "prompt", "batch", "padded", "new", "rounds")}
    done = json.loads(OUT.read_text())["runs"] if OUT.exists() else []
    done = [run for run in done if {name: run[name] for name in setting} != setting]
    runs = [*done, {**setting, "read_gb_per_s": round(bandwidth / 1e9, 1), "rows": rows}]
    OUT.write_text(json.dumps({"machine": describe(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
