"""Folds as a user makes them, verified by reload and measured: what wide.py, budgets.py and healing.py share; methods.py: the options."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from headfold.recipe import calibrate, evaluate, fold
from headfold.recipe.comparing import scored

RESULTS = Path(__file__).parent / "results"
DATA = ("text", "calibration", "limit", "tokens", "items", "context")
"""Options that say what is measured on what."""


def parser(doc: str) -> argparse.ArgumentParser:
    """The model, its data, and where folds lie for a while."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("model")
    made.add_argument("--name", required=True)
    made.add_argument("--kv-heads", required=True)
    made.add_argument("--text")
    made.add_argument("--calibration")
    made.add_argument("--limit", type=int)
    made.add_argument("--tokens", type=int)
    made.add_argument("--items", type=int)
    made.add_argument("--context", type=int)
    made.add_argument("--columns", default="")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--work", type=Path, required=True)
    return made


def columns(options: argparse.Namespace) -> list[str]:
    return [name for name in options.columns.split(",") if name]


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What was measured on what, without the places where it lies."""
    given = {name: getattr(options, name) for name in DATA}
    return {key: Path(v).name if key in ("text", "calibration") and v else v for key, v in given.items()}


def statistics_of(options: argparse.Namespace, seed: int) -> Path:
    """Measured once per seed."""
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / f"stats-{seed}.safetensors"
    if not path.exists():
        calibrate(
            options.model, path, calibration=options.calibration, tokens=options.tokens, items=options.items,
            columns=columns(options), seed=seed,
        )  # fmt: skip
    return path


def measure(options: argparse.Namespace, seed: int, **how: Any) -> dict[str, Any]:
    """One fold: `how` goes to `recipe.fold`."""
    made = options.work / "folded"
    started = time.monotonic()
    result = fold(options.model, made, stats=statistics_of(options, seed), seed=seed, force=True, **how)
    seconds = time.monotonic() - started
    more = {} if options.context is None else {"context": options.context}
    found = evaluate(
        made, reference=options.model, text=options.text, limit=options.limit, columns=columns(options), max_new_tokens=0, **more
    )  # fmt: skip
    metric, value, original, rise, kl = scored(found)
    config = json.loads((made / "config.json").read_text())
    read_by = "headfold's runtime" if "headfold" in config else "code of its own" if "auto_map" in config else "stock"
    row = {
        "metric": metric, "value": value, "original": original, "rise": rise, "kl": kl, "seconds": round(seconds, 1),
        "kv_bytes_per_token": result.after.kv_bytes_per_token, "weight_bytes": result.after.weight_bytes,
        "flops_per_token": result.after.flops_per_token, "class": read_by,
        "verified": result.verification is not None and result.verification.passed,
    }  # fmt: skip
    if result.healed:
        row["heal_seconds"] = result.seconds["heal"]
    if getattr(found, "nll_by_position", None):
        pairs = zip(found.nll_by_position, found.reference_nll_by_position, strict=True)
        row["rise_by_position"] = [round(one - other, 5) for one, other in pairs]
    return row


def loss(row: dict[str, Any]) -> float:
    """KL to the original where there is one: rises of accuracy are a few images."""
    return row["rise"] if row["kl"] is None else row["kl"]
