"""OpenVINO GenAI, by optimum-intel.

It exports a checkpoint by a script of headfold's, which adds numbers of heads per layer and DeciLM.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine import Engine, build, quoted

BUILDER = "for_openvino.py"


def serve(path: Path, config: Mapping[str, Any]) -> str:
    """Return the command that builds the engine's model of a checkpoint."""
    return build(
        BUILDER,
        f"export openvino --model {quoted(path)} --task text-generation-with-past --trust-remote-code {quoted(Path(f'{path}-openvino'))}",
    )


ENGINE = Engine(
    name="openvino",
    title="OpenVINO",
    packages=("openvino-genai",),
    reads=None,
    install="pip install openvino-genai openvino-tokenizers optimum-intel nncf",
    serve=serve,
    builder=BUILDER,
)
