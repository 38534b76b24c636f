"""Documents → token windows: tokenised as the model's tokenizer does it, packed without padding, drawn by seed."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..core.errors import UserError
from . import open_corpus
from .self import sample_windows

POOL = 4
"""How many times the wanted tokens are read before windows are drawn: the draw then spans many documents, at little cost."""


def token_stream(documents: Iterable[str], tokenizer: Any, max_tokens: int | None = None) -> Int[Tensor, " token"]:
    """All documents as one stream of token ids, each with the tokenizer's own special tokens; stops after `max_tokens`."""
    ids: list[int] = []
    for document in documents:
        ids.extend(tokenizer(document, verbose=False)["input_ids"])
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    return torch.tensor(ids[:max_tokens], dtype=torch.long)


def token_windows(
    documents: Iterator[str], tokenizer: Any, num_tokens: int, context: int, seed: int, what: str = "calibration text"
) -> Int[Tensor, "window context"]:
    """About `num_tokens` tokens as full windows of `context`, drawn without replacement from the first `POOL` times as many.

    A text too short gives fewer windows; the remainder that fills no window is dropped. Documents are read only as far as
    needed, so hand them in already shuffled (`open_corpus(source, seed=seed)`).

    Raises:
        UserError: not one full window.
    """
    num_windows = max(1, num_tokens // context)
    stream = token_stream(documents, tokenizer, POOL * num_windows * context)
    pool = stream[: len(stream) // context * context].view(-1, context)
    if not len(pool):
        raise UserError(f"{what} gives {len(stream)} tokens; need at least one window of {context}: give more text")
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return pool[order[:num_windows].sort().values]


def draw_windows(
    source: str, *, tokenizer: Any, model: nn.Module | None, num_tokens: int, context: int, seed: int
) -> Int[Tensor, "window context"]:
    """Calibration windows from any source, `self` included (only that one needs `model`).

    Raises:
        UserError: an unknown or unreadable source, or less text than one window.
    """
    if source != "self":
        return token_windows(open_corpus(source, seed=seed).documents, tokenizer, num_tokens, context, seed, source)
    assert model is not None
    bos = next(iter(tokenizer("")["input_ids"]), tokenizer.bos_token_id)
    num_windows = max(1, num_tokens // context)
    return sample_windows(model, num_windows, context, seed=seed, bos=bos, eos=tokenizer.eos_token_id)


def fingerprint(windows: Int[Tensor, "window context"]) -> str:
    """sha256, as hex, of the very tokens used and their shape: what a plan records of its calibration data."""
    digest = hashlib.sha256(repr(tuple(windows.shape)).encode())
    digest.update(windows.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()
