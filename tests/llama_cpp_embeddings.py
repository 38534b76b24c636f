"""Run a GGUF file of an encoder in llama.cpp, with a Python that has it: the vectors of tokens, their pooling, and a text's tokens.

    python llama_cpp_embeddings.py DRIVER FILE REQUEST.json ANSWER.npz

DRIVER is headfold's script for llama.cpp, whose session this one extends; REQUEST has `texts`.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def vectors(session: Any, tokens: list[int], pooling: int) -> Any:
    """Return the vectors of all tokens with pooling 0, and one vector with -1, the pooling that the file names."""
    ffi, lib = session.ffi, session.lib
    options = lib.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 512
    options.embeddings, options.pooling_type, options.flash_attn_type = True, pooling, 0
    options.n_threads = options.n_threads_batch = 1
    session.context, session.position = lib.llama_init_from_model(session.model, options), 0
    session.read(tokens, all_logits=True)
    size = lib.llama_model_n_embd(session.model)
    rows = (
        [lib.llama_get_embeddings_seq(session.context, 0)]
        if pooling
        else [lib.llama_get_embeddings_ith(session.context, place) for place in range(len(tokens))]
    )
    return np.stack([np.frombuffer(ffi.buffer(row, size * 4), dtype=np.float32).copy() for row in rows])


def main() -> None:
    spec = importlib.util.spec_from_file_location("driver", sys.argv[1])
    driver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    session, found = driver.Session(sys.argv[2], 512, 1, exact=True), {}
    for place, text in enumerate(json.loads(Path(sys.argv[3]).read_text())["texts"]):
        tokens = session.tokens_of(text.encode(), True)
        found[f"tokens{place}"] = np.array(tokens)
        for name, pooling in (("all", 0), ("pooled", -1)):
            found[f"{name}{place}"] = vectors(session, tokens[:512], pooling)
    np.savez(sys.argv[4], **found)


if __name__ == "__main__":
    main()
