"""Run a language model in CTranslate2.

    python ctranslate2.py DIRECTORY REQUEST.json ANSWER.json

REQUEST has `tokens` and `new_tokens`; ANSWER gets `logits` of every position (as a .npy file beside it), `greedy`, and the seconds that a
new token takes. CTranslate2 has no tokenizer, and does not say what its cache takes.
"""

import json
import sys
import time
from pathlib import Path

sys.path.pop(0)  # this file has the library's name

import ctranslate2
import numpy as np


def main() -> None:
    directory, request, answer = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    model = ctranslate2.Generator(directory, compute_type="float32", intra_threads=1)
    names = json.loads((Path(directory) / "vocabulary.json").read_text())
    text = [names[token] for token in request["tokens"]]

    def continued(count: int) -> tuple[list[int], float]:
        """Return so many greedy tokens after the text, and the seconds they took."""
        started = time.perf_counter()
        (found,) = model.generate_batch(
            [text], max_length=count, min_length=count, beam_size=1, sampling_topk=1, include_prompt_in_result=False, end_token=[],
        )  # fmt: skip
        return found.sequences_ids[0], time.perf_counter() - started

    logits = np.array(model.forward_batch([request["tokens"]]).to_device(ctranslate2.Device.cpu))[0]
    new = request["new_tokens"]
    _, prompt_seconds = continued(1)
    greedy, seconds = continued(new)
    np.save(answer.with_suffix(".npy"), logits)
    per_token = max(seconds - prompt_seconds, 0) / (new - 1)
    answer.write_text(
        json.dumps({"greedy": greedy, "version": ctranslate2.__version__, "seconds_per_token": per_token})
    )


if __name__ == "__main__":
    main()
