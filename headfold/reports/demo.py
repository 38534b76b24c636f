"""The report of the demo: the bundled model before and after its fold."""

from typing import Any

from .tables import duration, percent, show_table, size


def show_demo(result: Any) -> None:
    """Print K/V heads, cache and perplexity before and after, and what to do next."""
    found = result.evaluation
    rows = [
        ["K/V heads per layer", str(result.num_kv_heads_before), str(result.num_kv_heads_after)],
        ["K/V cache per token", size(result.kv_bytes_before), size(result.kv_bytes_after)],
        ["perplexity on held-out text", f"{found.reference_perplexity:.3f}", f"{found.perplexity:.3f}"],
        ["KL to the original, nats per token", "", f"{found.kl:.4f}"],
        ["same most likely token", "", percent(found.top1_agreement)],
    ]
    title = f"the bundled model, folded in {duration(result.seconds)}; measured on {found.num_tokens:,} tokens"
    show_table(["", "before", "after"], rows, title=title)
    if result.out is not None:
        print(f"wrote {result.out}")
    print("\nnext: headfold fold MODEL OUT --kv-heads 1/2, with a checkpoint directory or hub id of yours as MODEL")
