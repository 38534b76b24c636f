"""Tables of folds with a quantised KV cache, measured by benchmarks/cache_bits.py."""

from typing import Any

from figure_data import load
from figure_tables import Block, number, table

RESULTS = {
    "cache-bits-pylib-llama": ("pylib-llama", 8),
    "cache-bits-smollm2": ("SmolLM2-135M-Instruct", 3),
}
"""Result → the model as the tables call it, and its K/V heads."""
PLAIN, ROTATED = "as it is", "rotated"


def _loss_increase(row: dict[str, Any], rows: list[dict[str, Any]], num_kv_heads: int) -> float:
    original = {"engine": "transformers", "kv_heads": num_kv_heads, "choice": PLAIN, "bits": 16}
    return row["nll"] - next(one["nll"] for one in rows if original.items() <= one.items())


def bits() -> str:
    """One table per model and engine, one row per number of K/V heads and bits, the largest cache first."""
    parts = []
    header = ["bytes per token", "K/V heads", "bits", "loss increase", "KL", "loss increase, rotated", "KL, rotated"]
    for result, (model, num_kv_heads) in RESULTS.items():
        found = load(result)
        rows = found["rows"]
        for engine in dict.fromkeys(row["engine"] for row in rows):
            of_engine = {
                (row["kv_heads"], row["bits"], row["choice"]): row
                for row in rows
                if row["engine"] == engine and row["choice"] in (PLAIN, ROTATED)
            }
            lines = [
                [
                    f"{row['bytes_per_token']:,.0f}", f"{heads} of {num_kv_heads}", str(width),
                    *(
                        cell
                        for one in (row, of_engine[heads, width, ROTATED])
                        for cell in (number(_loss_increase(one, rows, num_kv_heads)), number(one["kl"]))
                    ),
                ]
                for (heads, width, choice), row in sorted(of_engine.items(), key=lambda item: -item[1]["bytes_per_token"])
                if choice == PLAIN
            ]  # fmt: skip
            title = f"**{model}** in {engine}, {found['windows']} windows of {found['context']:,} tokens:"
            parts.append(f"{title}\n\n{table(header, lines)}")
    return "\n\n".join(parts)


def choices() -> str:
    """One row per model, one column per transformation that changes no output; a cell is the divergence at 4 bits."""
    lines, columns = [], []
    for result, (model, num_kv_heads) in RESULTS.items():
        rows = [row for row in load(result)["rows"] if row["engine"] == "transformers" and row["bits"] == 4]
        columns = columns or list(dict.fromkeys(row["choice"] for row in rows))
        for heads in dict.fromkeys(row["kv_heads"] for row in rows):
            by_choice = {row["choice"]: row["kl"] for row in rows if row["kv_heads"] == heads}
            if by_choice.keys() == set(columns):  # folds may have been measured without --choices
                lines.append([model, f"{heads} of {num_kv_heads}", *(number(by_choice[one]) for one in columns)])
    return table(["model", "K/V heads", *(NAMES.get(one, one) for one in columns)], lines)


NAMES = {ROTATED: "`--quantised-cache`"}
CACHE = {"cache-bits": Block(bits, tuple(RESULTS)), "cache-choices": Block(choices, tuple(RESULTS))}
