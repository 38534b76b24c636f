"""Run a checkpoint directory in the transformers that this Python has.

    python transformers.py DIRECTORY REQUEST.json ANSWER.json

REQUEST has `tokens`, `new_tokens` and `text`; ANSWER gets `logits` of every position (as a .npy file beside it), `greedy`, and the
tokens of the text.
"""

import json
import sys
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
    with torch.no_grad():
        logits = model(ids).logits[0]
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request["new_tokens"],
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    except ValueError:  # transformers 5 names a class that 4 does not know
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    tokens = tokenizer(request["text"])["input_ids"]
    np.save(answer.with_suffix(".npy"), logits.float().numpy())
    greedy = written[0, ids.shape[1] :].tolist()
    answer.write_text(json.dumps({"greedy": greedy, "tokens": tokens, "version": transformers.__version__}))


if __name__ == "__main__":
    main()
