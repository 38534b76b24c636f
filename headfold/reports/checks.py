"""The report of a check of serving engines."""

import shlex
from typing import Any

from .tables import show_table, size


def show_check(result: Any) -> None:
    """Print what engines made of a model; without a run, how each is installed and serves it."""
    if any(row.version is not None for row in result.rows):
        _show_runs(result)
        return
    for row in result.rows:
        print(f"{row.engine.title}\n  install  {row.engine.install}\n  use      {row.serve}")
        print(f"  check    headfold check {shlex.quote(str(result.model))} --engine {row.engine.name}")


def _show_runs(result: Any) -> None:
    header = ["engine", "computes", "KL", "greedy tokens", "tokens/s", "K/V per token"]
    show_table(header, [_cells(row) for row in result.rows])
    counts = size(result.kv_bytes_per_token)
    print(
        f"KL in nats per token, {result.num_tokens} tokens, one sample, in float32; the counts of K/V heads come to {counts} per token"
    )
    for row in result.rows:
        if row.refused is not None:
            print(f"{row.engine.name}: {row.refused}")
        elif row.found.same_tokens_of_text is False:
            print(f"{row.engine.name}: divides the text into other tokens than the tokenizer of the model")
        if row.found is not None and row.found.is_same:
            print(f"{row.engine.name}: use with: {row.serve}")


def _cells(row: Any) -> list[str]:
    name = f"{row.engine.title} {row.version}"
    if row.found is None:
        return [name, "refused", "", "", "", ""]
    return [
        name,
        "the same" if row.found.is_same else "SOMETHING ELSE",
        f"{row.found.kl:.1e}",
        f"{row.found.num_same_greedy} of {row.found.num_greedy}",
        f"{row.tokens_per_second:.3g}" if row.tokens_per_second else "",
        size(row.kv_bytes_per_token) if row.kv_bytes_per_token else "",
    ]
