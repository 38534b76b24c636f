"""What llama.cpp computes from a GGUF file, in a few lines: read by the names and fields of the format, by what its graphs do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Graph:
    """What the graph of an architecture does that another's does not."""

    pairs: bool = False
    layer_norm: bool = False
    parallel: bool = False
    """Whether the MLP reads what attention reads, through the same norm."""
    activation: str = "silu"
    gated: bool = True
    """Whether the MLP has a gate, in a tensor of its own or before `ffn_up` in one."""
    scales_embeddings: bool = False
    encodes: bool = False
    """Whether every token attends to all, and norms come after what is added."""
    rotates: bool = True
    alibi: bool = False
    tables: tuple[str, ...] = ()
    """Where factors of rotary frequencies are read."""


GRAPHS = {
    "llama": Graph(pairs=True, tables=("rope_freqs",)),
    "deci": Graph(pairs=True, tables=("rope_freqs",)),
    "granite": Graph(pairs=True, tables=("rope_freqs",)),
    "qwen3": Graph(),
    "gemma": Graph(activation="gelu", scales_embeddings=True),
    "phi2": Graph(layer_norm=True, parallel=True, activation="gelu", gated=False),
    "starcoder2": Graph(layer_norm=True, activation="gelu", gated=False),
    "stablelm": Graph(layer_norm=True),
    "olmo": Graph(pairs=True, layer_norm=True),
    "command-r": Graph(pairs=True, layer_norm=True, parallel=True),
    "nemotron": Graph(layer_norm=True, activation="relu2", gated=False),
    "phi3": Graph(tables=("rope_factors_long", "rope_factors_short")),
    "gptneox": Graph(layer_norm=True, activation="gelu", gated=False),
    "gpt2": Graph(layer_norm=True, activation="gelu", gated=False, rotates=False),
    "bert": Graph(layer_norm=True, activation="gelu", gated=False, rotates=False, encodes=True),
    "bloom": Graph(layer_norm=True, activation="gelu", gated=False, rotates=False, alibi=True),
}
ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: x.relu().square(),
}


def slopes(heads: int) -> Tensor:
    """Return the slope of every head: powers of two, and between them where the number of heads is no power of two."""
    power = 1 << heads.bit_length() - 1
    exponents = [8 * (head + 1) / power for head in range(power)]
    exponents += [4 * (2 * head + 1) / power for head in range(heads - power)]
    return 2.0 ** -torch.tensor(exponents, dtype=torch.float64)


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
        if self.graph.layer_norm:
            x = x - x.mean(-1, keepdim=True)
        epsilon = self.field(f"attention.layer_norm_{'' if self.graph.layer_norm else 'rms_'}epsilon")
        x = x * (x.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
        x = x * self.tensors[f"{name}.weight"] if f"{name}.weight" in self.tensors else x
        return x + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else x

    @property
    def graph(self) -> Graph:
        return GRAPHS[self.architecture]

    def scale(self, name: str, otherwise: float = 1.0) -> float:
        return float(self.fields.get(f"{self.architecture}.{name}", otherwise))

    def rotated(self, x: Tensor) -> Tensor:
        """Planes turned by position, of neighbouring dims or of two halves: x is (batch, head, position, dim)."""
        dim = self.field("rope.dimension_count")
        assert x.shape[-1] == self.field("attention.key_length") == self.field("attention.value_length")
        frequencies = float(self.field("rope.freq_base")) ** -(torch.arange(0, dim, 2).double() / dim)
        factors = [
            name
            for name in ("rope_freqs", "rope_factors_long", "rope_factors_short")
            if f"{name}.weight" in self.tensors
        ]
        assert factors in ([], list(self.graph.tables)), "the other graphs read no factors"
        for name in factors[:1]:
            frequencies = frequencies / self.tensors[f"{name}.weight"]
        angles = torch.outer(torch.arange(x.shape[-2]).double(), frequencies)
        turn = torch.polar(torch.full_like(angles, self.scale("rope.scaling.attn_factor")), angles)
        planes = x[..., :dim].unflatten(-1, (-1, 2)) if self.graph.pairs else x[..., :dim].unflatten(-1, (2, -1)).mT
        turned = torch.view_as_real(torch.view_as_complex(planes.contiguous()) * turn)
        turned = turned if self.graph.pairs else turned.mT
        return torch.cat([turned.flatten(-2), x[..., dim:]], -1)

    def attention(self, layer: int, x: Tensor) -> Tensor:
        block = f"blk.{layer}"
        heads, kv_heads = (self.of_layer(f"attention.{name}", layer) for name in ("head_count", "head_count_kv"))
        counts = {"q": heads, "k": kv_heads, "v": kv_heads}
        q, k, v = (
            projected.unflatten(-1, (counts[n], -1)).transpose(1, 2)
            for n, projected in self.projections(block, x, counts).items()
        )
        q, k = (
            self.norm(f"{block}.attn_{n}_norm", t) if f"{block}.attn_{n}_norm.weight" in self.tensors else t
            for n, t in (("q", q), ("k", k))
        )
        q, k = (self.rotated(q), self.rotated(k)) if self.graph.rotates else (q, k)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = (q @ k.mT) * self.scale("attention.scale", q.shape[-1] ** -0.5)
        if self.graph.alibi:
            scores = scores + slopes(heads)[:, None, None] * torch.arange(x.shape[1]).double()
        mask = torch.ones(x.shape[1], x.shape[1]).tril().bool() | self.graph.encodes
        return self.linear(
            f"{block}.attn_output", (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
        )

    def projections(self, block: str, x: Tensor, counts: dict[str, int]) -> dict[str, Tensor]:
        """Q, K and V, from one tensor where there is one: all of q, then k, then v."""
        if f"{block}.attn_qkv.weight" not in self.tensors:
            return {n: self.linear(f"{block}.attn_{n}", x) for n in counts}
        head_dim = self.field("attention.key_length")
        parts = self.linear(f"{block}.attn_qkv", x).split([count * head_dim for count in counts.values()], -1)
        return dict(zip(counts, parts, strict=True))

    def mlp(self, block: str, x: Tensor) -> Tensor:
        activate, up = ACTIVATIONS[self.graph.activation], self.linear(f"{block}.ffn_up", x)
        assert self.tensors[f"{block}.ffn_down.weight"].shape[1] == self.of_layer("feed_forward_length", int(block[4:]))
        if self.graph.gated and f"{block}.ffn_gate.weight" not in self.tensors:
            gate, up = up.chunk(2, -1)
            return self.linear(f"{block}.ffn_down", activate(gate) * up)
        return self.linear(
            f"{block}.ffn_down",
            activate(self.linear(f"{block}.ffn_gate", x)) * up if self.graph.gated else activate(up),
        )

    def vectors(self, ids: Tensor) -> Tensor:
        """What an encoder makes of tokens: (batch, token, model)."""
        assert self.graph.encodes and self.field("attention.causal") is False
        assert len(self.tensors["token_types.weight"]) == self.fields["tokenizer.ggml.token_type_count"]
        x = self.tensors["token_embd.weight"][ids] + self.tensors["token_types.weight"][0]
        x = self.norm("token_embd_norm", x + self.tensors["position_embd.weight"][: ids.shape[1]])
        for layer in range(self.field("block_count")):
            block = f"blk.{layer}"
            x = self.norm(f"{block}.attn_output_norm", x + self.attention(layer, x))
            x = self.norm(f"{block}.layer_output_norm", x + self.mlp(block, x))
        return x

    def logits(self, ids: Tensor) -> Tensor:
        assert not self.graph.encodes
        x = self.tensors["token_embd.weight"][ids] * self.scale("embedding_scale")
        x = x * x.shape[-1] ** 0.5 if self.graph.scales_embeddings else x
        if "position_embd.weight" in self.tensors:
            assert len(self.tensors["position_embd.weight"]) == self.field("context_length")
            x = x + self.tensors["position_embd.weight"][: ids.shape[1]]
        x = self.norm("token_embd_norm", x) if "token_embd_norm.weight" in self.tensors else x
        residual = self.scale("residual_scale")
        for layer in range(self.field("block_count")):
            block = f"blk.{layer}"
            normed = self.norm(f"{block}.attn_norm", x)
            if self.graph.parallel:
                x = x + self.attention(layer, normed) + self.mlp(block, normed)
                continue
            if self.fields.get(f"{self.architecture}.use_parallel_residual"):
                x = x + self.attention(layer, normed) + self.mlp(block, self.norm(f"{block}.ffn_norm", x))
                continue
            x = x + residual * self.attention(layer, normed)
            x = x + residual * self.mlp(block, self.norm(f"{block}.ffn_norm", x))
        head = "output" if "output.weight" in self.tensors else "token_embd"
        logits = self.linear(head, self.norm("output_norm", x))
        # Granite divides by its scale, Command R multiplies with it.
        scale = self.scale("logit_scale")
        return logits / scale if self.architecture == "granite" else logits * scale
