"""Train the bundled checkpoint: a small Llama-architecture MHA language model on the Python standard library's own sources.

    python scripts/train_bundled.py OUT [--minutes 60]

Writes OUT/ (config, bf16 safetensors, tokenizer), OUT/heldout.txt (the text it is measured on: the library modules of
`heldout-files.txt`, tests left out) and OUT/training.json (what was done, held-out NLL).
About 2.6 M parameters; 8 heads of 24, 5 layers, context 512, vocabulary 2048. AdamW, cosine, float32, one epoch or less.
"""

import argparse
import json
import math
import random
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headfold.corpus import stdlib

CONTEXT, BATCH, VOCABULARY = 512, 8, 2048
PEAK_RATE, WARMUP, DECAY = 3e-3, 100, 0.1


def train_tokenizer(texts: list[str], vocabulary: int = VOCABULARY, context: int = CONTEXT) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that puts one `<s>` before each document."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<s>"], initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>", model_max_length=context)


def heldout_text() -> str:
    """Return the held-out library modules (no tests), each file in turn: what the bundled model is measured on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [name for name in sorted(stdlib.heldout_files()) if "test" not in name and "encodings/" not in name]
    return "\n".join((root / name).read_text(encoding="utf-8") for name in names)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return all documents as one stream of token ids."""
    return torch.tensor([token for ids in tokenizer(texts, verbose=False)["input_ids"] for token in ids])


@torch.no_grad()
def heldout_nll(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Return the mean negative log-likelihood, nats per token, over full windows of the context."""
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in windows.split(BATCH)]
    return sum(losses) / len(windows)


def rate(step: int, progress: float, peak: float = PEAK_RATE) -> float:
    """Return the learning rate: linear warm-up, then cosine to a hundredth of the peak; `progress` is the share of the time used."""
    return peak * min(1.0, (step + 1) / WARMUP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def optimizer_of(model: LlamaForCausalLM, beta: float) -> torch.optim.AdamW:
    """Return AdamW that decays matrices alone; `beta` is that of the second moment."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, beta), fused=True)


def train(model: LlamaForCausalLM, stream: torch.Tensor, seconds: float) -> dict:
    """Train for `seconds` or one epoch, whichever ends first; return what was done."""
    optimizer = optimizer_of(model, 0.98)
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    num_steps, start, done = len(windows) // BATCH, time.monotonic(), 0
    while done < num_steps and time.monotonic() - start < seconds:
        progress = max(done / num_steps, (time.monotonic() - start) / seconds)
        for group in optimizer.param_groups:
            group["lr"] = rate(done, progress)
        batch = windows[order[done * BATCH : (done + 1) * BATCH]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        if done % 50 == 0:
            print(f"step {done}/{num_steps}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True)
    return {"steps": done, "tokens": done * BATCH * CONTEXT, "seconds": round(time.monotonic() - start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    options = parser.parse_args()
    torch.manual_seed(0)
    texts = list(stdlib.documents())
    random.Random(0).shuffle(texts)
    tokenizer = train_tokenizer(texts)
    stream, held_out = encode(tokenizer, texts), heldout_text()
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=8, head_dim=24, max_position_embeddings=CONTEXT, rms_norm_eps=1e-6, initializer_range=0.04,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, {len(stream):,} tokens", flush=True)
    record = train(model, stream, options.minutes * 60)
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    (options.out / "heldout.txt").write_text(held_out)
    record["heldout_nll"] = round(heldout_nll(model.float(), encode(tokenizer, [held_out])), 4)
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(record)


if __name__ == "__main__":
    main()
