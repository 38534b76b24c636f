"""Run a checkpoint directory in the transformers that this Python has.

    python transformers.py DIRECTORY REQUEST.json ANSWER.json

REQUEST has `tokens`, `new_tokens` and `text`; ANSWER gets `logits` of every position (as a .npy file beside it), `greedy`, the tokens of
the text, and what a new token takes: seconds, and bytes of the cache.
"""

import json
import sys
import time
from pathlib import Path

sys.path.pop(0)  # this file has the library's name

import numpy as np
import torch
import transformers


def main() -> None:
    directory, request, answer = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, torch_dtype=torch.float32, trust_remote_code=True, attn_implementation="eager"
    )
    ids = torch.tensor([request["tokens"]])
    model.generation_config.eos_token_id = None  # neither an end nor, as a minimum length makes it, impossible

    def written(count: int) -> tuple[torch.Tensor, float]:
        """Return the text with so many tokens more, and the seconds they took."""
        started = time.perf_counter()
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        return made, time.perf_counter() - started

    with torch.no_grad():
        out = model(ids, use_cache=True)
        _, prompt_seconds = written(1)
        continued, seconds = written(request["new_tokens"])
    kept = sum(
        one.numel() * one.element_size() for layer in out.past_key_values.layers for one in (layer.keys, layer.values)
    )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    except ValueError:  # transformers 5 names a class that 4 does not know
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    tokens = tokenizer(request["text"])["input_ids"]
    np.save(answer.with_suffix(".npy"), out.logits[0].float().numpy())
    found = {
        "greedy": continued[0, ids.shape[1] :].tolist(), "tokens": tokens, "version": transformers.__version__,
        "seconds_per_token": max(seconds - prompt_seconds, 0) / (request["new_tokens"] - 1),
        "kv_bytes_per_token": kept / ids.shape[1],
    }  # fmt: skip
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
