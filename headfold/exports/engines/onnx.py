"""ONNX graphs for onnxruntime and what reads such directories: Hugging Face Optimum, sentence-transformers, transformers.js.

Files, inputs and outputs have the names that Optimum gives them: `model.onnx`, or `encoder_model.onnx`, `decoder_model.onnx` and
`decoder_with_past_model.onnx` for an encoder-decoder. The tensors of a cache have the K/V heads of their layer, any number and in any
groups: the queries of a group are rows of one matrix, and no graph has an operator of its own. Weights are float32, which onnxruntime
computes in on a CPU; with `--quantise f16` they, the cache and the logits are float16.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.reader import Checkpoint
from ...checkpoint.staging import copy_side_files, write_json, wrong_output
from ...core.errors import UserError
from ...core.progress import Progress, counter
from ...families import all_families
from ...graphs.comparison import SHAPES, compare_graphs
from ...graphs.files import write_graph
from ...graphs.graph import CACHED, Graph, graphs_of
from ...hf_models import exceeds_memory, open_model
from ...runtime.load import own_class
from ...runtime.modeling_headfold import SiteConfig, own_forward
from ..card import copy_plan_and_card
from ..folded import Folded, without_code
from ..formats import EngineFormat, Written

NUMBER_TYPES = {"f16": torch.float16}
_UNTRIED = {
    "albert", "biogpt", "codegen", "dinov3_vit", "esm", "eurobert", "hubert", "modernbert", "moonshine", "mpnet", "wav2vec2", "xglm",
}  # fmt: skip
"""`model_type`s of which no graph has been compared in onnxruntime."""


def why_not(checkpoint: Checkpoint, source: Folded) -> str | None:
    """Return why the fold cannot be written as graphs."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        return "the format needs onnx, onnxscript and onnxruntime: pip install 'headfold[onnx]'"
    # Twice float32: the model, and the graph that is made of it.
    if exceeds_memory(checkpoint, torch.float64):
        return "expected a model that fits into memory twice in float32, once as its graph; use a larger machine"
    return None


def write(
    checkpoint: Checkpoint, source: Folded, path: Path, number_type: str | None, progress: Callable[[int, int], None]
) -> Written:
    """Write the graphs, the config, and the files beside the weights."""
    dtype = torch.float32 if number_type is None else NUMBER_TYPES[number_type]
    total, graphs = checkpoint.num_bytes, graphs_of(pack_queries(_finite(_opened(checkpoint, dtype))))
    for done, graph in enumerate(graphs):
        progress(total * done // len(graphs), total)
        write_graph(graph, path)
    progress(total, total)
    model_class = source.config["architectures"][0].removeprefix("PerLayer")
    numbers = str(dtype).removeprefix("torch.")
    config = without_code(source.config) | {"architectures": [model_class], "dtype": numbers}
    said = f"ONNX graphs in {numbers} for onnxruntime: {', '.join(graph.file for graph in graphs)}"
    description = "; ".join((said, *_cached(graphs[-1], config)))
    _write_side_files(checkpoint.path, path, config, description)
    return Written(model_class, description)


def _write_side_files(source: Path, target: Path, config: Mapping[str, Any], description: str) -> None:
    """Write config, card and plan, and copy what else lies beside the weights, but for code."""
    copy_side_files(source, target)
    for code in target.glob("modeling_*.py"):
        code.unlink()
    write_json(target / "config.json", config)
    copy_plan_and_card(source, target, f"{description}.", f"all other tensors are the original's, in {config['dtype']}")


def compare(checkpoint: Checkpoint, directory: Path, progress: Progress) -> tuple[float, float]:
    """Return the largest difference of outputs in onnxruntime from those of headfold's runtime, and the tolerance.

    Raises:
        UserError: they differ by more, or onnxruntime does not run a graph; they stay in `directory`.
    """
    advance = counter(progress, "verify", len(SHAPES))
    difference, tolerance = compare_graphs(_opened(checkpoint, torch.float32), directory, advance)
    if not difference <= tolerance:
        raise wrong_output(
            directory,
            f"expected the outputs of {checkpoint.path} within {tolerance:.2g}, got a difference of {difference:.2g} in onnxruntime",
        )
    return difference, tolerance


def pack_queries(model: Any) -> Any:
    """Set eager attention at all sites and return the model: the queries of a group are rows of one matrix, so that a graph does not
    repeat K and V.
    """
    model.set_attn_implementation("eager")
    for module in model.modules():
        groups, config = getattr(module, "num_key_value_groups", 1), getattr(module, "config", None)
        # A stock class repeats K and V where groups are equal; headfold's classes pack already.
        if groups > 1 and not isinstance(config, SiteConfig) and own_forward(type(module)) is None:
            module.config, module.num_key_value_groups = SiteConfig(config, special=True), 1
    return model


def _finite(model: Any) -> Any:
    """Return the model after checking its weights.

    Raises:
        UserError: some are not finite, in the source or in the dtype that they are written in.
    """
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(
                f"{name}: expected finite numbers in {weight.dtype}, got NaN or infinity; use another --quantise, or fold again"
            )
    return model


def _opened(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    return open_model(checkpoint.path, dtype=dtype, model_class=own_class(checkpoint.config, checkpoint.path))


def _cached(graph: Graph, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what there is to say of the cache of a graph."""
    counts = {tensor.shape[1] for name, tensor in graph.inputs.items() if name.startswith(CACHED)}
    if not counts:
        return ()
    heads = f"a cache of {' or '.join(map(str, sorted(counts)))} K/V heads in each layer"
    if config.get("is_encoder_decoder") or counts == {config.get("num_key_value_heads")}:
        return (heads,)
    return heads, "ORTModelForCausalLM of Optimum takes one number of them from the config, so it does not run this"


FORMAT = EngineFormat(
    name="onnx",
    suffix="",
    model_types=sorted({name for family in all_families().values() for name in family.model_types} - _UNTRIED),
    number_types=tuple(NUMBER_TYPES),
    why_not=why_not,
    write=write,
    compare=compare,
)
