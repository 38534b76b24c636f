"""Windows of tokens from documents: tokenized as the model's tokenizer does it, packed without padding, drawn by a seed."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..core.errors import UserError
from . import open_corpus
from .rows import Table
from .self import sample_windows

POOL = 32
"""Times the requested amount of text that is read before windows are drawn. Reading is cheap compared with tokenizing, and second
moments from 64 windows are as near to the corpus's as those of a uniform draw only if the windows come from about as many
documents."""

CHARACTERS = 6
"""More characters than a token has in nearly any text, so that an excerpt of so many per token fills its window."""


def token_stream(documents: Iterable[str], tokenizer: Any, max_tokens: int | None = None) -> Int[Tensor, " token"]:
    """Return all documents as one stream of token ids, each with the tokenizer's special tokens; stop after `max_tokens`."""
    ids: list[int] = []
    for document in documents:
        ids.extend(tokenizer(document, verbose=False)["input_ids"])
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    return torch.tensor(ids[:max_tokens], dtype=torch.long)


def token_windows(
    documents: Iterator[str], tokenizer: Any, num_tokens: int, context: int, seed: int, what: str = "calibration text"
) -> Int[Tensor, "window context"]:
    """Return about `num_tokens` tokens as full windows of `context`, each from another excerpt of the first `POOL` times as much
    text.

    A text that is too short for that is packed completely and gives fewer windows; a remainder shorter than a window is dropped.
    Documents are read only as far as needed, so pass them already shuffled (`open_corpus(source, seed=seed)`).

    Raises:
        UserError: the text is shorter than one window.
    """
    num_windows = max(1, num_tokens // context)
    pool = _read(documents, POOL * num_windows * context * CHARACTERS)
    windows = _excerpted(pool, tokenizer, num_windows, context, random.Random(seed))
    if len(windows) == num_windows:
        return torch.tensor(windows)
    stream = token_stream(pool, tokenizer)
    if len(stream) < context:
        raise UserError(f"{what} gives {len(stream)} tokens; need at least one window of {context}: give more text")
    packed = stream[: len(stream) // context * context].view(-1, context)
    order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(seed))
    return packed[order[:num_windows].sort().values]


def _read(documents: Iterator[str], num_characters: int) -> list[str]:
    """Read documents until they contain `num_characters`, the last one completely."""
    pool, total = [], 0
    for document in documents:
        pool.append(document)
        total += len(document)
        if total >= num_characters:
            break
    return pool


def _excerpted(pool: list[str], tokenizer: Any, num_windows: int, context: int, rng: random.Random) -> list[list[int]]:
    """Return up to `num_windows` windows from shuffled excerpts: one from each that is long enough, the others packed together.

    Special tokens are added only at the beginning of a document: a `<s>` in the middle of a text would change the statistics.
    """
    size = context * CHARACTERS
    excerpts = [(text[at : at + size], at == 0) for text in pool for at in range(0, len(text), size)]
    rng.shuffle(excerpts)
    windows: list[list[int]] = []
    short: list[int] = []
    for text, begins in excerpts:
        ids = tokenizer(text, add_special_tokens=begins, verbose=False)["input_ids"]
        at = rng.randrange(max(1, len(ids) - context + 1))
        short += ids if len(ids) < context else []
        windows += [ids[at : at + context]] if len(ids) >= context else []
        if len(short) >= context:
            windows.append(short[:context])
            short = short[context:]
        if len(windows) >= num_windows:
            break
    return windows[:num_windows]


def draw_windows(
    source: str | Table,
    *,
    tokenizer: Any,
    model: nn.Module | None,
    num_tokens: int,
    context: int,
    seed: int,
    columns: Sequence[str] = (),
    progress: Callable[[int], None] = lambda tokens: None,
) -> Int[Tensor, "window context"]:
    """Return calibration windows from any source, including `self` (which alone needs `model`). `columns` as in `open_corpus`.

    Raises:
        UserError: an unknown or unreadable source, or less text than one window.
    """
    if source != "self":
        corpus = open_corpus(source, seed=seed, columns=columns)
        return token_windows(corpus.documents, tokenizer, num_tokens, context, seed, corpus.name)
    assert model is not None
    # Where the tokenizer adds no <s> to a text, a window begins in the middle of one, as other sources' windows do. Measured:
    # forcing <s> moves the second moments three times as far from those of real text as a random first token does.
    bos = next(iter(tokenizer("")["input_ids"]), None)
    num_windows = max(1, num_tokens // context)
    return sample_windows(
        model, num_windows, context, seed=seed, bos=bos, eos=tokenizer.eos_token_id, progress=progress
    )


def fingerprint(sample: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hexadecimal, of the data, its names and shapes: the plan's record of the calibration data."""
    digest = hashlib.sha256()
    for name, tensor in sorted(sample.items()):
        tensor = tensor if tensor.is_floating_point() else tensor.to(torch.int64)
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
