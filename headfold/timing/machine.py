"""Memory bandwidth of this machine, how fast it multiplies matrices, and the peak memory of a piece of work."""

import contextlib
import ctypes
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

READ = 1 << 30
"""Bytes that are read to measure the bandwidth: more than any processor cache holds."""
ROUNDS = 7
RATE_SECONDS, ROWS, LARGEST = 0.1, 2048, 2048
"""Seconds that products are repeated for, their rows, and the largest size of the matrix."""
RESET_PEAK = "5"
"""Written to `clear_refs`, makes Linux restart the peak of resident memory."""


def read_bandwidth(device: str = "cpu") -> float:
    """Return bytes per second that all cores, or a GPU, read: the best of a few sums over 1 GiB."""
    data = torch.ones(READ // 4, device=device)
    best = float("inf")
    for _ in range(ROUNDS):
        _wait(device)
        started = time.perf_counter()
        data.sum()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return READ / best


@functools.cache
def product_rate(size: int, device: str, dtype: torch.dtype) -> float:
    """Return floating-point operations per second of products with a square matrix of `size`, or of `LARGEST` if that is less."""
    size = min(size, LARGEST)
    rows, matrix = (torch.ones(number, size, dtype=dtype, device=device) for number in (ROWS, size))
    torch.nn.functional.linear(rows, matrix)  # the first one is slower
    _wait(device)
    started, count, passed = time.perf_counter(), 0, 0.0
    while passed < RATE_SECONDS:
        torch.nn.functional.linear(rows, matrix)
        _wait(device)
        count, passed = count + 1, time.perf_counter() - started
    return 2 * ROWS * size * size * count / passed


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(slots=True)
class Peak:
    """Bytes above what was in use before; None where this cannot be measured."""

    num_bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: str = "cpu") -> Iterator[Peak]:
    """Return a context that measures the peak memory above that in use before: of the GPU, else of this process (Linux)."""
    peak = Peak()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.num_bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with contextlib.suppress(OSError, AttributeError):  # give back what the allocator keeps: it would hide new use
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
        before = _resident("VmRSS")
    except (OSError, StopIteration):
        yield peak
        return
    yield peak
    peak.num_bytes = max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
