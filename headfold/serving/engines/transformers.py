"""transformers, of any version from 4.57 on. It reads checkpoint directories; those that bring code need trust_remote_code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine import Engine, brings_code, quoted


def serve(path: Path, config: Mapping[str, Any]) -> str:
    """Return the command that serves a checkpoint."""
    return f"transformers serve {quoted(path)}{' --trust-remote-code' if brings_code(config) else ''}"


ENGINE = Engine(
    name="transformers",
    title="transformers",
    packages=("transformers",),
    reads=None,
    install="pip install transformers accelerate",
    serve=serve,
)
