"""The weights of a source as a stream: tensors of a plain checkpoint, one at a time, and what goes beside them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    """What a source holds, under the names of the plain checkpoint that is made of it."""

    config: dict[str, Any]
    """The config of the plain checkpoint."""
    names: tuple[str, ...]
    """Names of the tensors."""
    num_bytes: int
    """Bytes of all tensors, at most."""
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    """Yields each tensor with its name, decoded, in the order in which the source holds them."""
    beside: Path | None
    """The directory of tokenizer, generation config and other files that go along."""
    origin: str
    """What the source is, with its precision, in a few words."""
    quantised: bool
    """Whether quantisation had rounded the weights before."""
    write_tokenizer: Callable[[Path], None] | None = None
    """Writes the tokenizer into a directory, where no file beside the weights holds it."""


def plain_dtype(config: dict[str, Any], otherwise: torch.dtype) -> torch.dtype:
    """Return the dtype of weights that were packed: the one that the config names, if it is one that weights are written in."""
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(named, otherwise)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as configs write it."""
    return str(dtype).removeprefix("torch.")
