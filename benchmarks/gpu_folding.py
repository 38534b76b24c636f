"""The sections of `gpu.py` that fold and train on the device."""

import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conversion_time import SEVEN_BILLION, Size
from gpu_setup import ROOT, SEED, Record, Setup, llama_checkpoint, wait, write_lines
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

import headfold

TINY = Size(2, 32, 48, 61, 10**9, num_heads=4)
TRAINED = Size(4, 2048, 5504, 32000, 10**10, num_heads=16)
WARM_UP = 3
HEALED = ("block", "model")
LAUNCH_SECONDS = 60.0
"""Time of a launched command, at most."""


def memory(setup: Setup) -> dict[str, int]:
    """Return the largest memory that this process has used so far: of the GPU since the last reset, and of the host."""
    gpu = torch.cuda.max_memory_allocated() if setup.on_gpu else 0
    return {"peak_gpu_bytes": gpu, "peak_host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def fold(setup: Setup, record: Record) -> None:
    """Fold random layers of the shape of Llama-2-7B with refit and healing, by block and by model; longer runs where they fit the time."""
    needed = 0.0
    for way, layers in (
        ((way, 2) for way in HEALED) if setup.dry_run else (("block", 2), *(("model", n) for n in (2, 4, 8)))
    ):
        before = record.left()
        record.row("rows", f"{layers} layers, healed by {way}", lambda: fold_row(setup, layers, way), needed)  # noqa: B023
        needed = 2.2 * (before - record.left())


def fold_row(setup: Setup, layers: int, way: str) -> dict[str, Any]:
    """Return the seconds of each stage, and of each per layer, and the peak memory."""
    size = TINY if setup.dry_run else replace(SEVEN_BILLION, num_layers=layers)
    tokens, heal_tokens, context = (256, 128, 16) if setup.dry_run else (32768, 8192, 1024)
    source = llama_checkpoint(setup.place / f"llama-{layers}-{way}", size)
    text = write_lines(setup.place / f"text-{layers}-{way}.txt", size.vocab_size, 200, tokens // 100)
    if setup.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = headfold.fold(
        source, setup.place / f"fold-{layers}-{way}", kv_heads="1/4", heal=True, heal_by=way, heal_tokens=heal_tokens,
        calibration=str(text), tokens=tokens, context=context, device=setup.device, seed=SEED,
    )  # fmt: skip
    assert result.verification is not None
    return {
        "layers": layers, "healed_by": way, "calibration_tokens": tokens, "heal_tokens": heal_tokens, "context": context,
        "num_kv_heads": [result.num_kv_heads_before, result.num_kv_heads_after], "seconds_in_all": time.perf_counter() - began,
        "seconds": result.seconds, "seconds_per_layer": {stage: taken / layers for stage, taken in result.seconds.items()},
        "verified": result.verification.passed, "notes": result.notes, **memory(setup),
    }  # fmt: skip


class StepClock(TrainerCallback):
    """Records the seconds of every step."""

    def __init__(self, device: str) -> None:
        self.seconds: list[float] = []
        self._device, self._began = device, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        wait(self._device)
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock."""
        wait(self._device)
        self.seconds.append(time.perf_counter() - self._began)


def training(setup: Setup, record: Record) -> None:
    """Time steps of uptraining, by the own loss and distilled, and repeat a calibration and a training under a launcher."""
    size = TINY if setup.dry_run else TRAINED
    context, batch, steps = (16, 4, 3) if setup.dry_run else (1024, 8, 15)
    source = llama_checkpoint(setup.place / "source", size)
    text = write_lines(setup.place / "text.txt", size.vocab_size, 100, 20 * context // 10)
    folded = setup.place / "folded"
    headfold.fold(source, folded, kv_heads="1/4", merge="mean", group="contiguous", refit=False, verify=False)
    record.put(model={"num_layers": size.num_layers, "hidden_size": size.hidden_size}, batch=batch, context=context)

    def run(distill: Path | None, dtype: str, name: str) -> dict[str, Any]:
        clock = StepClock(setup.device)
        if setup.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        result = headfold.uptrain(
            folded, setup.place / name, distill=distill, steps=steps, data=str(text), context=context, batch=batch,
            device=setup.device, dtype=dtype, callbacks=[clock], train="attention",
        )  # fmt: skip
        per_step = statistics.median(clock.seconds[min(WARM_UP, steps - 1) :])
        return {
            "dtype": dtype, "steps": steps, "seconds_per_step": per_step, "tokens_per_second": batch * context / per_step,
            "difference_after_writing": result.difference, **memory(setup),
        }  # fmt: skip

    ways = {
        "own loss, bfloat16": (None, "bfloat16"),
        "distilled, bfloat16": (source, "bfloat16"),
        "own loss, float32": (None, "float32"),
    }
    for number, (name, (distill, dtype)) in enumerate(ways.items()):
        if number == 0 or not setup.dry_run:
            record.row("rows", name, lambda: run(distill, dtype, f"trained-{number}"), 5 * number)  # noqa: B023
    tiny = llama_checkpoint(setup.place / "tiny", TINY)
    lines = write_lines(setup.place / "tiny.txt", TINY.vocab_size, 20, 100)
    if setup.dry_run:
        record.put(launched={name: {"skipped": "dry run"} for name in ("calibrate", "uptrain")})
    else:
        record.row("launched", "calibrate", lambda: launched_calibration(setup, tiny, lines), 20)
        record.row("launched", "uptrain", lambda: launched_training(setup, tiny, lines), 20)
    record.row("launched", "process group", lambda: process_group(setup))


def launch(setup: Setup, *words: object) -> float:
    """Run a command of headfold under torchrun on one rank and return its seconds."""
    began = time.perf_counter()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "1",
        "-m",
        "headfold",
        *map(str, words),
    ]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, cwd=setup.place, stdout=pipe, stderr=pipe, text=True
    )
    try:
        _, errors = process.communicate(timeout=LAUNCH_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends what it started
        process.communicate()
        raise
    if process.returncode:
        raise RuntimeError(f"exit {process.returncode}: {errors[-400:]}")
    return time.perf_counter() - began


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the largest difference between tensors of the same names, as a share of each one's largest value."""
    assert a.keys() == b.keys(), "other tensors"
    return max(
        float((a[n].double() - b[n].double()).abs().max() / b[n].double().abs().max().clamp(min=1e-30)) for n in b
    )


def launched_calibration(setup: Setup, model: Path, text: Path) -> dict[str, Any]:
    """Return the difference between the statistics of a launched rank and those of a process alone."""
    alone, launched = setup.place / "alone.safetensors", setup.place / "launched.safetensors"
    headfold.calibrate(
        model, alone, calibration=str(text), tokens=512, context=16, device=setup.device, dtype="float32"
    )
    how = ("--calibration", text, "--tokens", 512, "--context", 16, "--device", setup.device, "--dtype", "float32")
    seconds = launch(setup, "calibrate", model, launched, *how)
    found = difference(load_file(launched), load_file(alone))
    return {"seconds": seconds, "relative_difference": found, "equal": found == 0}


def launched_training(setup: Setup, model: Path, text: Path) -> dict[str, Any]:
    """Return the difference between weights trained by a launched rank, over nccl on a GPU, and by a process alone."""
    folded = setup.place / "tiny-folded"
    headfold.fold(model, folded, kv_heads=1, merge="mean", group="contiguous", refit=False, verify=False)
    how: dict[str, Any] = {"steps": 3, "context": 16, "batch": 4}
    headfold.uptrain(folded, setup.place / "alone", data=str(text), device=setup.device, dtype="float32", **how)
    words = [word for name, value in how.items() for word in (f"--{name}", value)]
    where = ("--data", text, "--device", setup.device, "--dtype", "float32")
    seconds = launch(setup, "uptrain", folded, setup.place / "launched", *where, *words)
    found = difference(*(load_file(setup.place / name / "model.safetensors") for name in ("launched", "alone")))
    return {"seconds": seconds, "relative_difference": found, "equal": found == 0}


def process_group(setup: Setup) -> dict[str, Any]:
    """Make a process group of one rank, reduce a tensor over it, and return how long that takes."""
    import torch.distributed as dist

    backend, began = "nccl" if setup.on_gpu else "gloo", time.perf_counter()
    if dist.is_initialized():
        return {"backend": dist.get_backend(), "note": "made by the training before"}
    dist.init_process_group(backend, init_method=f"file://{setup.place / 'group'}", rank=0, world_size=1)
    data = torch.arange(1000.0, device=setup.device)
    total = data.clone()
    dist.all_reduce(total)
    wait(setup.device)
    found = {"backend": backend, "seconds": time.perf_counter() - began, "equal": bool(torch.equal(total, data))}
    dist.destroy_process_group()
    return found
