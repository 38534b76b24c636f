"""Compare the tokens per second of calibration with those of the model's forward pass without its output head, in turns within one run.

    python benchmarks/calibration_speed.py [MODEL] [--rounds 5]

Measured on MODEL, if given, and on a random Llama with the layers of a 7B model (hidden 4096, 32 heads), two of them, in the
dtype that headfold computes in here. Writes benchmarks/results/calibration_speed.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe
from transformers import LlamaConfig, LlamaForCausalLM

from headfold import calibration
from headfold.families import family_of
from headfold.families.spec import sites
from headfold.hf_models import compute_dtype, open_model

RESULTS = Path(__file__).parent / "results" / "calibration_speed.json"
SEED = 0


def seven_b_layers(num_layers: int) -> LlamaForCausalLM:
    """Return random layers of the shape of Llama-2-7B's, with a small vocabulary, as the output head is not measured."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=num_layers, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=1024, max_position_embeddings=4096,
    )  # fmt: skip
    dtype, _ = compute_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


def seconds(job: Callable[[], object]) -> float:
    """Return how long a job takes."""
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


@torch.no_grad()
def forward(model: LlamaForCausalLM, windows: torch.Tensor) -> None:
    """Run the model over the data as calibration does, without measuring."""
    for batch in calibration.batches({"input_ids": windows}):
        model.base_model(**batch, use_cache=False)


def compare(name: str, model: LlamaForCausalLM, context: int, num_tokens: int, rounds: int) -> dict:
    """Return medians of both, and of their ratio round by round."""
    config = model.config.to_dict()
    found = sites(family_of(config), config, dict(model.named_parameters()))
    generator = torch.Generator().manual_seed(SEED)
    windows = torch.randint(model.config.vocab_size, (num_tokens // context, context), generator=generator)
    forward(model, windows[:1])
    pairs = [
        (
            seconds(lambda: forward(model, windows)),
            seconds(lambda: calibration.collect(model, found, {"input_ids": windows})),
        )
        for _ in range(rounds)
    ]
    plain, calibrated = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    return {
        "model": name, "dtype": str(model.dtype), "context": context, "tokens": num_tokens, "rounds": rounds,
        "forward_tokens_per_second": round(num_tokens / plain, 1),
        "calibrate_tokens_per_second": round(num_tokens / calibrated, 1),
        "ratio": round(statistics.median(f / c for f, c in pairs), 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = []
    if options.model:
        model = open_model(options.model, dtype=torch.float32)
        rows.append(compare(Path(options.model).name, model, 256, 16_384, options.rounds))
    rows.append(compare("Llama-2-7B layers, 2 of them", seven_b_layers(2), 1024, 2048, 2))
    for row in rows:
        print(row)
    RESULTS.write_text(json.dumps({"machine": describe(), "seeds": [SEED], "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
