"""The whole inputs that a campaign corrupts: tiny random models, data of every kind, and what headfold makes of them."""

import fcntl
import gzip
import json
import shutil
import wave
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headfold.train.trainer import COMPLETE_MARK

from . import traps
from .models import MODELS, shard, write_model
from .running import Outcome, run

LINE = "the quick brown fox jumps over the lazy dog, and then again.\n"
UNFINISHED = ("--steps", "3", "--batch", "2", "--context", "16", "--save-every", "1", "--data", "text.txt")
SMALL = ("--tokens", "256", "--context", "32")
ITEMS = ("--items", "8")
PAIRS = ("--calibration", "pairs.jsonl", "--columns", "source,target", *ITEMS)
TEXT = ("--calibration", "text.txt", *SMALL)
HEALED = ("--kv-heads", "2", "--heal", "--heal-tokens", "64", *TEXT)
COMPARED = ("--kv-heads", "2", "--methods", "mean,absorb", "--limit", "64", "--text", "text.txt", *TEXT)
EXPLORED = ("--measure", "1", "--stats", "stats.safetensors")
_AS_THEY_ARE = ("--merge", "mean", "--group", "contiguous", "--no-refit")

DATA = frozenset({
    "text.txt", "lines.jsonl", "pairs.jsonl", "pairs.csv", "pairs.parquet", "pairs.en", "pairs.de", "pairs.en.gz", "pairs.de.gz", "images",
    "captions.jsonl", "sounds",
})  # fmt: skip
_COMMANDS: dict[str, tuple[str, ...]] = {
    "stats.safetensors": ("calibrate", "llama", "stats.safetensors", *TEXT),
    "plan.json": ("plan", "llama", "plan.json", "--kv-heads", "2", "--stats", "stats.safetensors"),
    # It writes both files.
    "sensitivity.json": (
        "plan", "llama", "budget.json", "--kv-budget", "40%", "--stats", "stats.safetensors", "--sensitivity", "sensitivity.json",
    ),
    "folded": ("fold", "llama", "folded", "--kv-heads", "2", *TEXT),
    "layered": ("fold", "llama", "layered", "--plan", "budget.json", *TEXT, "--layout", "per-layer"),
    "folded-t5": ("fold", "t5", "folded-t5", "--kv-heads", "2", *PAIRS),
    "folded-bert": ("fold", "bert", "folded-bert", "--kv-heads", "2", *_AS_THEY_ARE, "--no-verify"),
}  # fmt: skip
_BROKEN_OFF: dict[str, tuple[tuple[str, ...], float]] = {
    "trained.partial": (("uptrain", "folded", "trained", *UNFINISHED), 0.75),
    "early.partial": (("uptrain", "folded", "early", *UNFINISHED), 0.4),
    "healed.partial": (("fold", "llama", "healed", *HEALED), 0.75),
    "compared": (("compare", "llama", "--out", "compared", *COMPARED), 0.75),
    "explored": (("frontier", "llama", "explored", *EXPLORED), 0.75),
}
"""What a command leaves that is killed at a share of its events."""
NAMES = frozenset({*MODELS, "sharded", *DATA, *_COMMANDS, *_BROKEN_OFF})
"""What commands read."""
_MADE_WITH = {"budget.json": "sensitivity.json"}


def ensure(root: Path, names: Iterable[str]) -> None:
    """Write those of `NAMES` to `root` that are not there yet; several processes may ask for them."""
    absent = [name for name in names if not _mark(root, name).exists()]
    if absent:
        _mark(root, "").mkdir(parents=True, exist_ok=True)
        with (root / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name in absent:
                _make(root, name)


def _mark(root: Path, name: str) -> Path:
    return root / ".made" / name


def _make(root: Path, name: str) -> None:
    if _mark(root, name).exists():
        return
    words, share = _BROKEN_OFF.get(name, (_COMMANDS.get(name, ()), 0.0))
    for word in (_MADE_WITH.get(word, word) for word in words):
        if word in NAMES and word != name:
            _make(root, word)
    if name in MODELS:
        write_model(root, name)
    elif name == "sharded":
        _make(root, "llama")
        shard(root / "llama", root / "sharded")
    elif name in DATA:
        write_data(root)
        for other in DATA:
            _mark(root, other).touch()
    elif share:
        _break_off(root, name, words, share)
    else:
        made(run(words, root, limit=300), words)
    _mark(root, name).touch()


def _break_off(root: Path, name: str, words: tuple[str, ...], share: float) -> None:
    """Leave the unfinished directory of a command."""
    out, counted = root / name.removesuffix(".partial"), root.with_name("events")
    made(run(words, root, before=traps.counting(root, counted), limit=300), words)
    shutil.rmtree(out)
    run(words, root, before=traps.at(root, int(int(counted.read_text()) * share), traps.killed))
    counted.unlink()
    for lock in (root / f".{out.name}.headfold-lock", out / ".headfold-lock"):
        lock.unlink(missing_ok=True)
    if name == "early.partial":
        for mark in (root / name).rglob(COMPLETE_MARK):
            mark.write_bytes(b"")  # as an earlier version of headfold left it, without digests of the files


def made(outcome: Outcome, words: tuple[Any, ...]) -> None:
    """Check that a command on whole inputs succeeds."""
    if outcome.code or outcome.hung:
        raise RuntimeError(f"headfold {' '.join(map(str, words))}: exit code {outcome.code}: {outcome.err[-2000:]}")


@contextmanager
def copied(root: Path, folder: Path, needs: tuple[str, ...]) -> Iterator[Path]:
    """Copy some of the sources to a folder of their own, which is removed at the end."""
    ensure(root, needs)
    folder.mkdir(parents=True)
    for name in needs:
        whole = root / name
        shutil.copytree(whole, folder / name) if whole.is_dir() else shutil.copyfile(whole, folder / name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def write_data(root: Path) -> None:
    """Write all of `DATA`."""
    rows = [{"source": f"the dog {n}", "target": f"a fox {n}"} for n in range(24)]
    (root / "text.txt").write_text(LINE * 40)
    (root / "lines.jsonl").write_text("".join(json.dumps({"text": LINE * 2}) + "\n" for _ in range(24)))
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "pairs.csv").write_text("source,target\n" + "".join(f"{row['source']},{row['target']}\n" for row in rows))
    for name, side in (("pairs.en", "source"), ("pairs.de", "target")):
        (root / name).write_text("".join(row[side] + "\n" for row in rows))
        (root / f"{name}.gz").write_bytes(gzip.compress((root / name).read_bytes(), mtime=0))
    _write_tables(root, rows)
    _write_sounds(root / "sounds")


def _write_tables(root: Path, rows: list[dict[str, str]]) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    pq.write_table(pa.table({name: [row[name] for row in rows] for name in rows[0]}), root / "pairs.parquet")
    (root / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(8):
        pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
    captions = [{"image": f"images/{number}.png", "text": f"the dog {number}"} for number in range(8)]
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))


def _write_sounds(folder: Path) -> None:
    """Write eight recordings of a quarter of a second or less, with transcripts."""
    import numpy as np

    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(8):
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
            file.writeframes(generator.integers(-9000, 9000, 1000 + 100 * number).astype("<i2").tobytes())
        (folder / f"{number}.txt").write_text(f"the fox {number}\n")
