"""Refit W_o and the shared W_v of every block to the original's output, by least squares.

Each block alone, on the original's own inputs: W_o, then W_v for the attended values, then W_o again, each a step toward the
minimum of the same Σ ‖y − ŷ‖² over the calibration tokens with everything else fixed (`ridge.py`, `values.py`). The merged
heads' errors add up across heads in y, which a merge, one group at a time, cannot see.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calibration import Sample, batches, mask_of, num_tokens, total_tokens
from ..core.heads import Heads
from ..families.spec import Site
from .blocks import calls, walk
from .ridge import refit_output
from .trial import Recorded, Trial
from .values import refit_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RIDGE = 1e-2
"""λ over the mean energy of what is fitted."""
VALUE_STEPS = 3
"""Conjugate gradients for W_v. Measured at 2 of 8 heads: rises of 0.2008 without, 0.1858 with three, 0.1840 with six steps on a small
Llama; 0.0665, 0.0574 and 0.0572 on a T5."""
PORTION_BYTES = 2**31
"""Of recorded calls held at once where blocks cannot be walked one by one."""


def num_passes(value_steps: int = VALUE_STEPS) -> int:
    """How often a refit runs every block over the whole data."""
    return 1 if value_steps == 0 else value_steps + 3


@torch.no_grad()
def refit(
    model: "PreTrainedModel",
    sites: list[Site],
    merged: Callable[[Site], Heads],
    sample: Sample,
    *,
    order: Callable[[Site], Sequence[int]] = lambda site: range(site.num_heads),
    ridge: float = RIDGE,
    value_steps: int = VALUE_STEPS,
    skip: Container[str] = (),
    keep: Callable[[str, dict[str, Tensor]], None] | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, dict[str, Tensor]]:
    """By site, the fields of its merged heads that replace the merge's: `o`, `o_bias` where there is one, and `v`; float32.

    `model` is the original under stock transformers; `merged(site)` gives the site's folded heads in standard order, `order(site)`
    that order: new position → query head of the original. `value_steps=0` fits W_o alone. The sites in `skip` are passed over; `keep` is
    given each site's fields as soon as they are known, in place of the result. `progress` hears tokens per site, batch
    and pass. Decoders of packed text whose class knows K/V heads (their blocks take hidden states alone by position) are walked,
    so that one block is in memory; others are run whole, a portion of their sites at a time.
    """
    every = list(batches(sample))
    found = {}
    for site, recorded in _recorded(model, sites, sample, every):
        left = total_tokens(sample) * num_passes(value_steps)
        if site.name in skip:
            progress(left)
            continue

        def heard(number: int) -> None:
            nonlocal left
            left -= num_tokens(every[number])
            progress(num_tokens(every[number]))

        heads = merged(site).to(torch.promote_types(model.dtype, torch.float32)).to(recorded[0].answer.device)
        width = heads.head_dim // site.head_dim
        trial = Trial(model.get_submodule(site.module), site, recorded, order(site), heard, model, width)
        fields = _fitted(trial, heads, ridge, value_steps)
        if keep is None:
            found[site.name] = fields
        else:
            keep(site.name, fields)
        progress(left)  # of a perfect fold, whose values need no steps
        del trial, recorded  # before the next site's calls are recorded
    return found


def _fitted(trial: Trial, heads: Heads, ridge: float, value_steps: int) -> dict[str, Tensor]:
    heads = refit_output(trial, heads, ridge)
    if value_steps:
        heads = refit_output(trial, refit_values(trial, heads, ridge, value_steps), ridge)
    fields = {"o": heads.o, "o_bias": heads.o_bias, "v": heads.v if value_steps else None}
    return {name: tensor.to("cpu", torch.float32) for name, tensor in fields.items() if tensor is not None}


def _recorded(
    model: "PreTrainedModel", sites: list[Site], sample: Sample, every: list[Sample]
) -> Iterator[tuple[Site, list[Recorded]]]:
    """Every site with all the calls that its attention received."""
    if sample.keys() == {"input_ids"} and all(site.native for site in sites):
        for block, visit in walk(model, sites, [batch["input_ids"] for batch in every]):
            yield block.site, [Recorded(*visit(number), None) for number in range(len(every))]
        return
    for portion in _portions(model, sites, every):
        recorded: dict[str, list[Recorded]] = {site.name: [] for site in portion}
        for batch in every:
            for site, one in _calls(model, portion, batch):
                recorded[site.name].append(one)
        for site in portion:
            yield site, recorded.pop(site.name)


def _calls(model: "PreTrainedModel", sites: list[Site], batch: Sample) -> Iterator[tuple[Site, Recorded]]:
    for site, call, answer in calls(model, sites, batch):
        yield site, Recorded(call, answer, mask_of(site, batch, answer, queries=True))


def _portions(model: "PreTrainedModel", sites: list[Site], every: list[Sample]) -> Iterator[list[Site]]:
    """As many sites at a time, but at least one, as fit into `PORTION_BYTES`, by what the calls of the first batch hold."""
    storages = {site.name: one.storages() for site, one in _calls(model, sites, every[0])}
    portion: list[Site] = []
    held: dict[int, int] = {}
    for site in sites:
        both = held | storages[site.name]
        if portion and sum(both.values()) * len(every) > PORTION_BYTES:
            yield portion
            portion, both = [], storages[site.name]
        portion, held = [*portion, site], both
    yield portion
