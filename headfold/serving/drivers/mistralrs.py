"""Run a checkpoint directory in mistral.rs.

    python mistralrs.py DIRECTORY-OR-GGUF REQUEST.json ANSWER.json

REQUEST has `tokens`, `new_tokens`, `text` and `vocab_size`; ANSWER gets `greedy`, the tokens of the text, and `of_written`: the logits
(log-probabilities, as a .npy file beside it) are those of the tokens that it writes, as its API gives none of the prompt. A prompt is
text there, so the driver ends with an error where the text of the tokens is divided into others.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.pop(0)  # this file has the library's name
os.environ |= {"MISTRALRS_CPU_KV_F32": "1", "HF_HUB_OFFLINE": "1", "RUST_LOG": "error", "RUST_BACKTRACE": "0"}

import numpy as np
from mistralrs import ChatCompletionRequest, ModelDType, Runner, Which

PROMPT_ALONE = "{{ messages[0]['content'] }}"


def main() -> None:
    directory, request, answer = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    template = answer.with_suffix(".jinja")
    template.write_text(PROMPT_ALONE)
    source = Path(directory)
    if source.suffix == ".gguf":
        which = Which.GGUF(str(source.parent), source.name, dtype=ModelDType.F32)
    else:
        which = Which.Plain(directory, dtype=ModelDType.F32)
    engine = Runner(which, max_seqs=1, prefix_cache_n=0, jinja_explicit=str(template))
    prompts = [engine.detokenize_text(request["tokens"], without_special) for without_special in (False, True)]
    prompt = next((text for text in prompts if engine.tokenize_text(text, True, None) == request["tokens"]), None)
    if prompt is None:
        raise SystemExit("the text of these tokens has other tokens in mistral.rs")
    size, new = request["vocab_size"], request["new_tokens"]
    wanted = ChatCompletionRequest(
        prompt, "default", logprobs=True, top_logprobs=size, max_tokens=new, temperature=0.0, ignore_eos=True
    )
    found = engine.send_chat_completion_request(wanted)
    if found.usage.prompt_tokens != len(request["tokens"]):
        raise SystemExit(
            f"expected a prompt of {len(request['tokens'])} tokens, mistral.rs read {found.usage.prompt_tokens}"
        )
    (choice,) = found.choices
    steps = choice.logprobs.content
    logits, greedy = np.full((len(steps), size), -np.inf, dtype=np.float32), []
    for row, step in zip(logits, steps, strict=True):
        for each in step.top_logprobs:
            row[each.token] = each.logprob
        greedy += [each.token for each in step.top_logprobs if each.logprob == step.logprob][:1]
    np.save(answer.with_suffix(".npy"), logits)
    tokens = engine.tokenize_text(request["text"], True, None)
    answer.write_text(
        json.dumps({"greedy": greedy, "tokens": tokens, "of_written": True, "version": version("mistralrs")})
    )


if __name__ == "__main__":
    main()
