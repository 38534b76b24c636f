"""What llama.cpp computes from a GGUF file of architecture llama or deci, in a few lines: read by the names and fields of the format."""

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor


class Gguf:
    """The fields and tensors of a file; quantised tensors are dequantised."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {
            tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).double()
            for tensor in reader.tensors
        }

    @property
    def architecture(self) -> str:
        return str(self.fields["general.architecture"])

    def field(self, name: str) -> Any:
        return self.fields[f"{self.architecture}.{name}"]

    def of_layer(self, name: str, layer: int) -> int:
        """A count that is one number, or a list with one per layer where the architecture reads it per layer."""
        found = self.field(name)
        assert isinstance(found, list) == (self.architecture == "deci"), "llama reads the number of layer 0 alone"
        return int(found[layer]) if isinstance(found, list) else int(found)

    def linear(self, name: str, x: Tensor) -> Tensor:
        out = x @ self.tensors[f"{name}.weight"].mT
        return out + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else out

    def norm(self, name: str, x: Tensor) -> Tensor:
        epsilon = self.field("attention.layer_norm_rms_epsilon")
        return x * (x.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt() * self.tensors[f"{name}.weight"]

    def rotated(self, x: Tensor) -> Tensor:
        """Neighbouring dims turned by position: x is (batch, head, position, dim)."""
        dim = self.field("rope.dimension_count")
        assert dim == x.shape[-1] == self.field("attention.key_length") == self.field("attention.value_length")
        frequencies = float(self.field("rope.freq_base")) ** -(torch.arange(0, dim, 2).double() / dim)
        if "rope_freqs.weight" in self.tensors:
            frequencies = frequencies / self.tensors["rope_freqs.weight"]
        factor = self.fields.get(f"{self.architecture}.rope.scaling.attn_factor", 1.0)
        angles = torch.outer(torch.arange(x.shape[-2]).double(), frequencies)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
            torch.full_like(angles, factor), angles
        )
        return torch.view_as_real(turned).flatten(-2)

    def attention(self, layer: int, x: Tensor) -> Tensor:
        block = f"blk.{layer}"
        heads, kv_heads = (self.of_layer(f"attention.{name}", layer) for name in ("head_count", "head_count_kv"))
        counts = {"q": heads, "k": kv_heads, "v": kv_heads}
        q, k, v = (
            self.linear(f"{block}.attn_{n}", x).unflatten(-1, (count, -1)).transpose(1, 2)
            for n, count in counts.items()
        )
        q, k = self.rotated(q), self.rotated(k)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        mask = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        return self.linear(
            f"{block}.attn_output", (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
        )

    def logits(self, ids: Tensor) -> Tensor:
        x = self.tensors["token_embd.weight"][ids]
        for layer in range(self.field("block_count")):
            block = f"blk.{layer}"
            x = x + self.attention(layer, self.norm(f"{block}.attn_norm", x))
            y = self.norm(f"{block}.ffn_norm", x)
            gated = torch.nn.functional.silu(self.linear(f"{block}.ffn_gate", y)) * self.linear(f"{block}.ffn_up", y)
            x = x + self.linear(f"{block}.ffn_down", gated)
        head = "output" if "output.weight" in self.tensors else "token_embd"
        return self.norm("output_norm", x) @ self.tensors[f"{head}.weight"].mT
