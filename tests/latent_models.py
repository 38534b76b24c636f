"""Tiny Llamas that are MLA models in disguise, and statistics of tiny models."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import stock_model, tiny_checkpoint, tiny_sites, tiny_tokens

from headfold.calibration import collect
from headfold.checkpoint.reader import Checkpoint
from headfold.stats_file import write_stats

RANK, ROTARY_DIM = 6, 4


def disguised(directory: Path, dtype: torch.dtype, **overrides: object) -> Path:
    """A Llama whose V has `RANK` directions over all heads, and whose keys rotate in the two fastest of four planes alone, where they are
    complex multiples of one functional.
    """
    shutil.copytree(tiny_checkpoint("llama", torch.float64, **overrides), directory)
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name in [name for name in tensors if name.endswith("k_proj.weight")]:
        keys = tensors[name].unflatten(0, (-1, 2, 4))
        shared = torch.complex(*keys[0, :, :2])
        factors = torch.randn(len(keys), 2, dtype=torch.complex128, generator=generator)
        turned = factors[..., None] * shared
        keys = torch.zeros_like(keys)
        keys[:, 0, :2], keys[:, 1, :2] = turned.real, turned.imag
        tensors[name] = keys.flatten(0, 2)
        values = name.replace("k_proj", "v_proj")
        up = torch.randn(len(tensors[values]), RANK, dtype=torch.float64, generator=generator)
        tensors[values] = up @ tensors[values][:RANK] / RANK**0.5
    save_file(
        {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    return directory


def statistics(source: Path, path: Path) -> Path:
    """Statistics of a checkpoint on random tokens."""
    sites = [site for site, _ in tiny_sites(source)]
    seen = collect(stock_model(source, torch.float32), sites, {"input_ids": tiny_tokens(16, seed=1)})
    write_stats(path, seen, {"model": Checkpoint.open(source).fingerprint(), "source": "random tokens"})
    return path
