"""Run a GGUF file in llama.cpp, by `llama-cpp-py-sync`; LLAMA_CPP_LIB may name another libllama.

    python llama_cpp.py FILE REQUEST.json ANSWER.json

REQUEST has `tokens`, `new_tokens`, and perhaps `text`; ANSWER gets `logits` of every position (as a .npy file beside it), `greedy`,
the tokens of the text, and what a new token takes: seconds, and bytes of the cache. A REQUEST with `depths` is timed instead: ANSWER gets
`seconds_at`, the seconds of a new token after so many others, with a cache in float16 and as many threads as `threads` says.
A REQUEST with `cache` names the number types of K and V in the cache, which are else float32.
"""

import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib


def opened() -> tuple[Any, Any]:
    """Return the C declarations and libllama: the one that LLAMA_CPP_LIB names, with the backend for this processor from its folder."""
    named = os.environ.get("LLAMA_CPP_LIB")
    if named is None:
        return get_ffi(), get_lib()
    folder = Path(named).parent
    loaded = [
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
        for pattern in ("libggml-base.so*", "libggml.*so*")
        for file in sorted(folder.glob(pattern))
    ]
    loaded[-1].ggml_backend_load_all_from_path(str(folder).encode())
    return get_ffi(), get_ffi().dlopen(named)


CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}
"""Number types of a cache as ggml counts them."""


class Session:
    """A model file in llama.cpp, with a cache for one text."""

    def __init__(
        self, model_file: str, room: int, threads: int, *, exact: bool, cache: Sequence[str] | None = None
    ) -> None:
        self.ffi, self.lib = opened()
        self.lib.llama_backend_init()
        how = self.lib.llama_model_default_params()
        how.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(model_file.encode(), how)
        if self.model == self.ffi.NULL:
            raise SystemExit("llama.cpp does not load the file")
        self.vocabulary = self.lib.llama_model_get_vocab(self.model)
        self.size = self.lib.llama_vocab_n_tokens(self.vocabulary)
        options = self.lib.llama_context_default_params()
        options.n_ctx = options.n_batch = room
        options.n_ubatch = room if exact else min(room, 512)
        if exact:  # float32, and no flash attention, which computes in float16
            options.type_k = options.type_v = options.flash_attn_type = 0
        if cache is not None:  # V is quantised with flash attention alone
            options.type_k, options.type_v, options.flash_attn_type = *(CACHE_TYPES[name] for name in cache), 1
        options.n_threads = options.n_threads_batch = threads
        self.context = self.lib.llama_init_from_model(self.model, options)
        self.batch = self.lib.llama_batch_init(room, 0, 1)
        self.position = 0

    def read(self, tokens: list[int], *, all_logits: bool = False) -> None:
        """Put tokens after those that the cache has."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, self.position + place, 1
            batch.logits[place] = int(all_logits or place == len(tokens) - 1)
            batch.seq_id[place][0] = 0
        if self.lib.llama_decode(self.context, batch):
            raise SystemExit(f"llama.cpp does not decode {len(tokens)} tokens at {self.position}")
        self.position += len(tokens)

    def logits(self, place: int) -> Any:
        """Return the logits of one token of the last batch."""
        row = self.lib.llama_get_logits_ith(self.context, place)
        return np.frombuffer(self.ffi.buffer(row, self.size * 4), dtype=np.float32).copy()

    def tokens_of(self, text: bytes, special: bool) -> list[int]:
        """Return the tokens that llama.cpp divides a text into."""
        room = len(text) + 16
        into = self.ffi.new(f"llama_token[{room}]")
        count = self.lib.llama_tokenize(self.vocabulary, text, len(text), into, room, special, False)
        return [int(into[place]) for place in range(count)]


def computed(model_file: str, request: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return what a request asks for, and the logits."""
    tokens, new = request["tokens"], request["new_tokens"]
    # One thread: its threads wait in a loop, beside other jobs for minutes.
    session = Session(model_file, len(tokens) + new + 8, 1, exact=True, cache=request.get("cache"))
    session.read(tokens, all_logits=True)
    logits = np.stack([session.logits(place) for place in range(len(tokens))])
    kept = session.lib.llama_state_seq_get_size(session.context, 0) / len(tokens)  # with a few bytes of bookkeeping
    greedy, last, started = [], logits[-1], time.perf_counter()
    for _ in range(new):
        greedy.append(int(last.argmax()))
        session.read(greedy[-1:])
        last = session.logits(0)
    found = {
        "greedy": greedy,
        "version": version("llama-cpp-py-sync"),
        "seconds_per_token": (time.perf_counter() - started) / new,
        "kv_bytes_per_token": kept,
    }
    if "text" in request:
        found["tokens"] = session.tokens_of(request["text"].encode(), request.get("special", True))
    return found, logits


def timed(model_file: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return the median seconds of a new token at each depth."""
    depths, count = sorted(request["depths"]), request["new_tokens"]
    session = Session(model_file, max(depths) + count + 8, request["threads"], exact=False)
    found = {}
    for depth in depths:
        while session.position < depth:
            session.read([1 + place % 997 for place in range(min(512, depth - session.position))])
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            session.read([7])
            session.logits(0)
            seconds.append(time.perf_counter() - started)
        found[str(depth)] = statistics.median(seconds)
    return {"seconds_at": found}


def main() -> None:
    model_file, request, answer = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    if "depths" in request:
        answer.write_text(json.dumps(timed(model_file, request)))
        return
    found, logits = computed(model_file, request)
    np.save(answer.with_suffix(".npy"), logits)
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
