"""Write the small quantised weights that tests decode, with the formats' own libraries.

    python scripts/quantised_weights.py tests/quantised

Needs bitsandbytes and compressed-tensors (`pip install bitsandbytes compressed-tensors`), on a CPU. Each file holds the tensors of one
linear as a checkpoint has them, and beside them, as `expected`, what the library itself makes of them in float32; the quantisation
config is in the metadata.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor

SHAPE = 16, 64
NAME = "layers.0.proj"


def weight() -> Tensor:
    """Return a weight with a few large elements."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(SHAPE, generator=generator)
    return drawn * (1 + 4 * (torch.rand(SHAPE, generator=generator) > 0.97))


def save(out: Path, name: str, config: dict[str, Any], parts: dict[str, Tensor], expected: Tensor) -> None:
    tensors = {f"{NAME}{ending}": tensor.contiguous() for ending, tensor in parts.items()}
    metadata = {"quantization_config": json.dumps(config)}
    save_file({**tensors, "expected": expected.float().contiguous()}, out / f"{name}.safetensors", metadata)


def four_bits(out: Path, kind: str, nested: bool) -> None:
    packed, state = bnb.quantize_4bit(weight(), blocksize=64, quant_type=kind, compress_statistics=nested)
    parts = {f".weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    expected = bnb.dequantize_4bit(packed, state)
    save(out, f"bitsandbytes-{kind}{'-nested' if nested else ''}", config, {".weight": packed, **parts}, expected)


def eight_bits(out: Path) -> None:
    rows, scales, _ = bnb.int8_vectorwise_quant(weight().half())
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    parts = {".weight": rows, ".SCB": scales, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    save(out, "bitsandbytes-int8", config, parts, bnb.int8_vectorwise_dequant(rows, scales))


def compressed(out: Path, name: str, packing: str, **how: Any) -> None:
    arguments = QuantizationArgs(**how)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format=packing)
    groups = weight().reshape(SHAPE[0], -1, how.get("group_size") or SHAPE[1])
    if how["strategy"] == "tensor":
        least, most = weight().min().reshape(1), weight().max().reshape(1)
    else:
        least, most = groups.amin(-1), groups.amax(-1)
    scale, zero = calculate_qparams(least, most, arguments)
    state = {"weight": weight(), "weight_scale": scale, "weight_zero_point": zero}
    kind = BaseCompressor.get_value_from_registry(packing)
    parts = kind.compress(state, scheme)
    expected = kind.decompress(parts, scheme)["weight"]
    weights = {key: value for key, value in how.items() if value is not None}
    config = {
        "quant_method": "compressed-tensors",
        "format": packing,
        "config_groups": {"group_0": {"weights": weights}},
    }
    save(out, f"compressed-tensors-{name}", config, {f".{key}": value for key, value in parts.items()}, expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for kind in ("nf4", "fp4"):
        four_bits(out, kind, nested=False)
    four_bits(out, "nf4", nested=True)
    eight_bits(out)
    group = dict(type="int", strategy="group", group_size=32)
    compressed(out, "int4", "pack-quantized", num_bits=4, symmetric=True, **group)
    compressed(out, "int4-asymmetric", "pack-quantized", num_bits=4, symmetric=False, **group)
    compressed(out, "int8-packed", "pack-quantized", num_bits=8, symmetric=True, **group)
    compressed(out, "int8", "int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True)
    compressed(out, "float8", "float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True)
    compressed(out, "float8-tensor", "float-quantized", num_bits=8, type="float", strategy="tensor", symmetric=True)


if __name__ == "__main__":
    main()
