"""Train a multi-head language model of 105 M parameters on the Python sources that this interpreter has, on a GPU, as a benchmark model.

    python scripts/train_large.py OUT [--minutes 6]

Reads every `.py` file of the standard library and of the installed packages; of files with the same contents, one. Writes OUT/ (config,
bf16 safetensors, tokenizer), OUT/heldout.txt (of one file in a hundred, chosen by its contents), OUT/calibration.txt (of the training
files) and OUT/training.json (what was done, held-out loss). Llama architecture, 14 layers, 12 heads of 64, context 1,024, vocabulary
16,384. AdamW, cosine, bf16 products with float32 weights; one epoch or less.
"""

import argparse
import hashlib
import json
import random
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from train_bundled import encode, optimizer_of, rate, train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT, BATCH, VOCABULARY = 1024, 32, 16384
PEAK_RATE = 1e-3
TOKENIZER_BYTES, TEXT_BYTES = 1 << 25, 1 << 21
LARGEST_FILE = 1 << 20
"""Larger files are tables, not code."""


def documents() -> Iterator[tuple[bool, str]]:
    """Yield the Python files of this interpreter, each with whether it is held out."""
    roots = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")}
    seen: set[bytes] = set()
    for path in sorted({path for root in roots for path in Path(root).rglob("*.py")}):
        data = path.read_bytes()
        key = hashlib.sha256(data).digest()
        if key in seen or not 0 < len(data) <= LARGEST_FILE:
            continue
        seen.add(key)
        try:
            yield key[0] * 256 + key[1] < 65536 // 100, data.decode("utf-8")
        except UnicodeDecodeError:
            continue


def first(texts: list[str], size: int) -> list[str]:
    """Return texts from the first on that have about `size` characters together."""
    taken, total = [], 0
    for text in texts:
        if total >= size:
            break
        taken.append(text)
        total += len(text)
    return taken


def tokens_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return all documents as one stream of token ids, encoded by parts: the lists of all at once would take many gigabytes."""
    parts = [texts[start : start + 500] for start in range(0, len(texts), 500)]
    return torch.cat([encode(tokenizer, part).int() for part in parts]).long()


def negative_log_likelihood(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of tokens, given what the last layer made of those before and the rows of the output embedding."""
    return torch.nn.functional.cross_entropy((hidden @ weight.mT).float().flatten(0, 1), targets.flatten())


def loss_of(model: LlamaForCausalLM, windows: torch.Tensor, last: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Return the mean negative log-likelihood of windows, in nats per token; `last` is `negative_log_likelihood`, or that compiled."""
    hidden = model.model(input_ids=windows, use_cache=False).last_hidden_state[:, :-1]
    return last(hidden, model.lm_head.weight, windows[:, 1:])


def train(model: LlamaForCausalLM, stream: torch.Tensor, seconds: float, batch_size: int) -> dict[str, float]:
    """Train for `seconds` or one epoch, whichever ends first; return what was done."""
    device = model.device
    for layer in model.model.layers:
        layer.compile()  # by layer: one compilation serves all
    last = torch.compile(negative_log_likelihood)
    optimizer = optimizer_of(model, 0.95)
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    num_steps, start, done = len(windows) // batch_size, time.monotonic(), 0
    while done < num_steps and time.monotonic() - start < seconds:
        progress = max(done / num_steps, (time.monotonic() - start) / seconds)
        for group in optimizer.param_groups:
            group["lr"] = rate(done, progress, PEAK_RATE)
        batch = windows[order[done * batch_size : (done + 1) * batch_size]].to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_of(model, batch, last)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        if done % 100 == 0:  # reading the loss waits for the device
            print(f"step {done}/{num_steps}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True)
    return {"steps": done, "tokens": done * batch_size * CONTEXT, "seconds": round(time.monotonic() - start)}


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Return the loss over full windows of the context, at most 256."""
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:256].to(model.device)
    losses = [loss_of(model, batch, negative_log_likelihood).item() * len(batch) for batch in windows.split(8)]
    return sum(losses) / len(windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--batch", type=int, default=BATCH)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    began = time.monotonic()
    texts: dict[bool, list[str]] = {False: [], True: []}
    for held_out, text in documents():
        texts[held_out].append(text)
    for some in texts.values():
        random.Random(0).shuffle(some)
    training, held = texts[False], first(texts[True], TEXT_BYTES)
    tokenizer = train_tokenizer(first(training, TOKENIZER_BYTES), VOCABULARY, CONTEXT)
    stream = tokens_of(tokenizer, training)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=768, intermediate_size=2048, num_hidden_layers=options.layers,
        num_attention_heads=12, num_key_value_heads=12, head_dim=64, max_position_embeddings=CONTEXT, rms_norm_eps=1e-6,
        initializer_range=0.02, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    print(f"{model.num_parameters():,} parameters, {len(stream):,} tokens", flush=True)
    print(f"reading and encoding the files took {time.monotonic() - began:.0f} s", flush=True)
    record = train(model, stream, options.minutes * 60, options.batch)
    record["parameters"] = model.num_parameters()
    record["heldout_nll"] = round(heldout_loss(model, tokens_of(tokenizer, held)), 4)
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    (options.out / "heldout.txt").write_text("\n".join(held))
    (options.out / "calibration.txt").write_text("\n".join(first(training, TEXT_BYTES)))
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(record)


if __name__ == "__main__":
    main()
