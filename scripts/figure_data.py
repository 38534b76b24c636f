"""Read benchmarks/results/*.json: the rows that the figures use, and where each file comes from."""

import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
INDEX = ROOT / "docs" / "figures.json"
"""Results file → SHA-256 of its contents and the commit that brought them. Written by scripts/figures.py, committed."""
UNCOMMITTED = "not committed"

MODELS = {
    "pylib-llama": "pylib-llama",
    "bundled": "bundled model",
    "multi30k-t5": "T5",
    "cifar10-vit": "ViT",
    "minilm": "MiniLM",
}
"""Model in a file name → as the tables call it."""
SOURCE_KV_HEADS = {"pylib-llama": 8, "bundled": 8, "multi30k-t5": 8, "cifar10-vit": 8, "minilm": 12}
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Processor flags on which the speed of the same code depends most."""


def path_of(name: str) -> Path:
    """Return the file of a result: `pylib-llama-main` → benchmarks/results/pylib-llama-main.json."""
    return RESULTS / f"{name}.json"


@cache
def load(name: str) -> dict[str, Any]:
    return json.loads(path_of(name).read_text(encoding="utf-8"))


def rows(result: str, /, **wanted: Any) -> list[dict[str, Any]]:
    """The rows of a results file whose fields have the wanted values."""
    return [row for row in load(result)["rows"] if all(row[key] == value for key, value in wanted.items())]


def row(result: str, /, **wanted: Any) -> dict[str, Any]:
    """The only such row.

    Raises:
        LookupError: there is none, or more than one.
    """
    found = rows(result, **wanted)
    if len(found) != 1:
        raise LookupError(f"{path_of(result).name}: expected one row with {wanted}, found {len(found)}")
    return found[0]


def git(*words: str) -> str:
    """What git prints, empty where it fails or is absent."""
    try:
        ran = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


class Index:
    """The commit of every results file. Contents that have not changed keep their commit, so a check needs no history."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, str]] = json.loads(INDEX.read_text()) if INDEX.exists() else {}

    @staticmethod
    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def stale(self, paths: Iterable[Path]) -> list[Path]:
        """Files whose contents are not those of the index."""
        return [path for path in paths if self.entries.get(path.name, {}).get("sha256") != self.digest(path)]

    def refresh(self, paths: Iterable[Path], keep_commits: bool) -> None:
        """Note the contents of every file, and the commit of those that are new; `keep_commits` where they were only rewritten."""
        entries = {}
        for path in sorted(paths):
            known = self.entries.get(path.name, {})
            commit, sha256 = known.get("commit", UNCOMMITTED), self.digest(path)
            if commit == UNCOMMITTED or (known.get("sha256") != sha256 and not keep_commits):
                relative = str(path.relative_to(ROOT))
                clean = git("ls-files", relative) and not git("status", "--porcelain", "--", relative)
                commit = (
                    git("log", "-1", "--format=%h", "--abbrev=10", "--", relative) if clean else ""
                ) or UNCOMMITTED
            entries[path.name] = {"commit": commit, "sha256": sha256}
        self.entries = entries

    def text(self) -> str:
        return json.dumps(self.entries, indent=1) + "\n"

    def commit(self, name: str) -> str:
        return self.entries.get(path_of(name).name, {}).get("commit", UNCOMMITTED)


def processor(facts: Mapping[str, Any]) -> str:
    """Model, cores and decisive flags of the processor that a file was measured on."""
    machine = facts.get("machine") or {}
    if not machine.get("processor"):
        return "not recorded"
    flags = [flag for flag in FLAGS if flag in machine.get("flags", "").split()]
    return f"{machine['processor']}, {machine.get('cores', '?')} cores, {' '.join(flags) or 'flags not recorded'}"


def versions(facts: Mapping[str, Any]) -> str:
    found = (facts.get("machine") or {}).get("versions") or facts.get("versions")
    return ", ".join(f"{name} {found[name]}" for name in sorted(found, reverse=True)) if found else "not recorded"


def seeds_of(facts: Mapping[str, Any]) -> str:
    """How many seeds the rows of a file have, or which ones its script sets for all of them (`seeds` of the file)."""
    if fixed := facts.get("seeds"):
        return f"the fixed seed{'s' if len(fixed) > 1 else ''} {', '.join(map(str, fixed))}"
    counts: set[int] = set()

    def walk(value: Any) -> None:
        if isinstance(value, Mapping):
            counts.update(int(value[key]) for key in ("num_seeds",) if key in value)
            counts.update(int(value["seeds"]) for _ in (0,) if {"mean", "sd", "seeds"} <= value.keys())
            for inner in value.values():
                walk(inner)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            for inner in value:
                walk(inner)

    walk(facts.get("rows", []))
    return " or ".join(map(str, sorted(counts))) + " per row" if counts else "not recorded"


def provenance(names: Sequence[str], index: Index) -> str:
    """The line under a table: files with commits, processors, versions and seeds."""
    facts = {name: load(name) for name in names}

    def each(describe: Any) -> str:
        said: dict[str, list[str]] = {}
        for name in names:
            said.setdefault(describe(facts[name]), []).append(path_of(name).stem)
        if len(said) == 1:
            return next(iter(said))
        return "; ".join(f"{text} ({', '.join(of)})" for text, of in said.items())

    files = ", ".join(f"`{path_of(name).name}` (commit {index.commit(name)})" for name in names)
    return f"*Results: {files}. Processor: {each(processor)}. Versions: {each(versions)}. Seeds: {each(seeds_of)}.*"
