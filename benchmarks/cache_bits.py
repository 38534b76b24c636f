"""Measure folds with a quantised KV cache: loss by K/V heads and bits, and whether rotating K and V helps.

    python benchmarks/cache_bits.py MODEL FOLD … --name NAME --text FILE --other FILE --work DIR [--python PYTHON]
        [--windows 2] [--context 512] [--choices]

MODEL and its FOLDs are read, 32 tokens after 32 tokens, with the `QuantizedCache` of transformers: HQQ, 64 numbers of a
head in a group with a scale and an offset, and the last 32 tokens not quantised. The same tokens one by one would give the same losses. It
runs in an environment that has `hqq`. With PYTHON, which has `llama-cpp-py-sync`, they are run in llama.cpp too, with a cache in
q8_0 and q4_0. "rotated" is a model after `headfold fold --quantised-cache` with all its heads, calibrated on the text OTHER. With
`--choices` other transformations that change no output are measured at 4 bits. Loss and divergence (KL) are in nats per token, from
MODEL without quantisation. Weights are computed with in float32.
Results go to benchmarks/results/cache-bits-NAME.json after each row, so an interrupted run resumes.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engines import RESULTS
from machine import describe
from quantised import divided, measured
from quantised_choices import Layer, balanced_planes, balanced_values, layers, second_moments, spread_values
from transformers import QuantizedCache

import headfold

STEP, GROUP, TOKENS = 32, 64, 4096
"""Tokens that are read at once, numbers that share a scale, and calibration tokens of the rotation."""
BITS = (16, 8, 4, 2)
ENGINE_CACHES = {8: "q8_0", 4: "q4_0"}
BITS_PER_NUMBER = {"transformers": lambda bits: bits + 32 / GROUP, "llama.cpp": lambda bits: bits + 16 / 32}
"""With what a group keeps beside its numbers: a scale and an offset of 16 bits, or a scale for 32."""
CHOICES: dict[str, Callable[[Layer], Layer]] = {
    "rotary planes balanced": balanced_planes, "dims of V balanced": balanced_values, "V turned by a Hadamard matrix": spread_values,
}  # fmt: skip


@torch.no_grad()
def logits_of(model: Any, windows: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the logits of all windows, the cache quantised to so many bits; with 16 it is not."""
    if bits == 16:
        return model(windows).logits
    cache = QuantizedCache(
        "hqq", model.config, nbits=bits, axis_key=1, axis_value=1, q_group_size=GROUP, residual_length=STEP
    )
    return torch.cat([model(part, past_key_values=cache).logits for part in windows.split(STEP, 1)], 1)


def compared(logits: torch.Tensor, window: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Return the mean loss of a window, and the mean divergence from the reference."""
    losses, divergences = [], []
    for start in range(0, len(window), 256):  # as doubles, all would take gigabytes
        part = slice(start, start + 256)
        ours, theirs = (one[part].double().log_softmax(-1) for one in (logits, reference))
        divergences.append((theirs.exp() * (theirs - ours)).sum(-1))
        following = window[start + 1 : start + 257, None]
        losses.append(-ours[: len(following)].gather(-1, following)[:, 0])
    return float(torch.cat(losses).mean()), float(torch.cat(divergences).mean())


def rotated(directory: Path, other: Path, work: Path) -> Path:
    """Return the model with K and V rotated, made once."""
    out = work / f"{directory.name}-rotated"
    if not out.exists():
        headfold.fold(
            directory, out, kv_heads="1/1", quantised_cache=True, calibration=str(other), tokens=TOKENS, verify=False
        )
    return out


def transformed(directory: Path, choice: Callable[[Layer], Layer], other: torch.Tensor) -> Any:
    """Return the model with other weights of the same function."""
    model = headfold.load(directory, dtype=torch.float32)
    tensors, moments = model.state_dict(), second_moments(model, other)
    for names, layer in layers(tensors, moments, model.config.head_dim):
        for role, heads in choice(layer).items():
            if role in names:
                matrix = heads.flatten(0, 1)
                tensors[names[role]].copy_(matrix.T if role == "o" else matrix)
    return model


class Rows:
    """The rows of a result file."""

    def __init__(self, file: Path, facts: dict[str, Any]) -> None:
        self.file, self.facts = file, facts
        self.rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []

    def lacks(self, key: dict[str, Any]) -> bool:
        """Return whether a row is still to be measured."""
        return not any(key.items() <= row.items() for row in self.rows)

    def add(self, key: dict[str, Any], bytes_per_token: float, losses: list[tuple[float, float]]) -> None:
        """Write a row of the means over windows of loss and divergence."""
        nll, kl = (sum(column) / len(losses) for column in zip(*losses, strict=True))
        self.rows.append({**key, "bytes_per_token": bytes_per_token, "nll": nll, "kl": kl})
        print(self.rows[-1], flush=True)
        self.file.write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1) + "\n")


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("directories", type=Path, nargs="+")
    for name in ("name", "text", "other", "work"):
        reader.add_argument(f"--{name}", type=str if name == "name" else Path, required=True)
    reader.add_argument("--python")
    reader.add_argument("--windows", type=int, default=2)
    reader.add_argument("--context", type=int, default=512)
    reader.add_argument("--choices", action="store_true")
    options = reader.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    settings = {
        "machine": describe(), "windows": options.windows, "context": options.context, "step": STEP, "group": GROUP,
        "text": options.text.name, "other": options.other.name,
    }  # fmt: skip
    rows = Rows(RESULTS / f"cache-bits-{options.name}.json", settings)
    original = options.directories[0]
    windows = divided(original, options.text, options.windows, options.context)
    reference = logits_of(headfold.load(original, dtype=torch.float32), windows, 16)

    def measure(model: Any, key: dict[str, Any], numbers: int) -> None:
        if rows.lacks(key):
            found = logits_of(model, windows, key["bits"])
            losses = [compared(*one) for one in zip(found, windows, reference, strict=True)]
            per_number = 16 if key["bits"] == 16 else BITS_PER_NUMBER["transformers"](key["bits"])
            rows.add(key, numbers * per_number / 8, losses)

    for directory in options.directories:
        for choice, path in (("as it is", directory), ("rotated", rotated(directory, options.other, options.work))):
            model = headfold.load(path, dtype=torch.float32)
            config = model.config
            of_model = {"kv_heads": config.num_key_value_heads, "choice": choice}
            numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
            for bits in BITS:
                measure(model, {"engine": "transformers", **of_model, "bits": bits}, numbers)
            file = options.work / f"{path.name}.gguf"
            for bits, name in ENGINE_CACHES.items() if options.python else ():
                key = {"engine": "llama.cpp", **of_model, "bits": bits}
                if rows.lacks(key):
                    if not file.exists():
                        headfold.export(path, file, layout="gguf", quantise="f32")
                    found = measured(options.python, file, windows, [*reference], {"cache": [name, name]})
                    rows.add(key, numbers * BITS_PER_NUMBER["llama.cpp"](bits) / 8, [found])
        for choice, chosen in CHOICES.items() if options.choices else ():
            key = {"engine": "transformers", **of_model, "choice": choice, "bits": 4}
            if rows.lacks(key):
                others = divided(original, options.other, 4, options.context)
                measure(transformed(directory, chosen, others), key, numbers)


if __name__ == "__main__":
    main()
