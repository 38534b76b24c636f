"""Write a described model as a GGUF file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..checkpoint.disk import replacing, require_space
from ..checkpoint.reader import Checkpoint
from ..llama_cpp.tokens import add_tokenizer
from .gguf_model import GgufTensor

if TYPE_CHECKING:
    import gguf


@runtime_checkable
class Described(Protocol):
    """A model as llama.cpp reads it: what a file has beside the tokenizer."""

    @property
    def architecture(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def tensors(self) -> Sequence[GgufTensor]: ...

    def add_fields(self, writer: "gguf.GGUFWriter") -> None:
        """Write all fields but those of the tokenizer."""


def write_file(model: Described, checkpoint: Checkpoint, path: Path, progress: Callable[[int, int], None]) -> None:
    """Write the file, one tensor at a time in memory; `progress` is told bytes done and in all."""
    import gguf

    total, done = sum(tensor.num_bytes for tensor in model.tensors), 0
    with replacing(path, total) as temporary:
        require_space(path.parent, total)
        writer = gguf.GGUFWriter(temporary, model.architecture)
        try:
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
