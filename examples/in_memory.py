"""Fold a model that is in memory, on the batches of a DataLoader, and measure the fold beside the original.

python examples/in_memory.py [--kv-heads 1/2] [--tokens 1024]
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import headfold

BUNDLED = Path(headfold.__file__).parent / "bundled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-heads", default="1/2", help="a count, or a share of the existing heads")
    parser.add_argument("--tokens", type=int, default=1024, help="calibration tokens; more is better")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    functions = Path(argparse.__file__).read_text().split("\n    def ")  # texts of different lengths

    def collate(texts: list[str]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(tokenizer(text, truncation=True, max_length=256)["input_ids"]) for text in texts]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        lengths = torch.tensor([len(each) for each in ids])
        return {"input_ids": padded, "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long()}

    loader = DataLoader(functions, batch_size=8, shuffle=True, collate_fn=collate)
    folded = headfold.fold(model, kv_heads=options.kv_heads, calibration=loader, tokens=options.tokens)
    print(f"K/V heads {model.config.num_key_value_heads} before, {folded.config.num_key_value_heads} after")
    print(
        f"bytes of the KV cache per token {folded.headfold.kv_bytes_before} before, {folded.headfold.kv_bytes_after} after"
    )
    found = headfold.eval(folded, reference=model, limit=2048)
    print(f"perplexity of the original {found.reference_perplexity:.2f}, of the fold {found.perplexity:.2f}")
    prompt = tokenizer("def main(", return_tensors="pt")
    print(tokenizer.decode(folded.generate(**prompt, max_new_tokens=16)[0]))


if __name__ == "__main__":
    main()
