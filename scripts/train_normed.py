"""Make a language model whose queries and keys pass a norm from one without, as a benchmark model beside `pylib-llama`.

    python scripts/train_normed.py qwen3|olmo2 OUT --original MODEL [--tokens N]

MODEL is a Llama (`pylib-llama`: 6 layers, 8 heads of 32, as many K/V heads). The new model has its sizes, its tokenizer and its
weights, with norms of queries and keys inserted (`qwen3` norms each head, `olmo2` all heads at once, and has its other norms behind the
blocks), and is trained on `--tokens` tokens of the same data: the Python standard library with its tests, without held-out files,
context 256. Muon for the matrices of the blocks, AdamW for the rest; one cosine, bf16 products with float32 weights. Writes OUT/
(config, bf16 safetensors, tokenizer, heldout.txt) and OUT/training.json (what was done, held-out loss). OUT/resume.pt is written every
20 steps: the same command continues from there, and makes the same weights on the same machine.
"""

import argparse
import json
import math
import random
import shutil
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from train_bundled import encode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from headfold.corpus import stdlib

CONTEXT, BATCH = 256, 16
WARMUP, DECAY = 20, 0.1
SAVED_EVERY, HELDOUT_WINDOWS = 20, 64


@dataclass(frozen=True)
class Kind:
    """A class to make, and how fast its matrices and its other weights learn."""

    config: type[PreTrainedConfig]
    matrix_rate: float
    other_rate: float


KINDS = {"qwen3": Kind(Qwen3Config, 5e-3, 1e-3), "olmo2": Kind(Olmo2Config, 2.5e-3, 5e-4)}
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "rope_parameters",
)  # fmt: skip


def heldout_documents() -> list[str]:
    """Return the held-out files of the standard library and its tests, in path order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [root / name for name in sorted(stdlib.heldout_files())]
    return [path.read_text(encoding="utf-8") for path in paths if path.exists()]


def new_model(kind: str, original: Path) -> PreTrainedModel:
    """Return a fresh model of the class with the sizes of the model in `original`."""
    sizes = AutoConfig.from_pretrained(original)
    return AutoModelForCausalLM.from_config(
        KINDS[kind].config(**{name: getattr(sizes, name) for name in SIZES}, pad_token_id=None)
    )


@torch.no_grad()
def sizes_of(original: PreTrainedModel, windows: Tensor) -> dict[str, Tensor]:
    """Return the root mean square of what each module of the blocks receives (`NAME.in`) and returns (`NAME.out`) on some text."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def kept(_module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[f"{name}.in"], found[f"{name}.out"] = (t.float().square().mean().sqrt() for t in (inputs[0], output))

        return kept

    leaves = [(name, part) for name, part in original.model.layers.named_modules() if name.endswith(("_proj", "norm"))]
    handles = [part.register_forward_hook(keep(name)) for name, part in leaves]
    original(input_ids=windows)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def start_from(model: PreTrainedModel, original: PreTrainedModel, windows: Tensor) -> None:
    """Give the model the weights of the original, and its new norms gains with which they change as little as they can on average.

    Where norms follow the blocks (OLMo 2), those before them are multiplied into the projections that read them.
    """
    sizes, given = sizes_of(original, windows), dict(original.named_parameters())
    follows = hasattr(model.model.layers[0], "post_feedforward_layernorm")
    before = {"q": "input", "k": "input", "v": "input", "gate": "post_attention", "up": "post_attention"}
    after = {"post_attention_layernorm": "self_attn.o_proj", "post_feedforward_layernorm": "mlp.down_proj"}
    for name, parameter in model.named_parameters():
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        part = rest.removesuffix(".weight")
        role = part.rpartition(".")[2].removesuffix("_proj")
        if part.endswith(("q_norm", "k_norm")):
            parameter.fill_(sizes[f"{layer}.{part.replace('_norm', '_proj')}.out"])
        elif follows and part in after:
            parameter.fill_(sizes[f"{layer}.{after[part]}.out"])
        elif follows and role in before:
            norm = f"{layer}.{before[role]}_layernorm"
            parameter.copy_(given[name] * given[f"model.layers.{norm}.weight"] / sizes[f"{norm}.in"])
        else:
            parameter.copy_(given[name])


def optimizers_of(model: PreTrainedModel, kind: Kind) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for embeddings and gains, which decay in neither."""
    matrices = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=kind.matrix_rate, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=kind.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def share(step: int, num_steps: int) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, then a cosine to a hundredth."""
    return min(1.0, (step + 1) / WARMUP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / num_steps)))


def train(model: PreTrainedModel, kind: Kind, stream: Tensor, num_steps: int, saved: Path) -> float:
    """Train, from the last saved step on if there is one; return the mean loss of the last hundred steps."""
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    epochs = math.ceil(num_steps * BATCH / len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=torch.Generator().manual_seed(e)) for e in range(epochs)])
    optimizers, done, losses, began = optimizers_of(model, kind), 0, [], time.monotonic()
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        done, losses = state["done"], state["losses"]
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
    while done < num_steps:
        for optimizer, peak in zip(optimizers, (kind.matrix_rate, kind.other_rate), strict=True):
            optimizer.param_groups[0]["lr"] = peak * share(done, num_steps)
        batch = windows[order[done * BATCH : (done + 1) * BATCH]]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        done += 1
        losses = [*losses[-99:], loss.item()]
        if done % 20 == 0:
            print(
                f"step {done}/{num_steps}  loss {sum(losses[-20:]) / 20:.3f}  {time.monotonic() - began:.0f} s",
                flush=True,
            )
        if done % SAVED_EVERY == 0:
            state = {
                "done": done,
                "losses": losses,
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
            }
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)
    return sum(losses) / len(losses)


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> float:
    """Return the loss, nats per token, over windows of the context spread evenly over the held-out files."""
    stream = encode(tokenizer, heldout_documents())
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    windows = windows[:: max(1, len(windows) // HELDOUT_WINDOWS)]
    return sum(model(input_ids=some, labels=some).loss.item() * len(some) for some in windows.split(16)) / len(windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--original", type=Path, required=True, help="a Llama")
    parser.add_argument("--tokens", type=int, default=409_600)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    texts = list(stdlib.documents())
    random.Random(0).shuffle(texts)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.original)
    stream = encode(tokenizer, texts)
    model = new_model(options.kind, options.original)
    original = AutoModelForCausalLM.from_pretrained(options.original, dtype=torch.float32)
    original_loss = heldout_loss(original, tokenizer)
    start_from(model, original, stream[: 16 * CONTEXT].view(-1, CONTEXT))
    start_loss, kind = heldout_loss(model, tokenizer), KINDS[options.kind]
    num_steps = options.tokens // (BATCH * CONTEXT)
    print(f"{model.num_parameters():,} parameters, {len(stream):,} tokens, {num_steps} steps", flush=True)
    training_loss = train(model, kind, stream, num_steps, options.out / "resume.pt")
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    shutil.copyfile(options.original / "heldout.txt", options.out / "heldout.txt")
    record = {
        "class": options.kind, "steps": num_steps, "tokens": num_steps * BATCH * CONTEXT,
        "training_loss": round(training_loss, 4), "heldout_loss": round(heldout_loss(model.float(), tokenizer), 4),
        "heldout_loss_before_training": round(start_loss, 4), "heldout_loss_of_original": round(original_loss, 4),
    }  # fmt: skip
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(record)


if __name__ == "__main__":
    main()
