"""How many threads torch starts, how they wait for each other, and how it takes memory, decided before it is loaded.

OpenMP's threads wait in a busy loop. Where they are more than the cores that are free, those that wait take the time of those that
compute: beside one busy process on two cores a fold took three times as long as alone, with threads that sleep instead one and a half
times. On free cores sleeping costs up to half again as much, so it is chosen only where cores are short.

Large tensors, such as attention weights, get new memory from the system every time, and its pages of 4 KiB are made one by one when they
are first written: half of the time of a softmax. In huge pages, where Linux has them, that takes a quarter of the time.
"""

import math
import os
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

SAMPLES, PAUSE = 5, 0.004
"""How often at most, and how many seconds apart, running processes are counted: a job that computes is seen every time."""


def prepare(environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Set OMP_NUM_THREADS to a container's CPU quota, OMP_WAIT_POLICY to passive beside other jobs, and THP_MEM_ALLOC_ENABLE (PyTorch's
    word for huge pages), unless the user has set them.

    Threads stay as they are where the system does not say what it runs (no /proc, no cgroups). Nothing of this has an effect once torch
    is loaded; the command line calls it before, users of the library set the variables themselves.
    """
    environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    cores = _cores()
    threads = min(cores, math.floor(cpu_quota(root) or cores) or 1)
    if threads < cores:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    threads = int(environment.get("OMP_NUM_THREADS", "").partition(",")[0] or threads)
    waits = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & environment.keys()
    if threads > 1 and not waits and other_jobs(root) + threads > (os.cpu_count() or cores):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


@contextmanager
def one_thread() -> Iterator[None]:
    """Return a context in which torch computes on one thread: on small matrices more of them gain nothing, and beside other jobs they
    wait for each other.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the cores' worth of time that this process's control group may use, of version 1 or 2; None without a limit."""
    groups = root / "sys/fs/cgroup"
    quotas = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        # Inside a container its own group may be mounted as the root.
        for folder in {path.lstrip("/"), ""}:
            if number == "0":
                quota, _, period = _text(groups / folder / "cpu.max").partition(" ")
            elif "cpu" in controllers.split(","):
                quota, period = (
                    _text(groups / "cpu" / folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
                )
            else:
                continue
            if quota.isdecimal() and period.strip().isdecimal() and int(period):
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def other_jobs(root: Path = Path("/")) -> int:
    """Return the number of threads on this machine, beside this one, that compute all the time."""
    fewest = _running(root)
    for _ in range(SAMPLES - 1):
        if fewest <= 1:  # on free cores nothing is waited for
            break
        time.sleep(PAUSE)
        fewest = min(fewest, _running(root))
    return max(fewest - 1, 0)


def _running(root: Path) -> int:
    """Return the number of threads that run or wait for a core now, this one among them; 0 where the system does not say."""
    words = _text(root / "proc/loadavg").split()
    return int(words[3].partition("/")[0]) if len(words) > 3 else 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
