"""Find the Python that has an engine, and run a model in the engine there."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

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
    # Not resolved: the link of a virtual environment is what makes it one.
    place = Path(sys.executable) if python is None else python.expanduser().absolute()
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
        late, other = isinstance(error, subprocess.TimeoutExpired), isinstance(error, ValueError)
        said = "no answer in two minutes" if late else "what another program prints" if other else str(error)
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
            code = _ran(words, errors, Path(folder))
            errors.seek(0)
            if code is None:
                return Refusal(f"no answer after {TIMEOUT // 60} minutes")
            if code or not answer.exists():
                ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                return Refusal(_last_line(errors.read()) or ended)
        try:
            return _answer(answer, request)
        except (OSError, ValueError, TypeError, KeyError) as error:
            return Refusal(f"its driver answered something else than it was to: {type(error).__name__} {error}"[:300])


def _ran(words: list[str], errors: IO[str], folder: Path) -> int | None:
    """Return the exit code of a driver; None where it took too long, and what it started is ended with it."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors, cwd=folder, start_new_session=True)
    try:
        return process.wait(TIMEOUT)
    except BaseException as error:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise


def _last_line(text: str) -> str:
    """Return the last line that names an error, with the one below it where that is indented; empty where none does."""
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    for place in range(len(lines) - 1, -1, -1):
        head = lines[place].split(":")[0]
        if head.split()[0] == head and head.endswith(("Error", "Exception", "Exit")):
            below = lines[place + 1 : place + 2]
            detail = below[0] if below and below[0][:1].isspace() else ""
            return _printable(f"{lines[place]} {detail.strip()}")
    # An engine that is not written in Python, or ends with words of its own.
    words = [line for line in lines if "it/s]" not in line]
    return _printable(words[-1]) if words else ""


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable()).strip()[:300]


def _answer(file: Path, request: Request) -> Answer:
    """Return what a driver wrote, checked.

    Raises:
        ValueError, TypeError, KeyError: it lacks something, or has another shape.
    """
    found, logits = json.loads(file.read_text()), torch.from_numpy(np.load(file.with_suffix(".npy"))).double()
    greedy, tokens, of_written = found["greedy"], found.get("tokens"), bool(found.get("of_written"))
    rows = request.new_tokens if of_written else len(request.tokens)
    if logits.ndim != 2 or len(logits) < rows or logits.shape[1] < request.vocab_size:
        raise ValueError(f"logits of shape {tuple(logits.shape)}, not ({rows}, {request.vocab_size})")
    if len(greedy) != request.new_tokens:
        raise ValueError(f"{len(greedy)} greedy tokens, not {request.new_tokens}")
    seconds, kept = (
        float(found[name]) if found.get(name) else None for name in ("seconds_per_token", "kv_bytes_per_token")
    )
    return Answer(
        logits, of_written, tuple(map(int, greedy)), None if tokens is None else tuple(map(int, tokens)), seconds, kept
    )
