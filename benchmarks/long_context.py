"""Measure how attention and retrieval of folds change along the context: entropy by position, passkeys, lookups in a list.

    python benchmarks/long_context.py ORIGINAL [NAME=FOLD …] --name NAME --text FILE [--lengths 1024,2048,4096,8000] [--windows 2]

Entropies, in nats, are means over windows of 1,024 and 4,096 tokens of the text, over all query heads, by quarter of the window: of all
layers, and of their last third. Retrieval is that of `retrieval.py`. Results go to benchmarks/results/NAME-long-context.json after
each model, so an interrupted run resumes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from machine import describe
from retrieval import DEVICE, LENGTHS, lookups, named_passkeys, passkeys
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
CONTEXTS = (1024, 4096)


@torch.no_grad()
def entropies(made: Path, text: str, context: int, num_windows: int) -> dict[str, list[float]]:
    """Return the mean entropy of attention by quarter of the window: of all layers and of their last third."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(
        made, dtype=torch.float32, attn_implementation="eager", trust_remote_code=True
    )
    model.eval().to(DEVICE)
    ids = AutoTokenizer.from_pretrained(made)(text, verbose=False)["input_ids"]
    step = len(ids) // num_windows
    layers: list[list[Tensor]] = []

    def add(found: list[Tensor]) -> Any:
        def see(module: Any, inputs: Any, output: Any) -> None:
            # Query heads that only fill a group up are zero, and attend evenly.
            read = module.q_proj.weight.unflatten(0, (output[1].shape[1], -1)).flatten(1).any(-1)
            found.append(torch.special.entr(output[1][:, read].float()).sum(-1).mean((0, 1)).cpu())

        return see

    for layer in model.base_model.layers:
        layers.append([])
        layer.self_attn.register_forward_hook(add(layers[-1]))
    for number in range(num_windows):
        model.base_model(torch.tensor([ids[number * step : number * step + context]], device=DEVICE), use_cache=False)
    by_position = torch.stack([torch.stack(found).mean(0) for found in layers])  # layer, position
    late = by_position[-(len(layers) // 3) :]
    return {
        name: [round(float(part.mean()), 4) for part in some.mean(0).chunk(4)]
        for name, some in (("all", by_position), ("last third", late))
    }


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("original", type=Path)
    reader.add_argument("folds", nargs="*", help="NAME=DIRECTORY")
    reader.add_argument("--name", required=True, help="the model's name in results")
    reader.add_argument("--text", type=Path, required=True, help="text of the windows")
    reader.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens around what is retrieved")
    reader.add_argument("--windows", type=int, default=2, help="windows of each length")
    options = reader.parse_args()
    out = RESULTS / f"{options.name}-long-context.json"
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    lengths = tuple(map(int, options.lengths.split(",")))
    models = [("original", options.original), *((name, Path(place)) for name, _, place in map(_parted, options.folds))]
    settings = {"text": options.text.name, "windows": options.windows, "lengths": lengths}
    for name, place in models:
        if any(row["model"] == name and row["settings"] == json.loads(json.dumps(settings)) for row in rows):
            continue
        text = options.text.read_text(encoding="utf-8")
        row = {
            "model": name, "settings": settings,
            "entropy": {str(context): entropies(place, text, context, options.windows) for context in CONTEXTS},
            "passkey": passkeys(place, lengths), "named passkeys": named_passkeys(place, text, lengths),
            "lookup": lookups(place, lengths),
        }  # fmt: skip
        print(row, flush=True)
        rows = [*(other for other in rows if other["model"] != name), row]
        out.write_text(json.dumps({"machine": describe(), "model": options.name, "rows": rows}, indent=1) + "\n")


def _parted(given: str) -> tuple[str, str, str]:
    return given.partition("=")


if __name__ == "__main__":
    main()
