"""llama.cpp, and what builds on it: Ollama, LM Studio, llama-cpp-python. It reads GGUF files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine import Engine, quoted


def serve(path: Path, config: Mapping[str, Any]) -> str:
    """Return the command that serves a GGUF file."""
    return f"llama-server -m {quoted(path)}"


ENGINE = Engine(
    name="llama-cpp",
    title="llama.cpp",
    packages=("llama-cpp-py-sync",),
    reads="gguf",
    number_type="f32",
    install="pip install llama-cpp-py-sync 'headfold[gguf]'",
    serve=serve,
)
