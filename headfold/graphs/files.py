"""ONNX files of graphs, written by torch's exporter."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.disk import disk_errors, require_space
from ..core.errors import UserError
from .graph import Graph

LARGEST = 2 * 10**9
"""Bytes of weights that are kept in the file itself, whose format ends at 2 GiB; more lie beside it as `.onnx_data`."""
_SAID = ("# The axis name: ", r"`isinstance\(treespec, LeafSpec\)`")
"""How warnings begin that concern neither the user nor the graph: two inputs have an axis of one name; torch uses its own old names."""


@torch.no_grad()
def write_graph(graph: Graph, directory: Path, largest: int = LARGEST) -> None:
    """Write one graph into an existing directory.

    Raises:
        UserError: torch's exporter does not express the model, or the disk is full.
    """
    import onnx_ir

    model = _traced(graph)
    _forget_sources(model)
    num_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    beside = f"{graph.file}_data" if num_bytes > largest else None
    with disk_errors(directory / graph.file, num_bytes):
        require_space(directory, num_bytes)
        onnx_ir.save(model, directory / graph.file, external_data=beside)


def _traced(graph: Graph) -> Any:
    """Return the graph as an `onnx_ir.Model`."""
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                graph.module.eval(),
                kwargs={"inputs": dict(graph.inputs)},
                dynamic_shapes={"inputs": {name: dict(axes) for name, axes in graph.axes.items()}},
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # whatever a tracer, a translator or an optimizer raises
        raise _refused(graph, _reason(error)) from error
    return program.model


def _reason(error: BaseException) -> str:
    """Return what the innermost cause of an error says; the outer ones only say which step of the exporter failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in re.sub(r"\x1b\[\d*m", "", str(error)).splitlines() if line.strip()]
    fixed = [line for line in lines if "inferred a static shape" in line]  # below a heading that names none
    return (fixed or lines or [type(error).__name__])[0].strip()


def _forget_sources(model: Any) -> None:
    """Remove the stack traces that the exporter notes at every node: they name files of this machine, and may outweigh the weights."""
    for part in (model.graph, *model.graph.all_nodes()):
        part.metadata_props.clear()
    for value in (
        *model.graph.inputs,
        *model.graph.outputs,
        *(v for node in model.graph.all_nodes() for v in node.outputs),
    ):
        value.metadata_props.clear()


def _refused(graph: Graph, found: str) -> UserError:
    return UserError(
        f"{graph.file}: expected a model that torch.onnx.export traces with inputs of any size, got {found}; run it in headfold's runtime"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says of packages that are not installed, and the warnings of `_SAID`."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for said in _SAID:
                warnings.filterwarnings("ignore", message=said)
            yield
    finally:
        logger.setLevel(level)
