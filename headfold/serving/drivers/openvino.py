"""Export a checkpoint directory for OpenVINO by optimum-intel, and run it in OpenVINO and OpenVINO GenAI.

    python openvino.py DIRECTORY REQUEST.json ANSWER.json

REQUEST has `tokens`, `new_tokens` and `text`, and perhaps `builder`, a script to run in place of `optimum-cli`; ANSWER gets `logits` of
every position by the exported model (as a .npy file beside it), `greedy` as OpenVINO GenAI writes it, the tokens of the text, `cache`, the
K/V heads of each layer's cache, and what a new token takes: seconds, and bytes of the cache.
"""

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.pop(0)  # this file has the library's name

import numpy as np
import openvino
import openvino_genai

PRECISE = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def exported(directory: str, builder: str | None, out: Path) -> Path:
    """Export the model; end with the last line of what the exporter says if it cannot."""
    script = [builder] if builder else ["-m", "optimum.commands.optimum_cli"]
    words = [
        "export",
        "openvino",
        "--model",
        directory,
        "--task",
        "text-generation-with-past",
        "--weight-format",
        "fp32",
    ]
    done = subprocess.run(
        [sys.executable, *script, *words, "--trust-remote-code", str(out)], capture_output=True, text=True
    )
    if done.returncode or not (out / "openvino_model.xml").exists():
        said = [line for line in done.stderr.splitlines() if line[:1].strip() and ("Error" in line or "Sizes" in line)]
        raise SystemExit(" ".join(said) or done.stderr.strip().splitlines()[-1])
    return out


def main() -> None:
    directory, request, answer = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    place = exported(directory, request.get("builder"), answer.with_suffix(""))
    model = openvino.Core().read_model(place / "openvino_model.xml")
    ids = np.array([request["tokens"]])
    given = {
        "input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }  # fmt: skip
    wanted = {name: given[name] for port in model.inputs for name in port.get_names()}
    running = openvino.compile_model(model, "CPU", PRECISE).create_infer_request()
    logits = running.infer(wanted)["logits"][0]
    states = {state.name: state.state.shape[1] for state in running.query_state()}
    kept = sum(state.state.byte_size for state in running.query_state()) / ids.shape[1]
    keys = {int(name.split(".")[1]): count for name, count in states.items() if name.endswith("key")}
    pipeline = openvino_genai.LLMPipeline(str(place), "CPU", **PRECISE)

    def continued(count: int) -> tuple[list[int], float]:
        """Return so many greedy tokens after the text, and the seconds they took."""
        config = openvino_genai.GenerationConfig(max_new_tokens=count, do_sample=False, ignore_eos=True)
        started = time.perf_counter()
        return list(pipeline.generate(openvino.Tensor(ids), config).tokens[0]), time.perf_counter() - started

    _, prompt_seconds = continued(1)
    greedy, seconds = continued(request["new_tokens"])
    tokens = pipeline.get_tokenizer().encode(request["text"]).input_ids.data[0].tolist()
    np.save(answer.with_suffix(".npy"), logits)
    found = {
        "greedy": greedy,
        "seconds_per_token": max(seconds - prompt_seconds, 0) / (request["new_tokens"] - 1),
        "kv_bytes_per_token": kept,
        "cache": [keys[layer] for layer in sorted(keys)],
        "tokens": tokens,
        "version": version("openvino-genai"),
    }
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
