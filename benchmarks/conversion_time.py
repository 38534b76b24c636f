"""Time folding on disk: a 7B-shaped checkpoint against `cp -r --reflink=never` of the same directory, both with `sync`.

    python benchmarks/conversion_time.py DIRECTORY [--rounds 3] [--small]

DIRECTORY needs room for about 27 GB for a while: it gets the source (bf16, random weights, 13.5 GB in three shards), and one
copy or fold at a time; all of it is removed at the end. The two take turns and swap their order every round, because either
finds in the page cache what the other left there. RssAnon of the folding process is sampled all the time.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from machine import describe

RESULT = Path(__file__).parent / "results" / "conversion_time.json"
HEADFOLD = Path(sys.executable).with_name("headfold")
OPTIONS = ["--kv-heads", "8", "--merge", "mean", "--group", "contiguous", "--no-refit", "--no-verify"]
SAMPLE_SECONDS = 0.01
SEED = 0
NOISE_ELEMENTS = 2**26
"""Random weights are cut from one block at random offsets: drawing each would take longer than writing it."""


@dataclass(frozen=True, slots=True)
class Size:
    """A llama with one K/V head per query head."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    shard_bytes: int
    num_heads: int = 32

    def config(self) -> dict:
        """Return the contents of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
            "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size, "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads, "num_key_value_heads": self.num_heads, "vocab_size": self.vocab_size,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
        }  # fmt: skip

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of every tensor in the order in which the model uses them."""
        hidden, inner = self.hidden_size, self.intermediate_size
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            yield from ((f"{prefix}.self_attn.{role}_proj.weight", (hidden, hidden)) for role in "qkvo")
            yield from ((f"{prefix}.mlp.{role}_proj.weight", (inner, hidden)) for role in ("gate", "up"))
            yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
            yield from ((f"{prefix}.{role}_layernorm.weight", (hidden,)) for role in ("input", "post_attention"))
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocab_size, hidden)


SEVEN_BILLION = Size(num_layers=32, hidden_size=4096, intermediate_size=11008, vocab_size=32000, shard_bytes=5 * 10**9)
SMALL = Size(num_layers=2, hidden_size=4096, intermediate_size=11008, vocab_size=32000, shard_bytes=5 * 10**8)


@dataclass(frozen=True, slots=True)
class Timing:
    """One run of one side; `anonymous_bytes` is the largest RssAnon seen, 0 for cp."""

    seconds: float
    anonymous_bytes: int


def make_checkpoint(path: Path, size: Size) -> int:
    """Write the checkpoint tensor by tensor and return its bytes."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(size.config(), indent=2))
    noise = (0.02 * torch.randn(NOISE_ELEMENTS, generator=torch.Generator().manual_seed(SEED))).to(torch.bfloat16)
    data = memoryview(noise.view(torch.uint8).numpy())
    shards = split(size)
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    for name, shapes in zip(names, shards, strict=True):
        write_shard(path / name, shapes, data)
    weight_map = {tensor: name for name, shapes in zip(names, shards, strict=True) for tensor in shapes}
    total = sum(num_bytes(shape) for shapes in shards for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def num_bytes(shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor in bfloat16."""
    return 2 * math.prod(shape)


def split(size: Size) -> list[dict[str, tuple[int, ...]]]:
    """Divide the tensors, in order, into shards; a new one begins where the last one is full."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in size.shapes():
        needed = num_bytes(shape)
        if filled and filled + needed > size.shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += needed
    return shards


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], noise: memoryview) -> None:
    """Write one shard of random weights."""
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = position + num_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:  # the format of safetensors, without holding a shard in memory
        file.write(len(text).to_bytes(8, "little") + text)
        for number, shape in enumerate(shapes.values()):
            offset, left = 2 * (number * 7919 % NOISE_ELEMENTS), num_bytes(shape)
            while left:
                piece = noise[offset : offset + left]
                file.write(piece)
                offset, left = 0, left - len(piece)


def timed(command: list[str]) -> Timing:
    """Return the wall time of a command and the `sync` after it, from a disk with nothing left to write."""
    subprocess.run(["sync"], check=True)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    subprocess.run(["sync"], check=True)
    return Timing(time.perf_counter() - start, peak)


def anonymous_bytes(pid: int) -> int:
    """Return the RssAnon of a process, 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def measure(source: Path, rounds: int) -> dict[str, list[Timing]]:
    """Time both sides in turns; the first in one round is the second in the next."""
    target = source.with_name("target")
    sides = {
        "cp": ["cp", "-r", "--reflink=never", str(source), str(target)],
        "fold": [str(HEADFOLD), "fold", str(source), str(target), *OPTIONS],
    }
    timings: dict[str, list[Timing]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sorted(sides, reverse=number % 2 == 1):
            timings[side].append(timed(sides[side]))
            print(f"round {number + 1}: {side:4} {timings[side][-1].seconds:7.2f} s", flush=True)
            shutil.rmtree(target)
    return timings


def file_system(path: Path) -> str:
    """Return the type of the file system, by the mount point nearest above."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    above = [fields for fields in mounts if path.resolve().is_relative_to(fields[1])]
    return max(above, key=lambda fields: len(fields[1]))[2]


def summary(timings: dict[str, list[Timing]]) -> dict:
    """Return medians, their ratio, the peak memory of folding and all runs."""
    medians = {side: statistics.median(timing.seconds for timing in runs) for side, runs in timings.items()}
    return {
        "median_seconds": medians,
        "ratio": medians["fold"] / medians["cp"],
        "peak_anonymous_bytes": max(timing.anonymous_bytes for timing in timings["fold"]),
        "runs": {side: [asdict(timing) for timing in runs] for side, runs in timings.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="two layers instead of 32, and no result file")
    given = parser.parse_args()
    size = SMALL if given.small else SEVEN_BILLION
    with tempfile.TemporaryDirectory(dir=given.directory, prefix="conversion-time-") as place:
        total = make_checkpoint(Path(place) / "source", size)
        result = summary(measure(Path(place) / "source", given.rounds))
        about = {
            "command": ["headfold", "fold", "SRC", "OUT", *OPTIONS],
            "checkpoint_bytes": total,
            "size": asdict(size),
        }
        result = about | {"file_system": file_system(Path(place))} | result | {"machine": describe(), "seeds": [SEED]}
    print(json.dumps({key: result[key] for key in ("median_seconds", "ratio", "peak_anonymous_bytes")}, indent=2))
    if not given.small:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
