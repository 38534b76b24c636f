"""What this machine gives: how fast it reads memory, and how much memory a piece of work takes at most."""

import contextlib
import ctypes
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

READ = 1 << 30
"""Bytes that are read to find the bandwidth: more than any cache holds."""
ROUNDS = 7
RESET_PEAK = "5"
"""Written to `clear_refs` it lets Linux count the peak of resident memory anew."""


def read_bandwidth(device: str = "cpu") -> float:
    """Bytes per second that all cores read, or a GPU: the best of a few sums over 1 GiB."""
    data = torch.ones(READ // 4, device=device)
    best = float("inf")
    for _ in range(ROUNDS):
        _wait(device)
        started = time.perf_counter()
        data.sum()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return READ / best


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(slots=True)
class Peak:
    """Bytes beyond what was taken before; None where they cannot be told."""

    num_bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: str = "cpu") -> Iterator[Peak]:
    """The most memory that the work inside takes on top of what there was: of the GPU, else of this process (Linux)."""
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
