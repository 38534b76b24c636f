"""The advice of `headfold inspect`, as people read it."""

from typing import Any

from .tables import duration, flops, show_table, size


def show_advice(advice: Any) -> None:
    """Print a row for the model as it is and for each fold of it, then whether folding pays and the command."""
    print()
    show_table(*(_cache_table(advice) if advice.caches else _weights_table(advice)), title=_title(advice))
    print(advice.reason)
    if advice.command is not None:
        print(f"begin with: {advice.command}")


def _title(advice: Any) -> str:
    device = f"{advice.device} ({size(advice.memory)}, {size(advice.usable_memory)} of it for weights and cache"
    figures = f"{device}; {advice.bandwidth / 1e9:,.0f} GB/s, {flops(advice.rate)}FLOP/s: {advice.source})"
    if not advice.caches:
        return f"on {figures}"
    crosses = "" if advice.encoder_tokens is None else f", {advice.encoder_tokens:,} tokens of the encoder"
    return f"{advice.context:,} tokens x {advice.batch:,}{crosses}, on {figures}"


def _cache_table(advice: Any) -> tuple[list[str], list[list[str]]]:
    header = [
        "K/V heads",
        "cache",
        "weights",
        "fits",
        "longest context",
        "largest batch",
        "a step, at least",
        "of it the cache",
    ]
    return header, [
        [
            _heads(advice, number),
            size(option.cache_bytes),
            size(option.weight_bytes),
            "yes" if option.fits else "no",
            _context(option.longest_context, advice.own_context),
            f"{option.largest_batch:,}",
            f"{1000 * option.step_seconds:.3g} ms" if option.step_seconds < 1 else duration(option.step_seconds),
            f"{option.cache_share:.0%}",
        ]
        for number, option in enumerate(advice.options)
    ]


def _weights_table(advice: Any) -> tuple[list[str], list[list[str]]]:
    header = ["K/V heads", "weights", "fits", "operations per token"]
    return header, [
        [
            _heads(advice, number),
            size(option.weight_bytes),
            "yes" if option.fits else "no",
            flops(option.operations_per_token),
        ]
        for number, option in enumerate(advice.options)
    ]


def _heads(advice: Any, number: int) -> str:
    return f"{advice.options[number].num_kv_heads}{'' if number else ' (now)'}"


def _context(longest: int | None, own: int | None) -> str:
    """Return the tokens that fit, and whether it is the model that sets that limit."""
    if longest is None:
        return "any"
    return f"{longest:,}{' (its own)' if longest == own else ''}"
