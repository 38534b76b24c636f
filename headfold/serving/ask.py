"""Find the Python that has an engine, and run a model in the engine there."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UserError
from .engine import BUILDERS, Engine, all_engines

TIMEOUT = 1800
"""Seconds after which an engine counts as hanging."""
_VERSION = (
    "import json, sys; from importlib import metadata as m; print(json.dumps({d.metadata['Name'].lower().replace('_', '-'): d.version \
for d in m.distributions() if d.metadata['Name']}))"
)


@dataclass(frozen=True, slots=True)
class Installed:
    """An engine, the Python that has it, and its version."""

    engine: Engine
    python: Path
    version: str


@dataclass(frozen=True, slots=True)
class Request:
    """What an engine computes: the logits of `tokens`, and `new_tokens` greedy ones after them; it divides `text` into tokens."""

    tokens: Sequence[int]
    new_tokens: int
    text: str
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine computed. `logits` are of every position, or of the new tokens, up to a constant each."""

    logits: Tensor
    of_written: bool
    """Whether the logits are those that the new tokens were chosen by."""
    greedy: tuple[int, ...]
    tokens: tuple[int, ...] | None
    """Of the text; None where the driver does not ask its tokenizer."""
    seconds_per_token: float | None
    """Of a new token."""
    kv_bytes_per_token: float | None
    """What its cache takes, in the dtype that the driver computes in."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What an engine says that does not run the model."""

    reason: str


def installed(engine: Engine, python: Path | None = None) -> Installed:
    """Return an engine with its version, as `python` has it; by default the Python that runs now.

    Raises:
        UserError: it is not installed there.
    """
    place = python or Path(sys.executable)
    found = _distributions(place)
    version = next((found[name] for name in engine.packages if name in found), None)
    if version is None:
        raise UserError(
            f"--engine {engine.name}: expected {' or '.join(engine.packages)} in {place}, got none; {engine.install}, or name a Python "
            f"that has it by --engine {engine.name}=PYTHON"
        )
    return Installed(engine, place, version)


def installed_here() -> list[str]:
    """Return the names of the engines that the Python that runs now has."""
    here = _distributions(Path(sys.executable))
    return [engine.name for engine in all_engines().values() if any(name in here for name in engine.packages)]


def _distributions(python: Path) -> Mapping[str, str]:
    """Return name → version of what a Python has.

    Raises:
        UserError: it does not run.
    """
    try:
        ran = subprocess.run([str(python), "-c", _VERSION], capture_output=True, text=True, timeout=120)
        return dict(json.loads(ran.stdout))
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        said = f"{type(error).__name__}" if isinstance(error, ValueError) else str(error)
        raise UserError(f"{python}: expected a Python to run an engine with, got {said}; name another") from error


def ask(found: Installed, source: Path, request: Request) -> Answer | Refusal:
    """Return what an engine says to a request about a model: `source` is in the form that it reads."""
    with tempfile.TemporaryDirectory(prefix="headfold-check-") as folder:
        question, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        content = {"tokens": list(request.tokens), "new_tokens": request.new_tokens, "text": request.text}
        built = {} if found.engine.builder is None else {"builder": str(BUILDERS / found.engine.builder)}
        question.write_text(json.dumps(content | built | {"vocab_size": request.vocab_size}))
        # As files, so that a child of the engine that outlives it holds no pipe open.
        with (Path(folder) / "errors").open("w+", errors="replace") as errors:
            words = [str(found.python), str(found.engine.driver), str(source.absolute()), str(question), str(answer)]
            try:
                ran = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=errors, cwd=folder, timeout=TIMEOUT)
            except subprocess.TimeoutExpired:
                return Refusal(f"no answer after {TIMEOUT // 60} minutes")
            errors.seek(0)
            if ran.returncode or not answer.exists():
                return Refusal(_last_line(errors.read()) or f"exit code {ran.returncode}")
        return _answer(json.loads(answer.read_text()), torch.from_numpy(np.load(answer.with_suffix(".npy"))))


def _last_line(text: str) -> str:
    """Return the line of a traceback that names the error: the last one that is not indented and has a colon, else the last."""
    lines = [line for line in text.splitlines() if line.strip()]
    named = [
        line for line in lines if not line[0].isspace() and line.split(":")[0].endswith(("Error", "Exception", "Exit"))
    ]
    return (named or lines or [""])[-1].strip()[:300]


def _answer(found: Mapping[str, Any], logits: Tensor) -> Answer:
    tokens = found.get("tokens")
    return Answer(
        logits.double(),
        bool(found.get("of_written")),
        tuple(found["greedy"]),
        None if tokens is None else tuple(tokens),
        found.get("seconds_per_token"),
        found.get("kv_bytes_per_token"),
    )
