"""Measure what one layer of a large model costs a fold: seconds by stage and peak memory, extrapolated to the whole model.

    python benchmarks/layers.py --work DIR [--shapes 7b,13b] [--layers 1,2] [--tokens 16384] [--context 1024]

Writes Llama-2-shaped checkpoints of random weights with that many layers and folds each to 8 K/V heads with the default method. A layer
costs the difference between the two; the model costs the smaller one and that difference for each further layer. `--shapes 1b --context
32768` shows what long windows take. Results go to benchmarks/results/layers.json.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from machine import describe
from real import command
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

RESULTS = Path(__file__).parent / "results"
BUNDLED = Path(__file__).parents[1] / "headfold" / "bundled"
SHAPES = {
    "1b": (2048, 32, 5632, 22), "7b": (4096, 32, 11008, 32), "13b": (5120, 40, 13824, 40), "70b": (8192, 64, 28672, 80),
}  # fmt: skip
"""Hidden size, heads, hidden size of the MLP, and layers of the real model."""
VOCABULARY = 32000


def write_model(folder: Path, shape: str, layers: int, context: int) -> None:
    """Write a checkpoint of random weights in bfloat16, a file per layer, with the tokenizer of the bundled model."""
    hidden, heads, inner, _ = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=heads, intermediate_size=inner,
        num_hidden_layers=layers, vocab_size=VOCABULARY, max_position_embeddings=context, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    shutil.rmtree(folder, ignore_errors=True)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * 0.02).bfloat16()

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    places: dict[str, str] = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(tensors, name))

    save("outside.safetensors", {
        "model.embed_tokens.weight": normal(VOCABULARY, hidden), "lm_head.weight": normal(VOCABULARY, hidden), "model.norm.weight": ones,
    })  # fmt: skip
    for layer in range(layers):
        at = f"model.layers.{layer}"
        save(f"layer-{layer}.safetensors", {
            **{f"{at}.self_attn.{role}_proj.weight": normal(hidden, hidden) for role in "qkvo"},
            **{f"{at}.mlp.{role}_proj.weight": normal(inner, hidden) for role in ("gate", "up")},
            f"{at}.mlp.down_proj.weight": normal(hidden, inner),
            f"{at}.input_layernorm.weight": ones.clone(), f"{at}.post_attention_layernorm.weight": ones.clone(),
        })  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("--work", type=Path, required=True, help="folder of checkpoints, some GB")
    reader.add_argument("--shapes", default="7b,13b")
    reader.add_argument("--layers", default="1,2", help="two numbers of layers")
    reader.add_argument("--tokens", type=int, default=16384, help="calibration tokens")
    reader.add_argument("--context", type=int, default=1024, help="length of calibration windows")
    options = reader.parse_args()
    few, more = map(int, options.layers.split(","))
    out = RESULTS / "layers.json"
    table: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": []}
    for shape in options.shapes.split(","):
        runs: dict[int, Any] = {}
        for layers in (few, more):
            source, made = options.work / f"{shape}-{layers}", options.work / "folded"
            write_model(source, shape, layers, max(4096, options.context))
            shutil.rmtree(made, ignore_errors=True)
            sizes = ("--tokens", str(options.tokens), "--context", str(options.context))
            data = ("--calibration", str(BUNDLED / "heldout.txt"), *sizes)
            found, seconds, memory = command("fold", source, made, "--kv-heads", "8", *data)
            runs[layers] = {"seconds": seconds, "stages": found["seconds"], "peak_bytes": memory}
            for folder in (source, made):
                shutil.rmtree(folder)
        whole = SHAPES[shape][3]
        a_layer = (runs[more]["seconds"] - runs[few]["seconds"]) / (more - few)
        stages = {
            stage: (runs[more]["stages"][stage] - runs[few]["stages"][stage]) / (more - few)
            for stage in runs[few]["stages"]
        }
        row = {
            "shape": shape, "tokens": options.tokens, "context": options.context, "seconds_per_layer": round(a_layer, 1),
            "stages_per_layer": {stage: round(seconds, 1) for stage, seconds in stages.items()},
            "peak_bytes": runs[more]["peak_bytes"], "layers": whole,
            "extrapolated_seconds": round(runs[few]["seconds"] + (whole - few) * a_layer), "runs": runs,
        }  # fmt: skip
        others = [
            other for other in table["rows"] if (other["shape"], other.get("context", 1024)) != (shape, options.context)
        ]
        table = {"machine": describe(), "rows": [*others, row]}
        out.write_text(json.dumps(table, indent=1) + "\n")
        print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
