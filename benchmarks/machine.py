"""Describe what a figure was measured on: processor with its flags, cores, memory, versions."""

import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe() -> dict:
    """Return the facts of the machine, without its name or paths.

    Flags matter: without bf16 or AVX-512 units the same code runs several times slower.
    """
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": fields.get("model name", platform.processor()),
        "flags": fields.get("flags", ""),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
    }
