"""What the sections of `gpu.py` share: settings, records that are saved row by row, timing, and random checkpoints with a tokenizer."""

import json
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conversion_time import Size, make_checkpoint
from torch import Tensor

ROOT = Path(__file__).parents[1]
SEED = 0
FLUSH_BYTES = 1 << 29
"""Bytes written between timed calls: what a call reads is then in memory, not in a cache, and the host is ahead of the GPU."""
SPECIAL = ("<pad>", "<s>", "</s>")


@dataclass(frozen=True, slots=True)
class Setup:
    """Where a section runs, whether with tiny sizes, and a folder for its files."""

    device: str
    dry_run: bool
    place: Path

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"


@dataclass(slots=True)
class Record:
    """The figures of a section; the file is written at every change, so that what a killed section found is kept."""

    file: Path
    place: Path
    deadline: float
    """Time (`time.monotonic`) after which no further row is begun."""
    data: dict[str, Any] = field(default_factory=dict)

    def put(self, **values: Any) -> None:
        """Add values and save."""
        self.data |= values
        temporary = self.file.with_suffix(".tmp")
        text = json.dumps(finite(self.data), default=str)
        temporary.write_text(text.replace(str(self.place), "PLACE"))
        temporary.replace(self.file)

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def row(self, group: str, name: str, make: Callable[[], Any], seconds: float = 0.0) -> Any:
        """Run `make`, record its value as `group` → `name`, and return it; None where it fails or its `seconds` do not fit any more."""
        value: Any = None
        if self.left() < seconds:
            found = {"skipped": f"{self.left():.0f} s left, about {seconds:.0f} s needed"}
        else:
            try:
                found = value = make()
            except Exception as error:  # whatever it is, the other rows go on
                found = {"error": one_line(error, self.place)}
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.put(**{group: {**self.data.get(group, {}), name: found}})
        return value


def one_line(error: BaseException, place: Path) -> str:
    """Return an error as one line without the paths of this machine."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text.replace(str(place), "PLACE").replace(str(ROOT), "ROOT")[:500]


def finite(value: Any) -> Any:
    """Return a value with numbers that JSON does not have as text."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def wait(device: str) -> None:
    """Wait until the GPU has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed_calls(run: Callable[[], Any], setup: Setup, seconds: float) -> dict[str, Any]:
    """Return the median time of a call (on a GPU between events, with cold caches), its quartiles, and the time of calls in a row.

    `seconds` is about how long the measurement takes; at least 5 and at most 50 calls are timed.
    """
    run()
    wait(setup.device)
    began = time.perf_counter()
    run()
    wait(setup.device)
    rounds = max(5, min(50, int(seconds / 2 / max(time.perf_counter() - began, 1e-6))))
    began = time.perf_counter()
    for _ in range(rounds):
        run()
    wait(setup.device)
    in_a_row = (time.perf_counter() - began) / rounds
    times = sorted(_events(run, rounds) if setup.on_gpu else _clock(run, rounds))
    return {
        "seconds": statistics.median(times), "quartiles": [times[rounds // 4], times[3 * rounds // 4]],
        "seconds_in_a_row": in_a_row, "rounds": rounds,
    }  # fmt: skip


def _events(run: Callable[[], Any], rounds: int) -> list[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(rounds)]
    for begin, end in pairs:
        flush.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


def _clock(run: Callable[[], Any], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return times


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest expected value."""
    expected = expected.double().cpu()
    return float((found.double().cpu() - expected).abs().max() / expected.abs().max())


def words(vocabulary: int) -> list[str]:
    """Return the words of the tokenizer below, one for each token that is not special."""
    return [f"w{number}" for number in range(len(SPECIAL), vocabulary)]


def add_tokenizer(directory: Path, vocabulary: int) -> None:
    """Save a tokenizer of whole words, `w3` and so on, beside a checkpoint."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate([*SPECIAL, *words(vocabulary)])}
    made = Tokenizer(models.WordLevel(numbers, unk_token=SPECIAL[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, begin, end = SPECIAL
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token=pad, bos_token=begin, eos_token=end).save_pretrained(
        directory
    )


def write_lines(file: Path, vocabulary: int, lines: int, length: int, seed: int = SEED) -> Path:
    """Write lines of random words and return the file."""
    draw, known = random.Random(seed), words(vocabulary)
    file.write_text("".join(" ".join(draw.choices(known, k=length)) + "\n" for _ in range(lines)))
    return file


def llama_checkpoint(directory: Path, size: Size) -> Path:
    """Write a random Llama checkpoint in bfloat16 with a tokenizer, and return its directory."""
    make_checkpoint(directory, size)
    add_tokenizer(directory, size.vocab_size)
    return directory
