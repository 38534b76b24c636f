"""The section of `gpu.py` that compares what the device computes with the CPU in float64, for every family."""

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_setup import ROOT, SEED, Record, Setup, add_tokenizer, one_line, relative_error, write_lines
from torch import Tensor

import headfold

FEW = ("llama", "t5", "bert")
"""Families of a dry run, whose folds are also made a second time, on the CPU."""
CALIBRATED = ("text", "pairs", "sentences")
"""Kinds of data that are calibrated on here; folds of other models are means, which need no data."""
TOLERANCE = 1e-4
WITH_CPU = 2.0
"""An error may be so many times that of the CPU in float32, where that is above the tolerance."""
MEAN: dict[str, Any] = {"merge": "mean", "group": "contiguous", "refit": False}
"""Options of a fold without data."""
NOTHING_TO_FOLD = {"falcon-multi-query"}
NEW_TOKENS = 6


def correctness(setup: Setup, record: Record) -> None:
    """Fold a tiny model of every family on the device, and compare its outputs there in float32 with the CPU's in float64."""
    if not (ROOT / "tests" / "tiny.py").is_file() or importlib.util.find_spec("pytest") is None:
        record.put(skipped="tests/tiny.py or pytest is missing")
        return
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    names = FEW if setup.dry_run else [*FEW, *sorted({*tiny.TINY, *tiny.FOREIGN} - {*FEW} - NOTHING_TO_FOLD)]
    record.put(tolerance=TOLERANCE, times_cpu=WITH_CPU, families=len(names))
    for name in names:
        record.row("rows", name, lambda: family_row(setup, tiny, name), 0 if setup.dry_run else 3)  # noqa: B023
        tried = [row for row in record.data["rows"].values() if "skipped" not in row]
        errors = [row["relative_error"] for row in tried if "relative_error" in row]
        record.put(
            compared=len(errors), greatest=max(errors, default=None),
            passed=bool(errors) and all(row.get("passed", False) for row in tried),
        )  # fmt: skip


def family_row(setup: Setup, tiny: Any, name: str) -> dict[str, Any]:
    """Return the errors of one family."""
    kind = tiny.FOREIGN[name].kind if name in tiny.FOREIGN else "text"
    place = setup.place / name
    source = place / "source"
    shutil.copytree(tiny.tiny_checkpoint(name, torch.float32), source)
    how = calibration(place, source, kind, tiny.VOCABULARY)
    refused: str | None = None
    try:
        result = headfold.fold(source, place / "fold", kv_heads="1/2", device=setup.device, seed=SEED, **how)
    except ValueError as error:  # transformers reads the tokenizer of some model types (qwen2) as one of another kind
        refused, how = one_line(error, setup.place), MEAN
        shutil.rmtree(source)
        shutil.copytree(tiny.tiny_checkpoint(name, torch.float32), source)  # without the tokenizer
        result = headfold.fold(source, place / "fold", kv_heads="1/2", seed=SEED, force=True, **how)
    sample = tiny.tiny_sample(name)
    exact = answers(place / "fold", "cpu", torch.float64, tiny, sample)
    found = relative_error(answers(place / "fold", setup.device, torch.float32, tiny, sample), exact)
    cpu = (
        found
        if not setup.on_gpu
        else relative_error(answers(place / "fold", "cpu", torch.float32, tiny, sample), exact)
    )
    row: dict[str, Any] = {
        "kind": kind, "calibrated": how is not MEAN, "calibration_refused": refused,
        "refitted": result.refitted, "relative_error": found, "cpu_relative_error": cpu,
        "passed": found <= max(TOLERANCE, WITH_CPU * cpu),
    }  # fmt: skip
    if kind == "text":
        row["generated"] = generated(setup, place / "fold", sample["input_ids"])
    if name in FEW and setup.on_gpu:
        headfold.fold(source, place / "fold-cpu", kv_heads="1/2", device="cpu", seed=SEED, **how)
        row["from_fold_on_cpu"] = relative_error(exact, answers(place / "fold-cpu", "cpu", torch.float64, tiny, sample))
    return row


def calibration(place: Path, source: Path, kind: str, vocabulary: int) -> dict[str, Any]:
    """Return the options of a fold: with data of random words where the model reads text, else those of a mean."""
    if kind not in CALIBRATED:
        return MEAN
    add_tokenizer(source, vocabulary)
    lines = write_lines(place / "text.en", vocabulary, 64, 12)
    data: dict[str, Any] = {"calibration": str(lines), "dtype": "float32"}
    if kind == "text":
        return data | {"tokens": 512, "context": 16}
    if kind == "pairs":
        data["calibration"] = f"{lines},{write_lines(place / 'text.de', vocabulary, 64, 10, SEED + 1)}"
    return data | {"items": 48, "context": 14}


@torch.no_grad()
def answers(directory: Path, device: str, dtype: torch.dtype, tiny: Any, sample: dict[str, Tensor]) -> Tensor:
    """Return what the model of a fold answers to the sample, computed without TF32 on a device."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = headfold.load(directory, dtype=dtype, experts_implementation="eager").to(device)
    placed = {name: t.to(device, dtype if t.is_floating_point() else None) for name, t in sample.items()}
    return tiny.answer_of(model, placed).cpu()


@torch.no_grad()
def generated(setup: Setup, directory: Path, prompt: Tensor) -> dict[str, Any]:
    """Return whether `generate` writes the same tokens on the device in float32 as on the CPU in float64, and the logits' error up
    to there.
    """
    found = []
    for device, dtype in ((setup.device, torch.float32), ("cpu", torch.float64)):
        model = headfold.load(directory, dtype=dtype, experts_implementation="eager").to(device)
        output = model.generate(
            prompt.to(device), attention_mask=torch.ones_like(prompt).to(device), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        found.append((output.sequences.cpu(), torch.stack(output.logits).cpu()))
    (tokens, logits), (expected, exact) = found
    same = torch.equal(tokens, expected)
    steps = NEW_TOKENS if same else 1
    return {"same_tokens": same, "relative_error": relative_error(logits[:steps], exact[:steps])}
