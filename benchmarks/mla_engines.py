"""Run a fold to MLA in the engines that have kernels for it, and compare what they say with transformers.

    python benchmarks/mla_engines.py MODEL --engine vllm=PYTHON --engine llama-cpp=PYTHON

Makes a random Llama with the tokenizer of MODEL, as few small models cache more than the kernels take, and folds it to a latent of 512 and
a rotary key of 64. Each engine is run by its driver in `headfold/serving/drivers`, with a Python that has it: vLLM on the directory,
without compilation, llama.cpp on what headfold exports. Results go to benchmarks/results/mla-engines.json. Takes a few minutes.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from machine import describe
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import headfold
from headfold.checkpoint.reader import Checkpoint
from headfold.serving.ask import Refusal, ask, installed
from headfold.serving.engine import engine_named
from headfold.serving.expected import expected
from headfold.serving.likeness import likeness

RESULT = Path(__file__).parent / "results" / "mla-engines.json"
TEXT = Path(headfold.__file__).parent / "bundled" / "heldout.txt"
RANK, ROTARY_DIM = 512, 64
NUM_TOKENS, NEW_TOKENS = 120, 32
FIELDS: dict[str, Any] = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8,
    head_dim=64, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True)  # fmt: skip


def random_model(tokenizer: str, directory: Path) -> None:
    """Write a Llama whose attention looks at some tokens more than at others, with a tokenizer."""
    read, generator = AutoTokenizer.from_pretrained(tokenizer), torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(read), **FIELDS))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 2:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
                tensor.mul_(0.2 if "embed" in name else tensor.shape[1] ** -0.5)
    model.save_pretrained(directory)
    read.save_pretrained(directory)


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("model", help="a checkpoint whose tokenizer is taken")
    reader.add_argument("--engine", action="append", required=True, metavar="NAME=PYTHON")
    asked = reader.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        source, fold, file = (Path(folder) / name for name in ("source", "fold", "fold.gguf"))
        random_model(asked.model, source)
        headfold.fold(
            source,
            fold,
            to="mla",
            kv_rank=RANK,
            rope_dim=ROTARY_DIM,
            refit=False,
            tokens=4096,
            context=128,
            calibration="self",
        )
        headfold.export(fold, file, layout="gguf", quantise="f32")
        wanted = expected(Checkpoint.open(fold), TEXT, NUM_TOKENS, NEW_TOKENS)
        for word in asked.engine:
            name, _, python = word.partition("=")
            found = installed(engine_named(name), Path(python))
            answer = ask(found, file if found.engine.reads == "gguf" else fold, wanted.request)
            if isinstance(answer, Refusal):
                raise SystemExit(f"{name}: {answer.reason}")
            row = asdict(likeness(answer, wanted)) | {"is_same": likeness(answer, wanted).is_same}
            rows[name] = row | {"version": found.version, "kv_bytes_per_token": answer.kv_bytes_per_token}
            print(name, json.dumps(rows[name]), flush=True)
    layers = FIELDS["num_hidden_layers"]
    settings = {
        "fields": FIELDS,
        "rank": RANK,
        "rotary_dim": ROTARY_DIM,
        "tokens": NUM_TOKENS,
        "new_tokens": NEW_TOKENS,
        "tokenizer": Path(asked.model).name,
        "seed": 0,
    }
    latents = {"kv_bytes_per_token": layers * (RANK + ROTARY_DIM) * 4, "dtype": "float32"}
    RESULT.write_text(
        json.dumps({"machine": describe(), "settings": settings, "fold": latents, "engines": rows}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
