"""Run a GGUF file in llama.cpp, by `llama-cpp-py-sync`; LLAMA_CPP_LIB may name another libllama.

    python llama_cpp.py FILE REQUEST.json ANSWER.json

REQUEST has `tokens`, `new_tokens`, and perhaps `text`; ANSWER gets `logits` of every position (as a .npy file beside it), `greedy`,
the tokens of the text, and what a new token takes: seconds, and bytes of the cache.
"""

import ctypes
import json
import os
import sys
import time
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


def main() -> None:
    model_file, request, answer = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    ffi, lib = opened()
    lib.llama_backend_init()
    how = lib.llama_model_default_params()
    how.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(model_file.encode(), how)
    if model == ffi.NULL:
        raise SystemExit("llama.cpp does not load the file")
    vocabulary = lib.llama_model_get_vocab(model)
    size = lib.llama_vocab_n_tokens(vocabulary)
    tokens = request["tokens"]
    options = lib.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = len(tokens) + request["new_tokens"] + 8
    options.type_k = options.type_v = options.flash_attn_type = (
        0  # float32, and no flash attention, which computes in float16
    )
    options.n_threads = options.n_threads_batch = 1  # its threads wait in a loop, beside other jobs for minutes
    context = lib.llama_init_from_model(model, options)
    logits = np.empty((len(tokens), size), dtype=np.float32)
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.logits[place] = token, place, 1, 1
        batch.seq_id[place][0] = 0
    if lib.llama_decode(context, batch):
        raise SystemExit("llama.cpp does not decode the tokens")
    for place in range(len(tokens)):
        row = lib.llama_get_logits_ith(context, place)
        logits[place] = np.frombuffer(ffi.buffer(row, size * 4), dtype=np.float32)
    kept = lib.llama_state_seq_get_size(context, 0) / len(tokens)  # with a few bytes of bookkeeping
    greedy, last = [], logits[-1]
    started = time.perf_counter()
    for step in range(request["new_tokens"]):
        greedy.append(int(last.argmax()))
        batch.n_tokens = 1
        batch.token[0], batch.pos[0], batch.n_seq_id[0], batch.logits[0] = greedy[-1], len(tokens) + step, 1, 1
        batch.seq_id[0][0] = 0
        if lib.llama_decode(context, batch):
            raise SystemExit("llama.cpp does not decode a new token")
        row = lib.llama_get_logits_ith(context, 0)
        last = np.frombuffer(ffi.buffer(row, size * 4), dtype=np.float32).copy()
    seconds = (time.perf_counter() - started) / request["new_tokens"]
    found: dict[str, Any] = {"greedy": greedy, "seconds_per_token": seconds, "kv_bytes_per_token": kept}
    if "text" in request:
        text = request["text"].encode()
        room = len(text) + 16
        into = ffi.new(f"llama_token[{room}]")
        count = lib.llama_tokenize(vocabulary, text, len(text), into, room, request.get("special", True), False)
        found["tokens"] = [int(into[place]) for place in range(count)]
    np.save(answer.with_suffix(".npy"), logits)
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
