"""Positions with gaps, by which windows of text train attention over distances that are longer than they are.

A rotary model's attention depends on how far apart two tokens are. Windows of 1,024 tokens say nothing of distances beyond, and the loss
of a fold that is trained on them alone grows there. Given positions with a gap inside a window, the original answers for tokens on both
sides as it does for tokens that far apart (as in PoSE, Zhu et al. 2024, 2309.10400, which extends the context of a model so), at no more
than the price of the window.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from ..calibration import Sample, is_packed_text
from ..families.context import context_length
from ..families.spec import Site
from ..families.wrapped import language_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TIMES = 8
"""Positions reach over at most so many times a window, as far as was measured."""


def num_positions(model: "PreTrainedModel", sites: Sequence[Site], sample: Sample) -> int:
    """Return the number of positions that windows of this sample are to be spread over: their own where they stay as they are.

    So do texts that are padded; windows of a model some of whose layers have no rotary positions, since these do not see the gap, or a
    sliding window, which would hide what lies before it; and those of code that is not stock, which may not take such positions.
    """
    if not is_packed_text(sample):
        return 0
    window, config = sample["input_ids"].shape[1], model.config.to_dict()
    taken = inspect.signature(model.forward).parameters
    stock = type(model).__module__.startswith("transformers.") and {"position_ids", "attention_mask"} <= taken.keys()
    text = language_config(config)
    known = set(text.get("layer_types") or ()) <= {"full_attention", "sliding_attention"}
    context = context_length(config)
    if not (stock and known and context):
        return window
    spans = [site.key_freedom.context if site.key_freedom.rotary_dim else 0 for site in sites]
    # Where the frequencies of a longer context are others, statistics of windows have seen the trained ones alone.
    trained = (text.get("rope_parameters") or {}).get("original_max_position_embeddings") or context
    return max(window, min(TIMES * window, context, trained, *spans))


def spread(batches: Iterable[Sample], positions: int, seed: int) -> Iterator[Sample]:
    """Yield batches of windows with `position_ids`: each window is cut in two, and the second part begins up to so far on that the last
    token is at most the last of these `positions`. Cuts and gaps are uniform. Shorter `positions` than windows change nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        count, window = batch["input_ids"].shape if "input_ids" in batch else (0, 0)
        if positions > window:
            batch = {**batch, "position_ids": _with_gaps(count, window, positions, generator)}
        yield batch


def _with_gaps(count: int, window: int, positions: int, generator: torch.Generator) -> Int[Tensor, "window position"]:
    cuts = torch.randint(1, window, (count, 1), generator=generator)
    gaps = torch.randint(0, positions - window + 1, (count, 1), generator=generator)
    at = torch.arange(window).expand(count, -1)
    return at + torch.where(at >= cuts, gaps, 0)
