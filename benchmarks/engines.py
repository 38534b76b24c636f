"""Run folds in the engines that serve them, and compare what they say with headfold's runtime.

    python benchmarks/engines.py MODEL --work DIR --engine NAME=PYTHON … [--text FILE] [--layouts NAME,…]

Folds MODEL in every layout, gives each engine the same tokens, and compares its probabilities and greedy tokens. An engine is run by the
driver of its name in `headfold/serving/drivers`, with a Python that has that engine installed; `transformers-4.57=PYTHON` runs the
driver `transformers` and is listed by that name. `llama_cpp`, `ctranslate2`, `onnxruntime` and names that end in `-gguf` get what headfold
exports; a name that ends in `-headfold` builds the engine's model by the script in `headfold/serving/builders`, without that its own
builder does. `headfold check` does the same for one fold. Results go to benchmarks/results/engines-MODEL.json after each cell.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from machine import describe

import headfold

RESULTS, SERVING = Path(__file__).parent / "results", Path(headfold.__file__).parent / "serving"
DRIVERS, BUILDERS = SERVING / "drivers", SERVING / "builders"
EXPORTS = {
    "llama_cpp": ("gguf", ".gguf", ("--quantise", "f32")), "gguf": ("gguf", ".gguf", ("--quantise", "f32")),
    "ctranslate2": ("ct2", "-ct2", ()), "onnxruntime": ("onnx", "-onnx", ()),
}  # fmt: skip
"""Driver, or the end of an engine's name → what headfold exports for it: layout, end of the name, options."""
TEXT = Path(headfold.__file__).parent / "bundled" / "heldout.txt"
"""What engines continue, and divide into tokens."""
NUM_TOKENS, NEW_TOKENS = 240, 64
UNEQUAL, WIDE, BUDGET = ("--group", "swap:unequal=true"), ("--head-dim-multiple", "2"), ("--kv-budget", "40%")
TOYS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with llama3 frequencies": ("LlamaConfig", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "llama with yarn frequencies": ("LlamaConfig", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 64}}),
    "llama with linear frequencies": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama with biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma": ("GemmaConfig", {"head_dim": 64, "hidden_activation": "gelu_pytorch_tanh"}),
    "phi": ("PhiConfig", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.1, "embedding_multiplier": 3.0, "residual_multiplier": 0.7,
        "logits_scaling": 0.1}),
    "olmo": ("OlmoConfig", {}),
    "cohere": ("CohereConfig", {"logit_scale": 0.3}),
    "nemotron": ("NemotronConfig", {"partial_rotary_factor": 0.5}),
    "stablelm": ("StableLmConfig", {"use_qkv_bias": True}),
    "phi3": ("Phi3Config", {"partial_rotary_factor": 0.75}),
    "gpt_neox without parallel residual": ("GPTNeoXConfig", {"use_parallel_residual": False}),
    "gpt2": ("GPT2Config", {}),
    "bloom": ("BloomConfig", {}),
}  # fmt: skip
"""Random models of other architectures: config class and fields."""
FOLDS: dict[str, tuple[str, ...]] = {
    "original": (),
    "native": ("--kv-heads", "1/4"),
    "padded": ("--kv-heads", "1/2", *UNEQUAL),
    "per layer": BUDGET,
    "per layer as decilm": ("--layout", "decilm"),
    "unequal per layer": (*BUDGET, *UNEQUAL),
    "twice the head_dim": ("--kv-heads", "1/4", *WIDE),
    "twice the head_dim per layer": ("--kv-budget", "40%", *WIDE),
}
"""What is folded, by the options of `headfold fold`, or of `headfold plan` where there is a budget; with a layout, what is exported of
the fold named before "as"."""


def command(*words: object) -> str:
    """Run headfold, and return what it refuses."""
    done = subprocess.run([sys.executable, "-m", "headfold", *map(str, words)], capture_output=True, text=True)
    said = done.stderr.strip()[-400:]
    if done.returncode == 2 and words[0] == "export":
        return said.removeprefix("headfold: ").replace(str(words[1]), "FOLD")
    if done.returncode:
        raise SystemExit(f"headfold {' '.join(map(str, words))}: {said}")
    return ""


def toy(work: Path, name: str) -> Path:
    """Return a random model with the bundled tokenizer, made once."""
    out = work / "toys" / name.replace(" ", "-")
    if not out.exists():
        config_class, fields = TOYS[name]
        small = {
            "vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 8,
            "intermediate_size": 512, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
        }  # fmt: skip
        config = getattr(transformers, config_class)(**{**small, **fields})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() == 1 else 1.5 / parameter.shape[-1] ** 0.5)
        model.save_pretrained(out)
        for file in TEXT.parent.glob("tokenizer*"):
            shutil.copy(file, out)
    return out


def folded(model: Path, work: Path, name: str, text: str) -> Path:
    """Return a fold, made once."""
    if name == "original":
        return model
    out, how = work / name.replace(" ", "-"), FOLDS[name]
    if out.exists():
        return out
    if "--layout" in how:
        command("export", folded(model, work, name.partition(" as ")[0], text), out, *how)
        return out
    stats = work / "stats.safetensors"
    if not stats.exists():
        command("calibrate", model, stats, "--calibration", text, "--tokens", 16384)
    if "--kv-budget" in how:
        plan = work / f"{out.name}.json"
        command("plan", model, plan, *how, "--stats", stats, "--force")
        how = ("--plan", str(plan))
    command("fold", model, out, *how, "--stats", stats, "--no-refit")
    return out


@torch.no_grad()
def expected(fold: Path, tokens: list[int]) -> dict[str, Any]:
    """Return what headfold's runtime says in float32: logits of every position, greedy tokens after them, and the logits of these."""
    model = headfold.load(fold, dtype=torch.float32)
    ids = torch.tensor([tokens])
    model.generation_config.eos_token_id = None  # neither an end nor, as a minimum length makes it, impossible
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    logits = model(written[:, :-1]).logits[0].double()
    return {
        "logits": logits[: len(tokens)],
        "greedy": written[0, len(tokens) :].tolist(),
        "written_logits": logits[len(tokens) - 1 :],
    }


def said(driver: str, python: str, source: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Return what an engine says: logits, greedy tokens, the tokens of the text, or the seconds that were requested; or its refusal."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request))
        words = [python, str(DRIVERS / f"{driver}.py"), str(source), str(asked), str(answer)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=900)
        if done.returncode or not answer.exists():
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return {"refused": lines[-1].replace(str(source), "FOLD")[:300]}
        found, logits = json.loads(answer.read_text()), answer.with_suffix(".npy")
        return found | ({"logits": torch.from_numpy(np.load(logits)).double()} if logits.exists() else {})


def compared(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Return how far an engine is from headfold's runtime."""
    if "refused" in found:
        return found
    same = [a == b for a, b in zip(found["greedy"], wanted["greedy"], strict=True)]
    name, rows = "logits", len(wanted["logits"])
    if found.get("of_written"):  # as long as both have read the same
        name, rows = "written_logits", [*same, False].index(False) + 1
    ours = wanted[name][:rows].log_softmax(-1)
    theirs = found["logits"][: len(ours), : ours.shape[-1]].log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    row = {
        "version": found.get("version"),
        "kl": float(kl.mean()),
        "greatest_difference": float((ours - theirs).abs().max()),
        "same_greedy": sum(same),
    }
    if found.get("of_written"):
        row["compared"] = f"the next token after the text and after each of {len(ours) - 1} tokens written"
    if "cache" in found:
        row["cache"] = found["cache"]
    if "tokens" in found:
        row["same_tokens_of_text"] = found["tokens"] == wanted["tokens"]
    return row


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("model", type=Path, help="with --toys headfold/bundled, whose tokenizer they have")
    reader.add_argument("--work", type=Path, required=True, help="folder of the folds")
    reader.add_argument(
        "--engine", action="append", default=[], metavar="NAME=PYTHON", help="an engine's name and its Python"
    )
    reader.add_argument("--text", default="stdlib", help="calibration text")
    reader.add_argument("--layouts", default=",".join(FOLDS), help="folds, separated by commas")
    reader.add_argument(
        "--toys",
        action="store_true",
        help="fold random models of other architectures instead, each in its plain layout",
    )
    options = reader.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    out = RESULTS / f"engines-{'toys' if options.toys else options.model.name}.json"
    table: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": {}}
    text = TEXT.read_text()[:4000]
    tokens = transformers.AutoTokenizer.from_pretrained(options.model)(text)["input_ids"]
    prompt = tokens[:NUM_TOKENS]
    for name in (set(TOYS) & set(options.layouts.split(","))) or TOYS if options.toys else options.layouts.split(","):
        if options.toys:
            model, fold = toy(options.work, name), options.work / f"{name.replace(' ', '-')}-native"
            if not fold.exists():
                command(
                    "fold",
                    model,
                    fold,
                    "--kv-heads",
                    "1/4",
                    "--merge",
                    "mean",
                    "--group",
                    "contiguous",
                    "--no-refit",
                    "--no-verify",
                )
        else:
            fold = folded(options.model, options.work, name, options.text)
        wanted = expected(fold, prompt) | {"tokens": tokens}
        for engine in options.engine:
            called, _, python = engine.partition("=")
            driver, source = called.partition("-")[0], fold
            request: dict[str, Any] = {"tokens": prompt, "new_tokens": NEW_TOKENS, "text": text}
            request["vocab_size"] = wanted["logits"].shape[-1]
            if called.endswith("-headfold"):
                request["builder"] = str(BUILDERS / f"for_{driver}.py")
            export = EXPORTS.get(driver) or EXPORTS.get(called.partition("-")[2])
            if export and "decilm" in name:
                continue  # its file is written from the fold
            refused = ""
            if export:
                layout, suffix, how = export
                source = options.work / f"{name.replace(' ', '-')}{suffix}"
                refused = command("export", fold, source, "--layout", layout, *how, "--force")
            row = {"refused": refused} if refused else compared(said(driver, python, source, request), wanted)
            table["rows"].setdefault(name, {})[called] = row
            table |= {
                "machine": describe(),
                "model": options.model.name,
                "tokens": len(prompt),
                "new_tokens": NEW_TOKENS,
            }
            out.write_text(json.dumps(table, indent=1) + "\n")
            print(f"{name}, {called}: {row}", flush=True)


if __name__ == "__main__":
    main()
