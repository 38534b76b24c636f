"""Run a checkpoint directory in mlx-lm.

    python mlx.py DIRECTORY REQUEST.json ANSWER.json

REQUEST has `tokens`, `new_tokens` and `text`; ANSWER gets `logits` of every position (as a .npy file beside it), `greedy`, the tokens of
the text, and what a new token takes: seconds, and bytes of the cache.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.pop(0)  # this file has the library's name

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache


def main() -> None:
    directory, request, answer = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    mx.set_default_device(mx.cpu)
    model, tokenizer = load(directory)
    model.update(tree_map(lambda array: array.astype(mx.float32), model.parameters()))
    cache = make_prompt_cache(model)
    logits = model(mx.array([request["tokens"]]), cache=cache)[0]
    greedy, last = [], logits[-1]
    mx.eval(last)
    kept = sum(array.nbytes / array.shape[2] for layer in cache for array in (layer.keys, layer.values))
    started = time.perf_counter()
    for _ in range(request["new_tokens"]):
        greedy.append(int(mx.argmax(last).item()))
        last = model(mx.array([[greedy[-1]]]), cache=cache)[0, -1]
    seconds = (time.perf_counter() - started) / request["new_tokens"]
    np.save(answer.with_suffix(".npy"), np.array(logits.astype(mx.float32)))
    tokens = tokenizer.encode(request["text"])
    found = {
        "greedy": greedy, "tokens": tokens, "version": version("mlx-lm"), "seconds_per_token": seconds, "kv_bytes_per_token": kept,
    }  # fmt: skip
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
