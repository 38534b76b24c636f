"""onnxruntime, and what reads such directories: Hugging Face Optimum, sentence-transformers, transformers.js. It reads ONNX graphs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine import Engine, in_python


def serve(path: Path, config: Mapping[str, Any]) -> str:
    """Return the command that opens a directory in Python, as onnxruntime brings no server."""
    return in_python("import onnxruntime; session = onnxruntime.InferenceSession(", path / "model.onnx")


ENGINE = Engine(
    name="onnxruntime",
    title="onnxruntime",
    packages=("onnxruntime", "onnxruntime-gpu"),
    reads="onnx",
    install="pip install 'headfold[onnx]'",
    serve=serve,
)
