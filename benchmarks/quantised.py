"""Measure what quantising costs an original and its folds in llama.cpp: divergence from the unquantised model, and perplexity.

    python benchmarks/quantised.py DIRECTORY … --name NAME --python PYTHON --text FILE --work DIR [--windows 4] [--context 512]

Each directory is exported as f32, q8_0, q4_0 and q4_0-pure, and run by PYTHON, which has `llama-cpp-py-sync`. Divergence (KL, nats per
token) is from the float32 model in headfold's runtime, perplexity over the same windows.
Results go to benchmarks/results/quantised-NAME.json after each row.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from engines import RESULTS, said
from machine import describe
from transformers import AutoTokenizer

import headfold


def scored(logits: torch.Tensor, ids: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Return the mean loss of a window, and the mean divergence from the reference."""
    ours, theirs = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    nll = -theirs[:-1].gather(-1, ids[1:, None]).mean()
    return float(nll), float((ours.exp() * (ours - theirs)).sum(-1).mean())


def divided(directory: Path, text: Path, windows: int, context: int) -> torch.Tensor:
    """Return the first tokens of a text, in windows."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor(tokenizer(text.read_text()[: 8 * windows * context])["input_ids"])
    return ids[: windows * context].view(windows, context)


def measured(
    python: str, file: Path, windows: torch.Tensor, exact: list[torch.Tensor], also: Mapping[str, Any]
) -> tuple[float, float]:
    """Return the mean loss and divergence of a file in llama.cpp; `also` is added to the request."""
    losses = []
    for window, reference in zip(windows, exact, strict=True):
        answer = said("llama_cpp", python, file, {"tokens": window.tolist(), "new_tokens": 1, **also})
        if "refused" in answer:
            raise SystemExit(f"{file}: {answer['refused']}")
        losses.append(scored(answer["logits"], window, reference))
    nll, kl = (sum(column) / len(losses) for column in zip(*losses, strict=True))
    return nll, kl


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("directories", type=Path, nargs="+")
    reader.add_argument("--name", required=True)
    reader.add_argument("--python", required=True)
    reader.add_argument("--text", type=Path, required=True)
    reader.add_argument("--work", type=Path, required=True)
    reader.add_argument("--windows", type=int, default=4)
    reader.add_argument("--context", type=int, default=512)
    options = reader.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    out = RESULTS / f"quantised-{options.name}.json"
    rows: list[dict[str, Any]] = []
    for directory in options.directories:
        windows = divided(directory, options.text, options.windows, options.context)
        model = headfold.load(directory, dtype=torch.float32)
        with torch.no_grad():
            exact = [model(window[None]).logits[0] for window in windows]
        for number_type in ("f32", "q8_0", "q4_0", "q4_0-pure"):
            file = options.work / "quantised.gguf"
            headfold.export(directory, file, layout="gguf", quantise=number_type, force=True)
            nll, kl = measured(options.python, file, windows, exact, {})
            perplexity = float(torch.tensor(nll).exp())
            row = {
                "model": directory.name,
                "numbers": number_type,
                "bytes": file.stat().st_size,
                "kl": kl,
                "perplexity": perplexity,
            }
            rows.append(row)
            print(row, flush=True)
            written = {"machine": describe(), "windows": options.windows, "context": options.context, "rows": rows}
            out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
