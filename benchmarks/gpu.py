"""Measure headfold on a machine with one CUDA GPU: attention, generate, folding, training, and agreement with the CPU.

    python benchmarks/gpu.py [--out PATH] [--minutes 9] [--only SECTION ...]
    python benchmarks/gpu.py --device cpu --dry-run      # tiny sizes, to test the script

It needs torch, transformers and what else headfold needs, but no installation: the package is that of this clone. Results go to
benchmarks/results/gpu.json, which is written after each section. Every section has a share of the time that is left, and runs in a
process of its own, which is ended when that time is over; what it found until then is kept. On a dry run all but `machine` share one
process.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
WEIGHTS = {"machine": 1, "correctness": 15, "decode_attention": 10, "generate": 10, "fold": 14, "training": 9}
"""Sections in their order, with their shares of the time."""
LEAST_SECONDS = 15.0
"""A section is not begun in less time."""
RESERVE = 10.0
"""Seconds between the last row that a section begins and its end."""
PACKAGES = (
    "torch", "transformers", "safetensors", "accelerate", "flash_attn", "triton", "einops", "numpy", "scipy", "tokenizers", "peft",
)  # fmt: skip


def use_this_clone(place: Path) -> None:
    """Import the package from this clone, here and in processes started from here, whether or not it is installed."""
    paths = [str(ROOT)]
    try:
        version("headfold")
    except PackageNotFoundError:
        number = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        facts = place / f"headfold-{number}.dist-info"
        facts.mkdir(parents=True, exist_ok=True)
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: headfold\nVersion: {number}\n")
        paths.append(str(place))
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def machine(setup: Any, record: Any) -> None:
    """Describe the machine: processor, GPU, driver, versions, and the bandwidth of the device's memory."""
    import torch
    from gpu_setup import timed_calls
    from machine import describe

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    record.put(
        **describe(),
        packages=versions,
        cuda=torch.version.cuda,
        platform=platform.machine(),
        threads=torch.get_num_threads(),
    )
    if setup.on_gpu:
        facts = torch.cuda.get_device_properties(0)
        names = ("name", "multi_processor_count", "total_memory", "L2_cache_size", "major", "minor")
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        record.put(
            gpu={name: getattr(facts, name, None) for name in names},
            driver=driver(),
            nccl=nccl,
            cudnn=torch.backends.cudnn.version(),
        )
    data = torch.ones(1 << (22 if setup.dry_run else 28), device=setup.device)
    timing = timed_calls(data.sum, setup, 0.1)
    record.put(read_bytes_per_second=data.nbytes / timing["seconds"])


def driver() -> str | None:
    """Return the version of the GPU's driver, or None where `nvidia-smi` does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def section(name: str) -> Callable[[Any, Any], None]:
    """Return the function of a section."""
    if name == "machine":
        return machine
    if name == "correctness":
        from gpu_correctness import correctness

        return correctness
    if name in ("fold", "training"):
        import gpu_folding

        return getattr(gpu_folding, name)
    import gpu_speed

    return getattr(gpu_speed, name)


def run_here(name: str, device: str, dry_run: bool, place: Path, file: Path, seconds: float) -> None:
    """Run a section in this process; its figures, or its error, go to `file`."""
    use_this_clone(place / "package")
    from gpu_setup import Record, Setup, one_line

    own = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=place))
    record = Record(file, own, time.monotonic() + seconds)
    try:
        section(name)(Setup(device, dry_run, own), record)
    except Exception as error:  # the next section goes on
        record.put(error=one_line(error, own))


def run_apart(name: str, device: str, dry_run: bool, place: Path, file: Path, seconds: float) -> str | None:
    """Run a section in a process of its own that has `seconds`; return why it ended early, if it did."""
    command = [
        sys.executable,
        __file__,
        "--section",
        name,
        "--place",
        str(place),
        "--seconds",
        str(max(1.0, seconds - RESERVE)),
    ]
    command += ["--device", device, "--out", str(file), *(["--dry-run"] if dry_run else [])]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it launched
        process.wait()
        return f"ended after {seconds:.0f} s, its share of the time"
    return f"exit code {code}" if code else None


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a run, as they are recorded."""

    device: str
    dry_run: bool
    minutes: float
    only: list[str]
    seed: int = 0


def run(options: Options, out: Path) -> dict[str, Any]:
    """Run all sections and return what was written to `out`."""
    end = time.monotonic() + 60 * options.minutes
    result: dict[str, Any] = {"settings": asdict(options), "sections": {}}
    with tempfile.TemporaryDirectory(prefix="headfold-gpu-") as folder:
        place = Path(folder)
        for number, name in enumerate(options.only):
            left = end - time.monotonic() - 5
            seconds = left * WEIGHTS[name] / sum(WEIGHTS[later] for later in options.only[number:])
            seconds = min(left, max(seconds, LEAST_SECONDS + RESERVE))
            began, file = time.monotonic(), place / f"{name}.json"
            found: dict[str, Any] = {}
            if seconds < LEAST_SECONDS:
                found["skipped"] = f"{seconds:.0f} s left of {options.minutes:g} minutes"
            else:
                apart = name == "machine" or not options.dry_run
                how = (name, options.device, options.dry_run, place, file, seconds)
                problem = run_apart(*how) if apart else run_here(*how)  # type: ignore[func-returns-value]
                found = json.loads(file.read_text()) if file.exists() else {}
                if problem is not None:
                    found["error"] = problem
            result["sections"][name] = {**found, "section_seconds": round(time.monotonic() - began, 2)}
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
            print(
                f"{name}: {time.monotonic() - began:.1f} s {found.get('error') or found.get('skipped') or ''}",
                flush=True,
            )
    return result


def main() -> None:
    """Read the command line and run, or run the one section that a process is for."""
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    reader.add_argument("--dry-run", action="store_true", help="tiny sizes, to test the script")
    reader.add_argument("--minutes", type=float, default=9)
    reader.add_argument("--only", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    reader.add_argument("--out", type=Path, default=RESULT)
    for internal in ("--section", "--place", "--seconds"):
        reader.add_argument(internal, help=argparse.SUPPRESS)
    given = reader.parse_args()
    if given.section is not None:
        run_here(given.section, given.device, given.dry_run, Path(given.place), given.out, float(given.seconds))
        return
    run(Options(given.device, given.dry_run, given.minutes, given.only), given.out)


if __name__ == "__main__":
    main()
