"""Run a checkpoint directory in vLLM.

    python vllm.py DIRECTORY REQUEST.json ANSWER.json

REQUEST has `tokens`, `new_tokens` and `text`; ANSWER gets `logits` of every position (log-probabilities, as a .npy file beside it),
`greedy`, the tokens of the text, and what a new token takes: seconds, and bytes of the cache (of the GiB that it divides into blocks). Over
a large vocabulary the logits are those of the new tokens, and `of_written` is true.
Layers with numbers of heads of their own are run by vLLM's transformers backend. A REQUEST with `depths` is timed instead: ANSWER gets
`seconds_at`, the seconds of a new token after so many others, in bfloat16.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this file has the library's name
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

import numpy as np
import vllm
from vllm import LLM, SamplingParams

MOST_ENTRIES = 2**20
# MLA passes queries with an axis of heads, each of which the CPU kernel of plain rotary frequencies turns as a token of its own.
WITHOUT_KERNEL = {"custom_ops": ["-rotary_embedding"]}


def opened(directory: str, config: dict[str, Any], dtype: str, room: int, *, keeps_prompts: bool = False) -> LLM:
    """Return the engine with a model. It reads a prompt again every time, unless it `keeps_prompts`."""
    return LLM(
        model=directory, dtype=dtype, enforce_eager=True, trust_remote_code=True, max_model_len=room, max_logprobs=-1,
        model_impl="transformers" if "per_layer_config" in config else "auto", enable_prefix_caching=keeps_prompts,
        disable_log_stats=True, **({"compilation_config": WITHOUT_KERNEL} if "kv_lora_rank" in config else {}),
    )  # fmt: skip


def seconds(engine: LLM, tokens: list[int], count: int) -> float:
    """Return what so many new tokens after others take."""
    wanted, started = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True), time.perf_counter()
    engine.generate({"prompt_token_ids": tokens}, wanted, use_tqdm=False)
    return time.perf_counter() - started


def per_token(engine: LLM, tokens: list[int], count: int) -> float:
    """Return the seconds of a new token, without those of the prompt."""
    return max(seconds(engine, tokens, count) - seconds(engine, tokens, 1), 0) / (count - 1)


def computed(directory: str, config: dict[str, Any], request: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return what a request asks for, and the logits."""
    new, size = request["new_tokens"], config["vocab_size"]
    engine = opened(directory, config, "float32", len(request["tokens"]) + new)
    # vLLM makes an object of every entry: those of a prompt over a large vocabulary take minutes and gigabytes.
    of_written = size * len(request["tokens"]) > MOST_ENTRIES
    wanted = SamplingParams(
        temperature=0, max_tokens=new, ignore_eos=True, prompt_logprobs=None if of_written else -1, logprobs=-1
    )
    (found,) = engine.generate({"prompt_token_ids": request["tokens"]}, wanted, use_tqdm=False)
    written = found.outputs[0].logprobs
    rows = written if of_written else [*found.prompt_logprobs[1:], written[0]]
    logits = np.full((len(rows), size), -np.inf, dtype=np.float32)
    for place, row in enumerate(rows):
        logits[place, list(row)] = [entry.logprob for entry in row.values()]
    cache = engine.llm_engine.vllm_config.cache_config
    answer = {
        "greedy": list(found.outputs[0].token_ids),
        "of_written": of_written,
        "version": vllm.__version__.partition("+")[0],
        "tokens": engine.get_tokenizer().encode(request["text"]),
        "seconds_per_token": per_token(engine, request["tokens"], new),
        "kv_bytes_per_token": 2**30 / (cache.num_gpu_blocks * cache.block_size),
    }
    return answer, logits


def main() -> None:
    directory, request, answer = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    config = json.loads((Path(directory) / "config.json").read_text())
    if "depths" in request:
        count = request["new_tokens"]
        engine = opened(directory, config, "bfloat16", max(request["depths"]) + count + 8, keeps_prompts=True)
        texts = {str(depth): [1 + place % 997 for place in range(max(depth, 1))] for depth in request["depths"]}
        found = {}
        for depth, tokens in texts.items():
            seconds(engine, tokens, 1)  # reads the prompt, which would take longer than all new tokens
            found[depth] = per_token(engine, tokens, count)
        answer.write_text(json.dumps({"seconds_at": found}))
        return
    found, logits = computed(directory, config, request)
    np.save(answer.with_suffix(".npy"), logits)
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
