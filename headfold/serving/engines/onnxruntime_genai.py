"""onnxruntime-genai.

Its builder reads a checkpoint by a script of headfold's, which adds numbers of heads per layer and tables of rotary frequencies.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine import Engine, build, quoted

BUILDER = "for_onnxruntime_genai.py"


def serve(path: Path, config: Mapping[str, Any]) -> str:
    """Return the command that builds the engine's model of a checkpoint."""
    out, cache = (quoted(Path(f"{path}-genai{end}")) for end in ("", "-cache"))
    return build(BUILDER, f"-m {quoted(path)} -o {out} -p fp32 -e cpu -c {cache} --extra_options hf_remote=true")


ENGINE = Engine(
    name="onnxruntime-genai",
    title="onnxruntime-genai",
    packages=("onnxruntime-genai",),
    reads=None,
    install="pip install torch transformers onnx onnx-ir onnxruntime-genai",
    serve=serve,
    builder=BUILDER,
)
