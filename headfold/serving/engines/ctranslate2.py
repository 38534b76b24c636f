"""CTranslate2, and programs on it such as faster-whisper. It reads directories of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine import Engine, in_python


def serve(path: Path, config: Mapping[str, Any]) -> str:
    """Return the command that opens a directory in Python, as CTranslate2 brings no server."""
    return in_python("import ctranslate2; model = ctranslate2.Generator(", path)


ENGINE = Engine(
    name="ctranslate2",
    title="CTranslate2",
    packages=("ctranslate2",),
    reads="ct2",
    number_type="float32",
    install="pip install 'headfold[ct2]'",
    serve=serve,
)
