"""Write a described model as a GGUF file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..checkpoint.disk import replacing, require_space
from ..checkpoint.reader import Checkpoint
from ..llama_cpp.tokens import add_tokenizer
from .gguf_model import PURE, GgufTensor

if TYPE_CHECKING:
    import gguf

_FILE_TYPES = {
    "f32": "ALL_F32", PURE: "MOSTLY_Q4_0", **{name: f"MOSTLY_{name.upper()}" for name in ("bf16", "f16", "q8_0", "q4_0")},
}  # fmt: skip


@runtime_checkable
class Described(Protocol):
    """A model as llama.cpp reads it: what a file has beside the tokenizer."""

    @property
    def architecture(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def number_type(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def tensors(self) -> Sequence[GgufTensor]: ...

    def add_fields(self, writer: "gguf.GGUFWriter") -> None:
        """Write what the architecture has of its own."""


def write_file(model: Described, checkpoint: Checkpoint, path: Path, progress: Callable[[int, int], None]) -> None:
    """Write the file, one tensor at a time in memory; `progress` is told bytes done and in all."""
    import gguf

    total, done = sum(tensor.num_bytes for tensor in model.tensors), 0
    with replacing(path, total) as temporary:
        require_space(path.parent, total)
        writer = gguf.GGUFWriter(temporary, model.architecture)
        try:
            writer.add_type(gguf.GGUFType.MODEL)
            writer.add_name(model.name)
            writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[model.number_type]])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_vocab_size(model.vocab_size)
            model.add_fields(writer)
            add_tokenizer(writer, checkpoint.path, model.vocab_size)
            for tensor in model.tensors:
                tensor.announce(writer)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in model.tensors:
                writer.write_tensor_data(tensor.numbers(checkpoint))
                done += tensor.num_bytes
                progress(done, total)
        finally:
            writer.close()
