"""GGUF files: transformers' names, config and tokenizer; the gguf package's numbers, one tensor at a time."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.config import check_fields, check_layers
from ..checkpoint.refusals import check_finite
from ..core.errors import UserError, listed, suggest
from ..hf_models.building import library_errors, open_config, quiet
from .gguf_experts import MIXTURES, Experts, set_expert_sizes, unread_experts
from .gguf_header import GgufHeader, GgufTensor, read_gguf_header
from .gguf_rotary import TABLES, with_rotary_tables
from .weights import Weights, dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Types of ggml that hold numbers as they are."""
_AGAIN = "start from the checkpoint that it was made of"


def open_gguf(path: Path) -> Weights:
    """Return the weights of a GGUF file; no data are read.

    Raises:
        UserError: no gguf package, a file that is cut or is none, or an architecture that transformers does not read from GGUF.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            f"{path}: expected the gguf package, which reads it, got none; pip install 'headfold[gguf]'"
        ) from error
    header = read_gguf_header(path, {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()})
    _refuse_unknown(path, header)
    with library_errors(path, "transformers does not read this GGUF file", _AGAIN), quiet(), _alone(path) as directory:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(
            directory, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
    set_expert_sizes(config, header.fields)
    facts = _plain_config(config, path, len(header.tensors))
    model = _empty_model(config, facts, path)
    processor = _processor(header, config)
    with library_errors(path, "transformers has no names for its tensors", _AGAIN):
        names = dict(_rules().get_gguf_hf_weights_map(model, processor))
    _refuse_unread(path, header, names)
    facts = with_rotary_tables(facts, header.fields, lambda name: _table(path, header, name), path)
    dtype, kinds = _dtype(header)
    experts = Experts.of(names, config)
    blocks = any(tensor.kind not in _FLOATS for tensor in header.tensors)
    return Weights(
        config={**facts, "dtype": dtype_name(dtype)},
        names=experts.names_in_checkpoint(names),
        num_bytes=sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize,
        tensors=lambda: _tensors(path, header, model, processor, names, experts, dtype),
        beside=None,
        origin=f"GGUF weights ({kinds}), {'dequantised to' if blocks else 'as'} {dtype_name(dtype)}",
        quantised=blocks,
        write_tokenizer=lambda directory: _write_tokenizer(path, directory),
    )


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """Return a context with a directory that leads to a file and to no other: transformers prefers what lies beside it."""
    with TemporaryDirectory(prefix="headfold-") as directory:
        (Path(directory) / path.name).symlink_to(path.resolve())
        yield Path(directory)


def _refuse_unknown(path: Path, header: GgufHeader) -> None:
    found, read = header.fields.get("general.architecture"), _rules().GGUF_SUPPORTED_ARCHITECTURES
    if MIXTURES.get(str(found), found) not in read:
        known = suggest(str(found), read)
        raise UserError(
            f"{path}: expected an architecture that transformers reads from GGUF, got {found!r:.60}; {_AGAIN}, or {known}"
        )


def _refuse_unread(path: Path, header: GgufHeader, names: Mapping[str, str]) -> None:
    """Refuse a file with tensors that transformers would leave out: biases, scales or layers that the model then lacks.

    Raises:
        UserError: names the first of them.
    """
    known = {*names, *(f"{name}.weight" for name in names), *TABLES}
    left = [tensor.name for tensor in header.tensors if tensor.name not in known]
    if left:
        found = unread_experts(header.fields, left)
        raise UserError(
            f"{path}: expected tensors that transformers reads from GGUF, got {found}{listed(left)}; {_AGAIN}"
        )


def _table(path: Path, header: GgufHeader, name: str) -> Tensor | None:
    """Return a small tensor of the file; None where there is none."""
    found = next((tensor for tensor in header.tensors if tensor.name == name), None)
    return None if found is None else torch.from_numpy(_numbers(path, found))


def _plain_config(config: "PreTrainedConfig", path: Path, num_tensors: int) -> dict[str, Any]:
    """Return the config of the plain checkpoint, with the class that reads it.

    Raises:
        UserError: a field is out of bounds, or transformers has no language model of the kind.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    facts = json.loads(config.to_json_string())
    facts.pop("_name_or_path", None)
    found = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}.get(config.model_type)
    if found is None:
        raise UserError(f"{path}: expected a language model, got {config.model_type}; {_AGAIN}")
    check_fields(facts, str(path))
    check_layers(facts, num_tensors, str(path))
    return {**facts, "architectures": facts.get("architectures") or [found]}


def _empty_model(config: "PreTrainedConfig", facts: Mapping[str, Any], path: Path) -> "PreTrainedModel":
    """Return the model without memory, for the names and shapes of its parameters."""
    import transformers

    open_config(facts, str(path))
    with library_errors(path, "transformers cannot build this model", _AGAIN), torch.device("meta"):
        return getattr(transformers, facts["architectures"][0])(config)


def _rules() -> Any:
    """Return the module of transformers that knows how llama.cpp names and orders tensors."""
    from transformers import modeling_gguf_pytorch_utils

    return modeling_gguf_pytorch_utils


def _processor(header: GgufHeader, config: "PreTrainedConfig") -> Any:
    """Return what undoes the order in which llama.cpp keeps the tensors of an architecture."""
    kind = _rules().TENSOR_PROCESSORS.get(header.fields["general.architecture"], _rules().TensorProcessor)
    return kind(config=config.to_dict())


def _dtype(header: GgufHeader) -> tuple[torch.dtype, str]:
    """Return the dtype of the plain checkpoint, and the types of the file's matrices: most frequent first."""
    import gguf

    kinds: dict[int, int] = {}
    for tensor in header.tensors:
        if len(tensor.shape) > 1:
            kinds[tensor.kind] = kinds.get(tensor.kind, 0) + 1
    ordered = sorted(kinds, key=lambda kind: -kinds[kind]) or [0]
    names = ", ".join(gguf.GGMLQuantizationType(kind).name for kind in ordered)
    return (_FLOATS[ordered[0]] if {*ordered} <= _FLOATS.keys() else torch.bfloat16), names


def _tensors(
    path: Path,
    header: GgufHeader,
    model: "PreTrainedModel",
    processor: Any,
    names: Mapping[str, str],
    experts: Experts,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the plain checkpoint. Some processors join several of the file into one: it is yielded when it is whole."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    sources = Counter(names.values())
    joined: dict[str, Tensor] = {}
    done: set[str] = set()
    for tensor in header.tensors:
        numbers = _numbers(path, tensor)
        parameter = names.get(tensor.name.removesuffix(".weight"), "")
        sources[parameter] -= 1
        where = f"{path}: {tensor.name}"
        if tensor.name in experts.names:
            _check_shape(where, parameter, experts.shape(tensor.name, expected[parameter]), numbers.shape)
            whole = {name: torch.from_numpy(weight) for name, weight in experts.apart(tensor.name, numbers)}
            done |= {parameter} if sources[parameter] == 0 else set()
        else:
            with library_errors(where, "transformers cannot put it in order", _AGAIN):
                found = processor.process(
                    weights=numbers, name=tensor.name, tensor_key_mapping=names, parsed_parameters={"tensors": joined}
                )
            whole = {name: joined.pop(name) for name in [*joined] if sources[name] <= 0}
            if found.name in names:
                whole[names[found.name]] = torch.from_numpy(np.ascontiguousarray(found.weights))
        for name, values in whole.items():
            _check_shape(where, name, expected.get(name, tuple(values.shape)), tuple(values.shape))
            kept = values.to(dtype)
            check_finite(where, kept)
            done.add(name)
            yield name, kept
    absent = [name for name, _ in model.named_parameters() if name not in done]
    if absent:
        raise UserError(f"{path}: expected every weight of the model, got none for {listed(absent)}; {_AGAIN}")


def _check_shape(where: str, name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape than its parameter, or its part of one."""
    if found != expected:
        raise UserError(f"{where}: expected the shape {expected} of {name}, got {found}; {_AGAIN}")


def _numbers(path: Path, tensor: GgufTensor) -> Any:
    """Return a tensor of the file in float32."""
    import gguf

    kind = gguf.GGMLQuantizationType(tensor.kind)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    shape = tensor.shape or (1,)
    data = np.memmap(path, np.uint8, "r", tensor.start, (tensor.end - tensor.start,))
    try:
        return gguf.dequantize(data.reshape(*shape[:-1], shape[-1] // elements * size), kind).astype(np.float32)
    except NotImplementedError as error:
        raise UserError(
            f"{path}: {tensor.name}: expected a type that the gguf package decodes, got {kind.name}; {_AGAIN}"
        ) from error


def _write_tokenizer(path: Path, directory: Path) -> None:
    from transformers import AutoTokenizer

    with library_errors(path, "transformers does not read its tokenizer", _AGAIN), quiet(), _alone(path) as alone:
        found = AutoTokenizer.from_pretrained(
            alone, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
        found.save_pretrained(directory)
