"""The benchmark for a machine with a GPU runs from beginning to end, at tiny sizes on a CPU."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SECTIONS = {"machine", "correctness", "decode_attention", "generate", "fold", "training"}


def ran(out: Path, *options: str) -> dict[str, Any]:
    command = [
        sys.executable,
        str(ROOT / "benchmarks/gpu.py"),
        "--device",
        "cpu",
        "--dry-run",
        "--out",
        str(out),
        *options,
    ]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in out.read_text() and str(out.parent) not in out.read_text()
    return json.loads(out.read_text(), parse_constant=pytest.fail)


def leaves(value: Any) -> Iterator[Any]:
    """All values that are in no container, and the names of fields."""
    if isinstance(value, dict):
        yield from value
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


def test_a_dry_run_fills_every_section(tmp_path: Path) -> None:
    sections = ran(tmp_path / "gpu.json")["sections"]
    assert sections.keys() == SECTIONS
    for name, found in sections.items():
        assert "error" not in leaves(found), (name, found)
        figures = [value for value in leaves(found) if isinstance(value, float)]
        assert figures and all(map(math.isfinite, figures)) and not {"nan", "inf", "-inf"} & {*map(str, leaves(found))}
    checked = sections["correctness"]
    assert checked["passed"] and checked["compared"] == checked["families"] == 3
    assert checked["rows"]["llama"]["generated"]["same_tokens"]
    for row in sections["decode_attention"]["rows"].values():
        assert row["chosen"]["candidate"] in ("sdpa", "matmuls", "kernel")
        assert max(variant["relative_error"] for variant in row["variants"].values()) < 0.05
    assert all(row["verified"] for row in sections["fold"]["rows"].values())
    assert sections["training"]["launched"]["process group"]["equal"]


def test_sections_that_do_not_fit_are_recorded_with_the_reason(tmp_path: Path) -> None:
    result = ran(tmp_path / "gpu.json", "--minutes", "0.1")
    assert {name for name, found in result["sections"].items() if "0.1 minutes" in found["skipped"]} == SECTIONS
