"""Measure which free choices of a fold make quantising cheaper: transformations of Q, K, V and O that leave its function as it is.

    python benchmarks/quantised_choices.py DIRECTORY … --python PYTHON --text FILE --other FILE --work DIR [--windows 4] [--context 512]

A row of weights has scales of its own in blocks of 32, so one scale of a row of K and its inverse on Q change nothing. What can matter:
angles of rotary planes (rows of K and Q mix), a matrix on V with its inverse on O (columns of O share scales), and in a quantised cache,
where the dims of a head share scales, the scales of planes and dims. The choices read second moments of the inputs on the text OTHER,
which an export does not have: what does not pay with them does not pay without. Each DIRECTORY is a checkpoint of a Llama with groups of
equal size and one shard. Divergence (KL, nats per token) is that of llama.cpp from the float32 model in headfold's runtime: with the whole
file quantised, with one projection alone in q4_0, and with one half of the cache in q4_0, with and without the rotation by a Hadamard
matrix that llama.cpp itself applies to such a cache where head_dim is a multiple of 64.
Results go to benchmarks/results/quantised-choices-DIRECTORY.json after each row.
"""

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from engines import RESULTS
from machine import describe
from quantised import divided, measured
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import headfold

Layer = dict[str, torch.Tensor]
"""One layer in float64: `q`, `k`, `v` (head, dim, hidden), `o` (head, dim, hidden) and the second moments of their inputs, `inputs`."""
ROLES, ANGLES = "qkvo", 16
NO_ROTATION = "LLAMA_ATTN_ROT_DISABLE"
WHOLE, K_CACHE, V_CACHE = ("q4_0", "q4_0-pure"), ("f32", "q4_0/f16"), ("f32", "f16/q4_0")


def rounded(matrix: torch.Tensor) -> torch.Tensor:
    """Return the numbers of rows as q4_0 holds them."""
    kind = gguf.GGMLQuantizationType.Q4_0
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(matrix.float().numpy(), kind), kind))


def summed(of_queries: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Return the sums over the queries of each K/V head."""
    return of_queries.unflatten(0, (len(layer["k"]), -1)).sum(1)


def shared(of_heads: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Return what each query head reads."""
    return of_heads.repeat_interleave(len(layer["q"]) // len(layer["k"]), 0)


def power(rows: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Return the mean square of what rows compute (head, dim)."""
    return torch.einsum("hdi,ij,hdj->hd", rows.double(), layer["inputs"], rows.double())


def of_planes(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over both dims of each rotary plane, at both."""
    return values.unflatten(1, (2, -1)).sum(1).repeat(1, 2)


def turned_planes(layer: Layer) -> Layer:
    """Turn each rotary plane of a K/V head and its queries by the angle for which q4_0 changes the attention logits least."""

    def turned(rows: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        first, second = rows.unflatten(1, (2, -1)).unbind(1)
        cos, sin = angle.cos()[..., None], angle.sin()[..., None]
        return torch.cat([cos * first - sin * second, sin * first + cos * second], 1)

    def error(rows: torch.Tensor) -> torch.Tensor:
        flat = rows.flatten(0, 1)
        return of_planes(power((rounded(flat) - flat).view(rows.shape), layer))

    q, k = layer["q"], layer["k"]
    q_power, k_power = of_planes(power(q, layer)), of_planes(power(k, layer))
    half = k.shape[1] // 2
    angles = torch.arange(ANGLES).double() * math.pi / 2 / ANGLES
    costs = []
    for angle in angles:
        q_error, k_error = (error(turned(rows, angle.expand(len(rows), half))) for rows in (q, k))
        costs.append(k_error * summed(q_power, layer) + summed(q_error, layer) * k_power)
    best = angles[torch.stack(costs).argmin(0)][:, :half]
    return {**layer, "q": turned(q, shared(best, layer)), "k": turned(k, best)}


def balanced_planes(layer: Layer) -> Layer:
    """Scale each rotary plane so that K and Q are of one size there."""
    q, k = (of_planes(power(layer[role], layer)) for role in "qk")
    scale = (summed(q, layer) / k)[..., None] ** 0.25
    return {**layer, "q": layer["q"] / shared(scale, layer), "k": layer["k"] * scale}


def balanced_values(layer: Layer) -> Layer:
    """Scale each dim of V so that it and its columns of O are of one size."""
    columns = summed(layer["o"].square().sum(-1), layer)
    scale = (columns / power(layer["v"], layer))[..., None] ** 0.25
    return {**layer, "v": layer["v"] * scale, "o": layer["o"] / shared(scale, layer)}


def spread_values(layer: Layer) -> Layer:
    """Turn V by a Hadamard matrix, which spreads outliers over all dims."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < layer["v"].shape[1]:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()) / math.sqrt(2)
    return {**layer, "v": matrix @ layer["v"], "o": matrix @ layer["o"]}


OF_VALUES = (("f32", "v"), ("f32", "o"), *((n, "") for n in WHOLE), V_CACHE)
CHOICES: dict[str, tuple[Callable[[Layer], Layer], tuple[tuple[str, str], ...]]] = {
    "as folded": (
        lambda layer: layer,
        (("f32", ""), ("f16", ""), *((n, "") for n in WHOLE), *(("f32", role) for role in ROLES), K_CACHE, V_CACHE),
    ),
    "rotary planes turned": (turned_planes, (("f32", "q"), ("f32", "k"), *((n, "") for n in WHOLE))),
    "rotary planes balanced": (balanced_planes, (K_CACHE,)),
    "dims of V balanced": (balanced_values, OF_VALUES),
    "V turned by a Hadamard matrix": (spread_values, OF_VALUES),
    "both": (lambda layer: spread_values(balanced_values(layer)), OF_VALUES),
}
"""What is chosen → how, and what is measured: numbers of the file, and the projection that alone is rounded to q4_0, or the cache (K/V)."""


def second_moments(model: torch.nn.Module, windows: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return the mean outer product of the inputs of each attention."""
    found: dict[int, torch.Tensor] = {}

    def seen(layer: int) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            rows = arguments[0].flatten(0, -2).double()
            found[layer] = found.get(layer, 0) + rows.T @ rows / windows.numel()

        return add

    hooks = [one.self_attn.q_proj.register_forward_pre_hook(seen(at)) for at, one in enumerate(model.model.layers)]
    with torch.no_grad():
        for window in windows:
            model(window[None])
    for hook in hooks:
        hook.remove()
    return found


def layers(
    tensors: dict[str, torch.Tensor], moments: dict[int, torch.Tensor], dim: int
) -> Iterator[tuple[dict[str, str], Layer]]:
    """Yield the names of the projections of each layer, and the layer."""
    for at, inputs in sorted(moments.items()):
        names = {role: f"model.layers.{at}.self_attn.{role}_proj.weight" for role in ROLES}
        rows = {role: tensors[name].double() for role, name in names.items()}
        rows["o"] = rows["o"].T
        yield names, {"inputs": inputs, **{role: matrix.unflatten(0, (-1, dim)) for role, matrix in rows.items()}}


def write(source: Path, out: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a checkpoint with other tensors, in float32."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(
        {name: t.float().contiguous() for name, t in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("directories", type=Path, nargs="+")
    for name in ("python", "text", "other", "work"):
        reader.add_argument(f"--{name}", type=str if name == "python" else Path, required=True)
    reader.add_argument("--windows", type=int, default=4)
    reader.add_argument("--context", type=int, default=512)
    options = reader.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for directory in options.directories:
        dim = AutoConfig.from_pretrained(directory).head_dim
        model = headfold.load(directory, dtype=torch.float32)
        windows = divided(directory, options.text, options.windows, options.context)
        moments = second_moments(model, divided(directory, options.other, options.windows, options.context))
        with torch.no_grad():
            exact = [model(window[None]).logits[0] for window in windows]
        original, rows = load_file(directory / "model.safetensors"), []
        for choice, (chosen, cases) in CHOICES.items():
            tensors = dict(original)
            for names, layer in layers(original, moments, dim):
                for role, heads in chosen(layer).items():
                    if role in names:
                        matrix = heads.flatten(0, 1)
                        tensors[names[role]] = matrix.T if role == "o" else matrix
            for numbers, part in cases:
                one = {
                    name: rounded(t) if f"{part}_proj" in name and part in ROLES and part else t
                    for name, t in tensors.items()
                }
                write(directory, options.work / "chosen", one)
                file = options.work / "chosen.gguf"
                headfold.export(options.work / "chosen", file, layout="gguf", quantise=numbers, force=True)
                cached = {"cache": part.split("/")} if "/" in part else {}
                for rotated in (True, False) if cached and dim % 64 == 0 else (True,):
                    os.environ.pop(NO_ROTATION, None)
                    os.environ |= {} if rotated else {NO_ROTATION: "1"}
                    nll, kl = measured(options.python, file, windows, exact, cached)
                    row: dict[str, Any] = {"choice": choice, "numbers": numbers, "part": part, "kl": kl, "nll": nll}
                    row |= {"rotated_by_engine": rotated and dim % 64 == 0} if cached else {}
                    rows.append(row)
                    print(row, flush=True)
                    found = {
                        "machine": describe(),
                        "windows": options.windows,
                        "context": options.context,
                        "rows": rows,
                    }
                    (RESULTS / f"quantised-choices-{directory.name}.json").write_text(
                        json.dumps(found, indent=1) + "\n"
                    )


if __name__ == "__main__":
    main()
