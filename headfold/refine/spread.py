"""Positions with gaps and ends with copies, by which windows of text train attention over distances that are longer than they are.

A rotary model's attention depends on how far apart two tokens are. Windows of 1,024 tokens say nothing of distances beyond, and the loss
of a fold that is trained on them alone grows there. Given positions with a gap inside a window, the original answers for tokens on both
sides as it does for tokens that far apart (as in PoSE, Zhu et al. 2024, 2309.10400, which extends the context of a model so), at no more
than the price of the window.

Most text seldom asks attention to find again what was said far back, and a fold that is trained on it alone forgets how. So one window in
`COPIES_EVERY` ends with spans copied from before the gap: what follows in a span is known to the original from there alone.
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
COPIES_EVERY = 4
"""One window in so many ends with copies."""
COPIED = 4
"""The last of so many parts of such a window: where a half is copied, most of a span is found again nearby, in the copies themselves."""
SPANS = (16, 64)
"""Tokens of a span, at least and at most."""


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
    token is at most the last of these `positions`. Cuts and gaps are uniform. One window in `COPIES_EVERY` is cut before its last part,
    which consists of copies of spans of the first. Shorter `positions` than windows change nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    seen = 0
    for batch in batches:
        count, window = batch["input_ids"].shape if "input_ids" in batch else (0, 0)
        if positions > window:
            cuts = torch.randint(1, window, (count,), generator=generator)
            gaps = torch.randint(0, positions - window + 1, (count,), generator=generator)
            ids = batch["input_ids"].clone()
            for row in range(-(seen + 1) % COPIES_EVERY, count, COPIES_EVERY):
                cuts[row] = window - max(1, window // COPIED)
                ids[row, cuts[row] :] = _copies(ids[row, : cuts[row]], window - int(cuts[row]), generator)
            seen += count
            at = torch.arange(window)
            batch = {**batch, "input_ids": ids, "position_ids": at + torch.where(at >= cuts[:, None], gaps[:, None], 0)}
        yield batch


def _copies(text: Int[Tensor, "position"], count: int, generator: torch.Generator) -> Int[Tensor, "copy"]:
    """Return `count` tokens in spans from random places of a text."""
    found: list[Tensor] = []
    while count:
        length = min(int(torch.randint(SPANS[0], SPANS[1] + 1, (), generator=generator)), count, len(text))
        first = int(torch.randint(0, len(text) - length + 1, (), generator=generator))
        found.append(text[first : first + length])
        count -= length
    return torch.cat(found)
