"""Measure folds of published models as a user makes them, by the command line: quality, seconds, memory and bytes.

    python benchmarks/real.py MODELS --work DIR [--models smollm2,whisper,minilm,mpnet,python] [--rows "NAME;…"] [--seeds 0,1,2]
        [--data DIR] [--long]

MODELS is the folder that `scripts/real_models.py` made (`python`: that `scripts/train_large.py` made), `--data` the folder of WikiText-2
and of the recordings. Every fold is a process of its own; its peak memory is what the system reports of it, a GPU's not included. Folds
without a refit, and those of a budget, take statistics measured before; the others calibrate themselves, which their seconds include.
Results go to benchmarks/results/real-MODEL.json after each row (real-MODEL-cuda.json where a GPU computed); a run goes on where an
earlier one stopped, and processes may measure other rows or seeds of one model at the same time, each with its own `--work`.
Loss is in nats per token, against the original on the same text.
"""

import argparse
import fcntl
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from machine import describe

import headfold

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[2] / "shared" / "data"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

PUBLISHED: dict[str, tuple[str, ...]] = {
    "mean": ("--merge", "mean", "--group", "contiguous", "--no-refit"),
    "procrustes+norm": ("--merge", "procrustes:norm=true", "--group", "swap:cost=procrustes", "--no-refit"),
    "qcqa-ac": ("--merge", "mean", "--group", "qcqa:unequal=true", "--no-refit"),
    "asymgqa": ("--merge", "mean", "--group", "asymgqa", "--no-refit"),
}
MODEL = ("--heal", "--heal-by", "model")
OURS: dict[str, tuple[str, ...]] = {
    "absorb": ("--no-refit",), "absorb+refit": (), "absorb+refit+heal by block": ("--heal", "--heal-by", "block"),
    "absorb+refit+heal": MODEL,
}  # fmt: skip
WIDE, UNEQUAL = ("--head-dim-multiple", "2"), ("--group", "swap:unequal=true")

SHORT = {"context 1024": (1024, 10240), "context 2048": (2048, 8192), "context 8192": (8192, 8192)}
LONG = SHORT | {"64 windows of 1024": (1024, 65536), "8 windows of 8192": (8192, 65536)}
"""What SmolLM2 is measured on: tokens per window, and in all."""

Row = tuple[str, str, tuple[str, ...]]
"""Name, K/V heads (or the share of a budget, with %), and options of `headfold fold`."""

HEALED = {"absorb+refit+heal": (*MODEL, "--heal-tokens", "262144")}
"""About all tokens of the calibration text, once."""
SMOLLM2: tuple[Row, ...] = (
    *((name, "1", how) for name, how in {**PUBLISHED, **OURS, **HEALED}.items()),
    ("budget", "66.7%", UNEQUAL),
    ("unequal", "2", UNEQUAL),
    ("unequal+heal", "2", (*UNEQUAL, *MODEL)),
)
"""Of 3 K/V heads no pair can be one of twice the head_dim, so there is no such row."""
WHISPER: tuple[Row, ...] = tuple(
    (name, count, how) for count in ("3", "1") for name, how in {**PUBLISHED, **OURS}.items()
) + (
    *(("absorb+refit by block", count, ("--refit-by", "block")) for count in ("3", "1")),
    ("absorb+refit, encoder too", "3", ("--encoder",)),
    ("wide", "2", WIDE),
    ("unequal", "4", UNEQUAL),
)
WHISPER_NARROW: tuple[Row, ...] = tuple(("absorb+refit, prompts alone", count, ()) for count in ("3", "1"))
"""Calibrated on one speaker and one subject; the others see synthetic speech of WikiText too."""
MINILM: tuple[Row, ...] = tuple(
    (name, count, how)
    for count in ("6", "3")
    for name, how in {**PUBLISHED, "absorb": OURS["absorb"], "absorb+refit": ()}.items()
)
MPNET: tuple[Row, ...] = tuple(
    (name, "6", how) for name, how in {"mean": PUBLISHED["mean"], "absorb": OURS["absorb"], "absorb+refit": ()}.items()
)
MPNET_ITEMS, MPNET_CONTEXT, MPNET_MEASURED = "384", "64", 200
"""Calibration sentences, tokens that they are cut at, and sentences to measure on: what two cores do in minutes, of a model five times as
large as MiniLM. They give more than 16 positions for each input dim, the least that carry over to other data."""
PYTHON: tuple[Row, ...] = tuple(
    (name, count, how)
    for count in ("6", "3", "1")
    for name, how in {**{name: PUBLISHED[name] for name in ("mean", "procrustes+norm", "asymgqa")}, **OURS}.items()
)


def command(*words: str | Path) -> tuple[Any, float, int]:
    """Run `headfold` with these words; return its JSON, its seconds and its peak memory in bytes."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "headfold", *map(str, words), "--json"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as pipe:
        text = pipe.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"headfold {' '.join(map(str, words))}: exit code {process.returncode}")
    return json.loads(text), time.monotonic() - started, usage.ru_maxrss * 1024


class Bench:
    """A model, its calibration data, and how its folds are measured."""

    def __init__(
        self,
        model: Path,
        work: Path,
        calibration: tuple[str, ...],
        score: Callable[[Path], dict[str, Any]],
    ) -> None:
        self.model, self.work, self.score = model, work, score
        self._calibration = calibration
        work.mkdir(parents=True, exist_ok=True)

    def statistics_of(self, seed: int) -> Path:
        """Return the file of statistics of a seed, measured once."""
        path = self.work / f"stats-{seed}.safetensors"
        if not path.exists():
            command("calibrate", self.model, path, *self._calibration, "--seed", str(seed))
        return path

    def fold(self, row: Row, seed: int) -> dict[str, Any]:
        """Fold, verify and measure once."""
        _, kv_heads, how = row
        out, plan = self.work / "folded", self.work / "plan.json"
        data: tuple[Any, ...] = (*self._calibration, "--seed", str(seed))
        if "--no-refit" in how or kv_heads.endswith("%"):
            data = ("--stats", self.statistics_of(seed), "--seed", str(seed))
        shutil.rmtree(out, ignore_errors=True)
        resumed = out.with_name(f"{out.name}.partial").exists()
        planning = 0.0
        words: tuple[Any, ...] = ("--kv-heads", kv_heads)
        if kv_heads.endswith("%"):
            _, planning, _ = command("plan", self.model, plan, "--kv-budget", kv_heads, *how, *data, "--force")
            words, how = ("--plan", plan), ()
        made, seconds, memory = command("fold", self.model, out, *words, *how, *data)
        # A fold that goes on from a killed run took longer than this one, and more memory perhaps.
        taken = {} if resumed else {
            "seconds": round(seconds + planning, 1), "stages": {k: round(v, 1) for k, v in made["seconds"].items() if v},
            "peak_bytes": memory,
        }  # fmt: skip
        return {
            **taken, "kv_bytes_per_token": made["after"]["kv_bytes_per_token"],
            "weight_bytes": made["after"]["weight_bytes"], **self.score(out),
        }  # fmt: skip


def language_model(
    model: Path, text: Path, contexts: Mapping[str, tuple[int, int]]
) -> Callable[[Path], dict[str, Any]]:
    """Return a function that measures a language model against the original, by name on windows of a length, of so many tokens in all."""

    def score(made: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, (context, limit) in contexts.items():
            reference = None if made == model else model
            one = headfold.eval(made, reference=reference, text=str(text), context=context, limit=limit)
            row = {"nll": one.nll, "perplexity": one.perplexity}
            if reference is not None:
                pairs = zip(one.nll_by_position, one.reference_nll_by_position, strict=True)
                row |= {
                    "loss_increase": one.nll - one.reference_nll,
                    "kl": one.kl,
                    "same_top_token": one.top1_agreement,
                }
                row["loss_increase_by_position"] = [round(mine - theirs, 4) for mine, theirs in pairs]
            found[name] = row
        return found

    return score


def transcripts(made: Path, files: list[Path]) -> tuple[list[str], float]:
    """Return what a Whisper writes for recordings, greedily, and the seconds it took."""
    import soundfile
    from transformers import AutoModelForSpeechSeq2Seq, WhisperFeatureExtractor, WhisperTokenizerFast

    extractor, tokenizer = (kind.from_pretrained(made) for kind in (WhisperFeatureExtractor, WhisperTokenizerFast))
    model = AutoModelForSpeechSeq2Seq.from_pretrained(made, dtype=torch.float32, trust_remote_code=True).eval()
    model = model.to(DEVICE)
    started, written = time.monotonic(), []
    for first in range(0, len(files), 16):
        sounds = [soundfile.read(file)[0] for file in files[first : first + 16]]
        features = extractor(sounds, sampling_rate=16000, return_tensors="pt").input_features.to(DEVICE)
        with torch.no_grad():
            ids = model.generate(features, max_new_tokens=128, do_sample=False)
        written += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return written, time.monotonic() - started


def plain(text: str) -> str:
    """Return the words alone: lower case, no punctuation."""
    return " ".join("".join(c if c.isalnum() or c == "'" else " " for c in text.lower()).split())


def wrong_words(said: list[str], heard: list[str]) -> tuple[int, int]:
    """Return the number of wrong words, and of words."""
    import jiwer

    found = jiwer.process_words([plain(text) for text in said], [plain(text) for text in heard])
    return found.substitutions + found.deletions + found.insertions, sum(len(plain(text).split()) for text in said)


def speech_model(model: Path, data: Path) -> Callable[[Path], dict[str, Any]]:
    """Return a function that measures a Whisper: against the original's own transcripts, and against what was said."""
    prompts = sorted((data / "test").glob("*.flac"))
    sentences = sorted((data / "librivox").glob("*.flac"))
    said = [file.with_suffix(".txt").read_text() for file in sentences]
    own, _ = transcripts(model, prompts)

    def score(made: Path) -> dict[str, Any]:
        (heard, seconds), (read, _) = transcripts(made, prompts), transcripts(made, sentences)
        differing, words = wrong_words(own, heard)
        wrong, spoken = wrong_words(said, read)
        return {
            "words": words, "differing_words": differing, "differing_share": differing / words, "spoken_words": spoken,
            "wrong_words": wrong, "word_error_rate": wrong / spoken, "transcription_seconds": round(seconds, 1),
        }  # fmt: skip

    return score


def mixed_speech(recorded: Path, text: Path, folder: Path) -> Path:
    """Return a folder with these recordings and synthetic ones of a text, made once."""
    if not folder.exists():
        script = Path(__file__).parents[1] / "scripts" / "synthetic_speech.py"
        making = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(making, ignore_errors=True)
        subprocess.run([sys.executable, script, text, making, "--clips", "480"], check=True)
        for file in recorded.iterdir():
            shutil.copy(file, making)
        making.rename(folder)
    return folder


def encoder(model: Path, text: Path, limit: int) -> Callable[[Path], dict[str, Any]]:
    """Return a function that measures a sentence encoder by the cosine of its embeddings to the original's."""

    def score(made: Path) -> dict[str, Any]:
        if made == model:
            return {"cosine": 1.0}
        return {"cosine": headfold.eval(made, reference=model, text=str(text), limit=limit).measured.cosine}

    return score


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of every figure over the runs that have it; lists by element."""
    found: dict[str, Any] = {}
    for key, value in {key: value for run in runs for key, value in run.items()}.items():
        if key == "seed":
            continue
        values = [run[key] for run in runs if key in run]
        if isinstance(value, dict):
            found[key] = medians(values)
        elif isinstance(value, list):
            found[key] = [statistics.median(column) for column in zip(*values, strict=True)]
        else:
            found[key] = statistics.median(values)
    return found


def measured(bench: Bench, name: str, rows: tuple[Row, ...], options: argparse.Namespace) -> None:
    """Measure the rows and seeds that are not there yet, and write the table after each run."""
    out = options.out / f"real-{name}{'-cuda' if torch.cuda.is_available() else ''}.json"
    wanted = [row for row in rows if not options.rows or row[0] in options.rows.split(";")]
    for seed in map(int, options.seeds.split(",")):
        for row in (("original", "", ()), *wanted):
            method, kv_heads, _ = row
            have = runs_of(out).get((method, kv_heads), [])
            if seed in seeds(have) or (have and method == "original"):
                continue
            print(f"{name}: {method} {kv_heads}, seed {seed}", flush=True)
            made = bench.score(bench.model) if method == "original" else bench.fold(row, seed)
            write_run(out, name, (method, kv_heads), {"seed": seed, **made})


def seeds(runs: list[dict[str, Any]]) -> set[int]:
    """Return the calibration seeds of runs; those that do not tell have the numbers from 0 on, in order."""
    return {run.get("seed", number) for number, run in enumerate(runs)}


def runs_of(table: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the runs of a table by method and K/V heads."""
    rows = json.loads(table.read_text())["rows"] if table.exists() else []
    return {(row["method"], row["kv_heads"]): row["runs"] for row in rows}


def write_run(table: Path, name: str, key: tuple[str, str], run: dict[str, Any]) -> None:
    """Add a run to a table that other processes may write to."""
    table.parent.mkdir(parents=True, exist_ok=True)
    with (table.parent / f".{table.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs = runs_of(table)
        runs.setdefault(key, []).append(run)
        rows = [
            {"method": method, "kv_heads": count, "num_seeds": len(found), **medians(found), "runs": found}
            for (method, count), found in runs.items()
        ]
        written = json.dumps({"machine": describe(), "model": name, "rows": rows}, indent=1)
        making = table.with_suffix(".partial")
        making.write_text(written + "\n")
        making.replace(table)


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("directory", type=Path, help="the folder that scripts/real_models.py made")
    reader.add_argument("--work", type=Path, required=True, help="folder of statistics and folds")
    reader.add_argument("--data", type=Path, default=DATA, help="folder with wikitext2, speech and dialogsum")
    reader.add_argument("--models", default="smollm2,whisper,minilm", help="models (python too), separated by commas")
    reader.add_argument("--rows", default="", help="rows, separated by ; (default: all)")
    reader.add_argument("--seeds", default="0,1,2", help="seeds of calibration and training, separated by commas")
    reader.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables")
    reader.add_argument("--long", action="store_true", help="measure SmolLM2 on more windows")
    options = reader.parse_args()
    data, chosen = options.data, options.models.split(",")
    if "smollm2" in chosen:
        model, text = options.directory / "smollm2-135m-instruct", data / "wikitext2" / "test.txt"
        contexts = LONG if options.long else SHORT
        calibration = ("--calibration", str(data / "wikitext2" / "valid.txt"), "--tokens", "65536")
        bench = Bench(model, options.work / "smollm2", calibration, language_model(model, text, contexts))
        measured(bench, "smollm2-135m-instruct", SMOLLM2, options)
    if "whisper" in chosen:
        model, speech = options.directory / "whisper-tiny.en", data / "speech"
        prompts, score = speech / "calibration", speech_model(model, speech)
        mixed = mixed_speech(prompts, data / "wikitext2" / "valid.txt", options.work / "speech")
        for sources, rows, folder in ((mixed, WHISPER, "whisper"), (prompts, WHISPER_NARROW, "whisper-narrow")):
            bench = Bench(model, options.work / folder, ("--calibration", str(sources)), score)
            measured(bench, "whisper-tiny.en", rows, options)
    if "minilm" in chosen:
        model, text = options.directory / "all-minilm-l6-v2", data / "wikitext2"
        calibration = ("--calibration", str(text / "valid.txt"))
        bench = Bench(model, options.work / "minilm", calibration, encoder(model, text / "test.txt", 1000))
        measured(bench, "all-minilm-l6-v2", MINILM, options)
    if "mpnet" in chosen:
        model, text = options.directory / "all-mpnet-base-v2", data / "wikitext2"
        calibration = ("--calibration", str(text / "valid.txt"), "--items", MPNET_ITEMS, "--context", MPNET_CONTEXT)
        bench = Bench(model, options.work / "mpnet", calibration, encoder(model, text / "test.txt", MPNET_MEASURED))
        measured(bench, "all-mpnet-base-v2", MPNET, options)
    if "python" in chosen:
        model = options.directory
        calibration = ("--calibration", str(model / "calibration.txt"), "--tokens", "65536")
        score = language_model(model, model / "heldout.txt", {"context 1024": (1024, 65536)})
        measured(Bench(model, options.work / "python", calibration, score), "python-105m", PYTHON, options)


if __name__ == "__main__":
    main()
