"""Fold the bundled model to half and a quarter of its K/V heads with three methods, and show what each costs.

    python scripts/demo.py [OUT]

Writes OUT/ (default: demo): the statistics that all folds share, six folded checkpoints, results.json and plot.png.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import headfold
from headfold.reports.plot import plot_perplexity
from headfold.reports.progress import ProgressReport
from headfold.reports.tables import percent, show_table, size

BUNDLED = Path(headfold.__file__).parent / "bundled"
KV_HEADS = ("1/2", "1/4")
CALIBRATION = "stdlib"
"""This machine's Python sources, without the held-out ones: read faster than the model could write a text itself."""
BLOCK, EVERY = 200, 8
"""Measured on every eighth block of 200 lines of the held-out text, to be done in minutes; headfold eval takes it whole."""
METHODS: dict[str, dict[str, Any]] = {
    "absorb": {"merge": "absorb", "group": "swap", "refit": True},
    "procrustes": {"merge": "procrustes:norm=true", "group": "swap:cost=procrustes", "refit": False},
    "mean": {"merge": "mean", "group": "contiguous", "refit": False},
}
"""The default, and the two published baselines (procrustes with norm restoration, which loses less than without)."""


def excerpt(out: Path) -> Path:
    """Write the part of the held-out text that is measured on, and return the file."""
    lines = (BUNDLED / "heldout.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    path = out / "heldout-excerpt.txt"
    path.write_text("".join(line for at, line in enumerate(lines) if at // BLOCK % EVERY == 0), encoding="utf-8")
    return path


def fold_and_measure(out: Path, method: str, kv_heads: str) -> dict[str, Any]:
    """Fold, evaluate beside the original, and return one row of the results."""
    start, stats, text = time.monotonic(), out / "stats.safetensors", out / "heldout-excerpt.txt"
    target = out / f"{method}-{kv_heads.replace('/', '-of-')}"
    options = {"stats": stats, "force": True, **METHODS[method]}
    folded = headfold.fold(BUNDLED, target, kv_heads=kv_heads, **options)
    seconds = time.monotonic() - start
    found = headfold.eval(target, reference=str(BUNDLED), text=str(text))
    return {
        "method": method, **METHODS[method], "num_kv_heads": folded.num_kv_heads_after, "kv_bytes_per_token": folded.kv_bytes_after,
        "perplexity": found.perplexity, "nll": found.nll, "kl": found.kl, "top1_agreement": found.top1_agreement,
        "original_perplexity": found.reference_perplexity, "original_nll": found.reference_nll,
        "original_num_kv_heads": folded.num_kv_heads_before, "original_kv_bytes_per_token": folded.kv_bytes_before,
        "num_tokens": found.num_tokens, "context": found.context, "text": found.text, "fold_seconds": round(seconds, 2),
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """Print the original, then every fold."""
    first = rows[0]
    original = [
        "original",
        first["original_num_kv_heads"],
        first["original_kv_bytes_per_token"],
        first["original_perplexity"],
        "",
        "",
    ]
    lines = [original] + [
        [
            row["method"],
            row["num_kv_heads"],
            row["kv_bytes_per_token"],
            row["perplexity"],
            f"{row['kl']:.4f}",
            percent(row["top1_agreement"]),
        ]
        for row in rows
    ]
    cells = [
        [name, str(heads), size(cache), f"{perplexity:.3f}", *rest] for name, heads, cache, perplexity, *rest in lines
    ]
    header = ["", "K/V heads", "K/V per token", "perplexity", "KL to original", "same first token"]
    show_table(header, cells, title=f"{first['num_tokens']:,} tokens of {first['text']}, context {first['context']}")


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Plot perplexity against K/V bytes per token."""
    curves = {
        name: [(r["kv_bytes_per_token"], r["perplexity"]) for r in rows if r["method"] == name] for name in METHODS
    }
    original = (rows[0]["original_kv_bytes_per_token"], rows[0]["original_perplexity"])
    plot_perplexity(path, curves, original, title="The bundled model folded without training")


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo")
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    excerpt(out)
    print(
        f"calibrating the bundled model on {CALIBRATION}, then folding it {len(KV_HEADS) * len(METHODS)} times",
        flush=True,
    )
    with ProgressReport() as progress:
        headfold.calibrate(BUNDLED, out / "stats.safetensors", calibration=CALIBRATION, force=True, progress=progress)
    rows = []
    for kv_heads in KV_HEADS:
        for method in METHODS:
            rows.append(fold_and_measure(out, method, kv_heads))
            print(f"{method} to {kv_heads}: perplexity {rows[-1]['perplexity']:.3f}", flush=True)
    print()
    show(rows)
    (out / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    draw(out / "plot.png", rows)
    print(f"\n{time.monotonic() - start:.0f} s; wrote {out}/plot.png and {out}/results.json")


if __name__ == "__main__":
    main()
