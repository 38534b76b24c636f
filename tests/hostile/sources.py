"""The whole inputs that a campaign corrupts: tiny random models, data of every kind, and what headfold makes of them."""

import gzip
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_checkpoint

from . import traps
from .running import Outcome, run

VOCABULARY = 260
"""Four special tokens and all bytes."""
LINE = "the quick brown fox jumps over the lazy dog, and then again.\n"
CARD = "---\nlicense: apache-2.0\ntags:\n- tiny\nlanguage: en\n---\n# A tiny model\n\nIt is random.\n"
UNFINISHED = ("--steps", "3", "--batch", "2", "--context", "16", "--save-every", "1", "--data", "text.txt")
SMALL = ("--tokens", "256", "--context", "32")
MODELS = ("llama", "gpt2", "t5", "bert", "vit")
NAMES = frozenset({
    *MODELS, "sharded", "folded", "layered", "folded-t5", "stats.safetensors", "plan.json", "sensitivity.json", "text.txt", "lines.jsonl",
    "pairs.jsonl", "pairs.csv", "pairs.parquet", "pairs.en", "pairs.de", "pairs.en.gz", "pairs.de.gz", "images", "trained.partial",
    "healed.partial",
})  # fmt: skip
"""What `make` writes and commands read."""
ITEMS = ("--items", "8")
PAIRS = ("--calibration", "pairs.jsonl", "--columns", "source,target", *ITEMS)


def make(root: Path) -> None:
    """Write all sources to `root`, which does not exist yet."""
    root.mkdir(parents=True)
    _write_data(root)
    for name in MODELS:
        _write_model(root, name)
    _shard(root / "llama", root / "sharded")
    commands: tuple[tuple[Any, ...], ...] = (
        ("calibrate", "llama", "stats.safetensors", "--calibration", "text.txt", *SMALL),
        ("plan", "llama", "plan.json", "--kv-heads", "2", "--stats", "stats.safetensors"),
        ("plan", "llama", "budget.json", "--kv-budget", "40%", "--stats", "stats.safetensors", "--sensitivity", "sensitivity.json"),
        ("fold", "llama", "folded", "--kv-heads", "2", "--calibration", "text.txt", *SMALL),
        ("fold", "llama", "layered", "--plan", "budget.json", "--calibration", "text.txt", *SMALL, "--layout", "per-layer"),
        ("fold", "t5", "folded-t5", "--kv-heads", "2", *PAIRS),
    )  # fmt: skip
    for words in commands:
        made(run(words, root, limit=300), words)
    _break_off(root, "trained", ("uptrain", "folded", "trained", *UNFINISHED))
    _break_off(
        root,
        "healed",
        (
            "fold",
            "llama",
            "healed",
            "--kv-heads",
            "2",
            "--heal",
            "--heal-tokens",
            "64",
            "--calibration",
            "text.txt",
            *SMALL,
        ),
    )


def _break_off(root: Path, out: str, words: tuple[str, ...]) -> None:
    """Leave the unfinished directory of a command, which is killed at three quarters of its events."""
    counted = root.with_name("events")
    made(run(words, root, before=traps.counting(root, counted), limit=300), words)
    shutil.rmtree(root / out)
    run(words, root, before=traps.at(root, int(counted.read_text()) * 3 // 4, traps.killed))
    counted.unlink()
    (root / f".{out}.headfold-lock").unlink(missing_ok=True)


def made(outcome: Outcome, words: tuple[Any, ...]) -> None:
    """Check that a command on whole inputs succeeds."""
    if outcome.code or outcome.hung:
        raise RuntimeError(f"headfold {' '.join(map(str, words))}: exit code {outcome.code}: {outcome.err[-2000:]}")


@contextmanager
def copied(root: Path, folder: Path, needs: tuple[str, ...]) -> Iterator[Path]:
    """Copy some of the sources to a folder of their own, which is removed at the end."""
    folder.mkdir(parents=True)
    for name in needs:
        whole = root / name
        shutil.copytree(whole, folder / name) if whole.is_dir() else shutil.copyfile(whole, folder / name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _write_data(root: Path) -> None:
    rows = [{"source": f"the dog {n}", "target": f"a fox {n}"} for n in range(24)]
    (root / "text.txt").write_text(LINE * 40)
    (root / "lines.jsonl").write_text("".join(json.dumps({"text": LINE * 2}) + "\n" for _ in range(24)))
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "pairs.csv").write_text("source,target\n" + "".join(f"{row['source']},{row['target']}\n" for row in rows))
    for name, side in (("pairs.en", "source"), ("pairs.de", "target")):
        (root / name).write_text("".join(row[side] + "\n" for row in rows))
        (root / f"{name}.gz").write_bytes(gzip.compress((root / name).read_bytes(), mtime=0))
    _write_tables(root, rows)


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


def _write_model(root: Path, name: str) -> None:
    import transformers

    sizes = {} if name == "vit" else {"vocab_size": VOCABULARY}
    shutil.copytree(tiny_checkpoint(name, torch.float32, **sizes), root / name)
    (root / name / "README.md").write_text(CARD)
    (root / name / "LICENSE").write_text("none\n")
    if name == "vit":
        transformers.ViTImageProcessor(size={"height": 12, "width": 12}).save_pretrained(root / name)
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = ["<pad>", "<s>", "</s>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(root / name)


def _shard(source: Path, out: Path) -> None:
    """Write a checkpoint in bfloat16 as three shards with an index, the K and V of a layer in different ones."""
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    shutil.copytree(source, out)
    (out / "model.safetensors").unlink()
    config = json.loads((out / "config.json").read_text()) | {"dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    shards = {name: f"model-{1 + number % 3:05d}-of-00003.safetensors" for number, name in enumerate(sorted(tensors))}
    for shard in sorted(set(shards.values())):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, out / shard, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": shards}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
