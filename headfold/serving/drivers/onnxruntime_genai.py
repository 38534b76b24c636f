"""Build a checkpoint directory for onnxruntime-genai, and run it there.

    python onnxruntime_genai.py DIRECTORY REQUEST.json ANSWER.json

REQUEST has `tokens`, `new_tokens` and `text`, and perhaps `builder`, a script to run in place of the engine's model builder; ANSWER gets
`logits` of every position (as a .npy file beside it), `greedy`, the tokens of the text, `cache`, the K/V heads of each layer's cache, and
what a new token takes: seconds, and bytes of the cache.
"""

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.pop(0)  # this file has the library's name

import numpy as np
import onnxruntime_genai as engine


def built(directory: str, builder: str | None, out: Path) -> Path:
    """Build the model; end with the last line of what the builder says if it cannot."""
    script = [builder] if builder else ["-m", "onnxruntime_genai.models.builder"]
    words = [*script, "-m", directory, "-o", str(out), "-p", "fp32", "-e", "cpu", "-c", str(out / "cache")]
    done = subprocess.run([sys.executable, *words, "--extra_options", "hf_remote=true"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    return out


def main() -> None:
    directory, request, answer = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    place = built(directory, request.get("builder"), answer.with_suffix(""))
    model = engine.Model(str(place))
    options = engine.GeneratorParams(model)
    options.set_search_options(max_length=len(request["tokens"]) + request["new_tokens"] + 8, do_sample=False)
    running = engine.Generator(model, options)
    running.append_tokens(np.array(request["tokens"], dtype=np.int32))
    logits = running.get_output("logits")[0]
    greedy, last, started = [], logits[-1], time.perf_counter()
    for _ in range(request["new_tokens"]):
        greedy.append(int(last.argmax()))
        running.append_tokens(np.array(greedy[-1:], dtype=np.int32))
        last = running.get_output("logits")[0, -1]
    seconds = (time.perf_counter() - started) / request["new_tokens"]
    layers = json.loads((place / "genai_config.json").read_text())["model"]["decoder"]["num_hidden_layers"]
    shapes = [running.get_output(f"present.{layer}.key").shape for layer in range(layers)]
    cache = [heads for _, heads, _, _ in shapes]
    kept = sum(2 * 4 * heads * dim for _, heads, _, dim in shapes)  # K and V in float32
    np.save(answer.with_suffix(".npy"), logits)
    found = {
        "greedy": greedy, "cache": cache, "version": version("onnxruntime-genai"), "seconds_per_token": seconds,
        "kv_bytes_per_token": kept,
    }  # fmt: skip
    answer.write_text(json.dumps(found | {"tokens": engine.Tokenizer(model).encode(request["text"]).tolist()}))


if __name__ == "__main__":
    main()
