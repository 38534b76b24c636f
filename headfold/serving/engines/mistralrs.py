"""mistral.rs. It reads checkpoint directories of stock classes with one number of K/V heads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine import Engine, in_python


def serve(path: Path, config: Mapping[str, Any]) -> str:
    """Return the command that opens a checkpoint in Python, as the package has no server."""
    return in_python("from mistralrs import Runner, Which; engine = Runner(Which.Plain(", path, "))")


ENGINE = Engine(
    name="mistralrs",
    title="mistral.rs",
    packages=("mistralrs",),
    reads=None,
    install="pip install mistralrs",
    serve=serve,
)
