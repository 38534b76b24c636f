"""Run the graph of a language model in onnxruntime.

    python onnxruntime.py DIRECTORY REQUEST.json ANSWER.json

REQUEST has `tokens` and `new_tokens`; ANSWER gets `logits` of every position (as a .npy file beside it), `greedy`, and what a new token
takes: seconds, and bytes of the cache. A graph has no tokenizer.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this file has the library's name

import numpy as np
import onnxruntime

PAST, PRESENT = "past_key_values", "present"


class Session:
    """A graph with its cache, empty at first."""

    def __init__(self, directory: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        inputs = {one.name: one for one in self._session.get_inputs()}
        self._names = [one.name for one in self._session.get_outputs()]
        self.cache = {
            name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
            for name, one in inputs.items()
            if name.startswith(PAST)
        }
        self._takes, self._length = set(inputs), 0

    def logits(self, tokens: list[int]) -> Any:
        """Return the logits of tokens after those that the cache has."""
        before, self._length = self._length, self._length + len(tokens)
        given = {
            "input_ids": np.array([tokens]),
            "attention_mask": np.ones((1, self._length), np.int64),
            "position_ids": np.arange(before, self._length)[None],
        }
        taken = {name: array for name, array in given.items() if name in self._takes}
        found = dict(zip(self._names, self._session.run(self._names, taken | self.cache), strict=True))
        self.cache = {name: found[name.replace(PAST, PRESENT)] for name in self.cache}
        return found["logits"][0]


def main() -> None:
    directory, request, answer = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    session, greedy = Session(directory), []
    logits = session.logits(request["tokens"])
    kept = sum(array.nbytes for array in session.cache.values()) / len(request["tokens"])
    last, started = logits[-1], time.perf_counter()
    for _ in range(request["new_tokens"]):
        greedy.append(int(last.argmax()))
        last = session.logits(greedy[-1:])[-1]
    seconds = (time.perf_counter() - started) / request["new_tokens"]
    np.save(answer.with_suffix(".npy"), logits)
    found = {
        "greedy": greedy,
        "version": onnxruntime.__version__,
        "seconds_per_token": seconds,
        "kv_bytes_per_token": kept,
    }
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
