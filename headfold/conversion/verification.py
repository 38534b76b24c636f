"""Compare a fold with its head-repeated twin on a little data, real where there is any."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.config import read_config
from ..checkpoint.staging import wrong_output
from ..core.errors import UserError
from ..core.progress import Progress
from ..corpus import open_corpus
from ..corpus.samples import kind_of, random_sample, random_tokens
from ..corpus.windows import token_windows
from ..evaluate.verify import Verification, compare_with_twin
from ..families.context import context_length
from ..hf_models import exceeds_memory, open_tokenizer
from ..hf_models.building import open_config
from ..runtime.load import own_class
from .source import Source
from .teacher import Teacher
from .twin import Twin

WINDOW_TOKENS = 256
"""Length of each of the two windows of text."""
ITEMS = 4
"""Number of items of other data."""


def verify_fold(
    source: Source,
    staging: Path,
    twin: Twin,
    sample: Mapping[str, Tensor],
    unrounded: Mapping[str, Tensor] | None,
    notes: list[str],
    progress: Progress,
) -> Verification | None:
    """Compare the weights written to `staging` with the twin, both under stock transformers; None where memory cannot hold the twin.

    Raises:
        UserError: they differ; the output stays in `staging`, and the next run starts anew.
    """
    has_multiples = twin.has_head_dim_multiples
    if has_multiples and exceeds_memory(source.checkpoint, torch.promote_types(source.dtype, torch.float32)):
        notes.append(
            "not verified: heads with a head_dim multiple are compared with their twin in memory, and this model is larger than that"
        )
        return None
    config = read_config(staging)
    found = compare_with_twin(
        source.checkpoint.path,
        staging,
        twin,
        sample,
        renamed=twin.names_on_disk,
        source_class=own_class(source.checkpoint.config),
        fold_class=own_class(config),
        unrounded=unrounded,
        make_twin=twin.install if has_multiples else None,
        progress=progress,
    )
    if not math.isfinite(found.tolerance):
        _refuse_not_finite(source)
    if not found.passed:
        raise wrong_output(
            staging,
            f"expected the logits of the head-repeated twin within {found.tolerance:.2g}, got a difference of "
            f"{found.max_abs_difference:.2g}, first in {found.where}",
        )
    return found


def _refuse_not_finite(source: Source) -> None:
    """Name the tensor that makes every logit NaN: a copied one, as folded ones were checked when they were made."""
    for name in source.checkpoint.tensors:
        source.read_finite(name)


def verification_sample(source: Source, teacher: Teacher, notes: list[str]) -> Mapping[str, Tensor]:
    """Return two windows of text, or the first calibration items; random inputs, and a note, where there is neither."""
    config = source.config
    kind = kind_of(config) if teacher.config is None else teacher.config.kind
    if kind in ("text", "texts"):
        return {"input_ids": _windows(source, notes)}
    if teacher.config is not None:
        return {name: tensor[:ITEMS] for name, tensor in teacher.sample.items()}
    notes.append("no calibration data: verified on random inputs")
    complete = open_config(config, f"{source.name}/config.json").to_dict()  # a published config may leave sizes out
    return random_sample(kind, complete, ITEMS)


def _windows(source: Source, notes: list[str]) -> Tensor:
    config = source.config
    length = min(WINDOW_TOKENS, context_length(config) or WINDOW_TOKENS)
    try:
        tokenizer = open_tokenizer(source.checkpoint.path)
    except UserError:
        notes.append("no tokenizer beside the checkpoint: verified on random tokens")
        return random_tokens(config, 2, length)
    return token_windows(open_corpus("stdlib", seed=0).documents, tokenizer, 2 * length, length, 0)
