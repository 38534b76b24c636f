"""Small checkpoints of four sites without a model behind them, and a fold that halves their K and V."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from grades import assert_bitwise
from safetensors.torch import save_file
from torch import Tensor

from headfold.checkpoint import staging
from headfold.checkpoint.reader import Checkpoint
from headfold.checkpoint.writer import rewrite
from headfold.core.errors import UserError

NUM_SITES = 4
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHARDS = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {"embed.weight": torch.randn(11, 8).to(dtype), "mask.bias": torch.ones(2, 3, dtype=torch.bool)}
    for site in range(NUM_SITES):
        tensors |= {f"layers.{site}.{role}.weight": torch.randn(8, 8).to(dtype) for role in "kov"}
        tensors[f"layers.{site}.norm.weight"] = torch.randn(8).to(dtype)
    return tensors | {"position_ids": torch.arange(5)}


def save(path: Path, tensors: Mapping[str, Tensor], shard_of: Callable[[str], str] | None) -> Path:
    """A checkpoint as transformers lays it out: single without `shard_of`, else with an index."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    if shard_of is None:
        save_file(dict(tensors), path / "model.safetensors", {"format": "pt"})
        return path
    for shard in {shard_of(name) for name in tensors}:
        save_file(
            {n: t for n, t in tensors.items() if shard_of(n) == shard}, path / shard, {"format": "pt", "shard": shard}
        )
    metadata = {"total_size": sum(t.nbytes for t in tensors.values()), "total_parameters": 1000, "note": "kept"}
    index = {"metadata": metadata, "weight_map": {name: shard_of(name) for name in sorted(tensors)}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def straddling(name: str) -> str:
    """Every site has its K in the first, its V in the last shard; the rest lies between."""
    return SHARDS[{"k": 0, "v": 2}.get(name.rpartition(".")[0][-1:], 1)]


def by_layer(name: str) -> str:
    return SHARDS[int(name.split(".")[1]) % 3] if name.startswith("layers") else SHARDS[0]


LAYOUTS = {"single": None, "sharded": by_layer, "straddling": straddling}


class Fold:
    """Every site's K and V halved by a mean over neighbouring rows; counts the calls."""

    def __init__(self, source: Checkpoint, fail_at: int | None = None) -> None:
        self.source, self.fail_at, self.calls = source, fail_at, []
        names = [f"layers.{site}.{role}.weight" for site in range(NUM_SITES) for role in "kv"]
        self.shapes = {name: (4, 8) for name in names}
        self.owner = {name: name.rpartition(".")[0].rpartition(".")[0] for name in names}

    def produce(self, site: str) -> dict[str, Tensor]:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(site)
        return {
            f"{site}.{role}.weight": self.source.read(f"{site}.{role}.weight").view(4, 2, 8).mean(1) for role in "kv"
        }

    def write(self, target: Path, progress: Callable[[int], None] = lambda count: None) -> None:
        rewrite(self.source, target, self.shapes, self.owner, self.produce, progress)


def contents(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.iterdir() if entry.name != staging.JOB}


def same(a: Tensor, b: Tensor) -> None:
    """Bitwise, scalars and empty tensors included."""
    assert a.shape == b.shape
    assert_bitwise(a.reshape(-1), b.reshape(-1))


def cut(keep: Callable[[int], int]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        data = (path / SHARDS[0]).read_bytes()
        (path / SHARDS[0]).write_bytes(data[: keep(len(data))])

    return apply


def spoil_header(file: Path, change: Callable[[dict], object]) -> None:
    """Change the header of a safetensors file, and nothing of its data."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def one_line(error: pytest.ExceptionInfo[UserError], *words: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message
