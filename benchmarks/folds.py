"""Make folds as a user makes them and measure them: what wide.py, budgets.py and healing.py share; methods.py: the options."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import headfold

RESULTS = Path(__file__).parent / "results"
DATA = ("text", "calibration", "limit", "tokens", "items", "context")
"""Options that say what is measured on what."""


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser of the model, its data, and where folds lie for a while."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("model", help="checkpoint directory or hub id")
    made.add_argument("--name", required=True, help="the model's name in results")
    made.add_argument("--kv-heads", required=True, help="counts of K/V heads, separated by commas")
    made.add_argument("--text", help="source of the data to measure on")
    made.add_argument("--calibration", help="source of calibration data")
    made.add_argument("--limit", type=int, help="items to measure on; tokens of plain text")
    made.add_argument("--tokens", type=int, help="calibration tokens of a language model")
    made.add_argument("--items", type=int, help="calibration items of other models")
    made.add_argument("--context", type=int, help="tokens per window")
    made.add_argument("--columns", default="", help="columns of a table, separated by commas")
    made.add_argument("--seeds", type=int, default=3, help="number of calibration seeds")
    made.add_argument("--work", type=Path, required=True, help="directory of statistics and folds")
    return made


def columns(options: argparse.Namespace) -> list[str]:
    """Return the names of the columns."""
    return [name for name in options.columns.split(",") if name]


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what is measured on what, without the places where it lies."""
    given = {name: getattr(options, name) for name in DATA}
    return {key: Path(v).name if key in ("text", "calibration") and v else v for key, v in given.items()}


def statistics_of(options: argparse.Namespace, seed: int) -> Path:
    """Return the file of statistics of a seed, measured once."""
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / f"stats-{seed}.safetensors"
    if not path.exists():
        headfold.calibrate(
            options.model, path, calibration=options.calibration, tokens=options.tokens, items=options.items,
            columns=columns(options), seed=seed,
        )  # fmt: skip
    return path


def measure(options: argparse.Namespace, seed: int, **how: Any) -> dict[str, Any]:
    """Fold once, verify by reload and measure; `how` goes to `headfold.fold`."""
    made = options.work / "folded"
    started = time.monotonic()
    result = headfold.fold(options.model, made, stats=statistics_of(options, seed), seed=seed, force=True, **how)
    seconds = time.monotonic() - started
    found = headfold.eval(
        made, reference=options.model, text=options.text, limit=options.limit, columns=columns(options), context=options.context,
        max_new_tokens=0,
    )  # fmt: skip
    metric, value, original, loss_increase, kl = scored_evaluation(found)
    config = json.loads((made / "config.json").read_text())
    read_by = "headfold's runtime" if "headfold" in config else "code of its own" if "auto_map" in config else "stock"
    row = {
        "metric": metric, "value": value, "original": original, "loss_increase": loss_increase, "kl": kl, "seconds": round(seconds, 1),
        "kv_bytes_per_token": result.after.kv_bytes_per_token, "weight_bytes": result.after.weight_bytes,
        "flops_per_token": result.after.flops_per_token, "class": read_by,
        "verified": result.verification is not None and result.verification.passed,
    }  # fmt: skip
    if result.healed:
        row["heal_seconds"] = result.seconds["heal"]
    if getattr(found, "nll_by_position", None):
        pairs = zip(found.nll_by_position, found.reference_nll_by_position, strict=True)
        row["loss_increase_by_position"] = [round(one - other, 5) for one, other in pairs]
    return row


def scored_evaluation(found: Any) -> tuple[str, float, float | None, float, float | None]:
    """Return the metric of what `headfold.eval` returned, its value, the original's, how much worse that is, and the KL to the original."""
    measured = getattr(found, "measured", found)
    if hasattr(measured, "accuracy"):
        value, original = measured.accuracy, measured.reference_accuracy
        return "accuracy", value, original, original - value, measured.kl
    if hasattr(measured, "cosine"):
        return "cosine", measured.cosine, None, 1 - measured.cosine, None
    return "nll", measured.nll, measured.reference_nll, measured.nll - measured.reference_nll, measured.kl


def divergence(row: dict[str, Any]) -> float:
    """Return the KL to the original where there is one, as losses of accuracy are a few images; else the loss increase."""
    return row["loss_increase"] if row["kl"] is None else row["kl"]
