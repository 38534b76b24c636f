"""Threads follow a container's quota and sleep beside other jobs; what the user has set stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headfold import threads

ALL = {f"0::/{'a/b'}\n": "sys/fs/cgroup/a/b/cpu.max", "0::/elsewhere\n": "sys/fs/cgroup/cpu.max"}


def machine(root: Path, running: int, files: dict[str, str] | None = None) -> Path:
    """A file system that says so many threads run, this one included."""
    for name, text in {"proc/loadavg": f"0.1 0.2 0.3 {running}/99 1234\n", **(files or {})}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def _four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_cores", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)


def prepared(root: Path, **environment: str) -> dict[str, str]:
    """What is set beside huge pages."""
    threads.prepare(environment, root)
    assert environment.pop("THP_MEM_ALLOC_ENABLE") == "1"
    return environment


@pytest.mark.parametrize("group", ALL)
@pytest.mark.parametrize(("text", "quota"), [("150000 100000\n", 1.5), ("max 100000\n", None), ("", None)])
def test_the_quota_of_version_2(group: str, text: str, quota: float | None, tmp_path: Path) -> None:
    root = machine(tmp_path, 1, {"proc/self/cgroup": group, ALL[group]: text})
    assert threads.cpu_quota(root) == quota
    assert prepared(root) == ({} if quota is None else {"OMP_NUM_THREADS": "1"})


def test_the_quota_of_version_1(tmp_path: Path) -> None:
    place = "sys/fs/cgroup/cpu/docker/1/cpu.cfs"
    files = {
        "proc/self/cgroup": "5:cpuset:/x\n3:cpu,cpuacct:/docker/1\n",
        f"{place}_quota_us": "300000\n",
        f"{place}_period_us": "100000\n",
    }
    assert prepared(machine(tmp_path, 1, files)) == {"OMP_NUM_THREADS": "3"}
    (tmp_path / f"{place}_quota_us").write_text("-1\n")
    assert threads.cpu_quota(tmp_path) is None


def test_threads_sleep_where_others_compute(tmp_path: Path) -> None:
    alone, beside = machine(tmp_path / "alone", 1), machine(tmp_path / "beside", 2)
    assert prepared(alone) == {} and prepared(beside) == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert prepared(beside, OMP_NUM_THREADS="3") == {"OMP_NUM_THREADS": "3"}  # a core is left for the other job
    for mine in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "0"}, {"OMP_NUM_THREADS": "1"}):
        assert prepared(beside, **mine) == mine
    assert prepared(tmp_path / "nothing") == {}


def test_a_job_that_computes_is_seen() -> None:
    before = threads.other_jobs()
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as busy:
        assert busy.stdout is not None
        busy.stdout.readline()
        found = [threads.other_jobs() for _ in range(5)]
        busy.kill()
    assert max(found) >= 1 and before >= 0


def test_the_command_line_decides_before_torch_is_loaded() -> None:
    code = "import sys, headfold.cli; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_the_users_word_on_huge_pages_stays(tmp_path: Path) -> None:
    environment = {"THP_MEM_ALLOC_ENABLE": "0"}
    threads.prepare(environment, tmp_path)
    assert environment == {"THP_MEM_ALLOC_ENABLE": "0"}


def test_torch_takes_huge_pages_when_told_to() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("the system gives huge pages to all processes or to none")
    code = (
        "import resource, torch\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "torch.empty(2**25).fill_(1)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    faults = [
        int(subprocess.check_output([sys.executable, "-c", code], env=os.environ | {"THP_MEM_ALLOC_ENABLE": word}))
        for word in "01"
    ]
    assert faults[0] > 2**25 * 4 // 4096 > 4 * faults[1]


def test_small_matrices_are_computed_on_one_thread_and_then_as_before() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="inside"), threads.one_thread():
        assert torch.get_num_threads() == 1
        raise ValueError("inside")
    assert torch.get_num_threads() == before
