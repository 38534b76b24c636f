"""mlx-lm, for Apple's processors. It reads checkpoint directories of stock classes, and of decilm where layers differ."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine import Engine, quoted


def serve(path: Path, config: Mapping[str, Any]) -> str:
    """Return the command that serves a checkpoint."""
    return f"mlx_lm.server --model {quoted(path)}"


ENGINE = Engine(
    name="mlx",
    title="mlx-lm",
    packages=("mlx-lm",),
    reads=None,
    install="pip install mlx-lm",
    serve=serve,
    instead={"per_layer_config": "decilm"},
)
