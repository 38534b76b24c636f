"""Fit one block after another: record the calls of the original's attention, pass them to a solver, and keep the heads it returns.

Every block is fitted alone, on the original's own inputs. Healing each block alone on the outputs of the folded blocks before it, toward
the original's residual stream, gains little, and makes each block wait for the one before.
"""

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..calibration import Sample, is_packed_text, mask_of, num_tokens
from ..core.fitted import FittedHeads
from ..core.heads import Heads
from ..corpus.samples import main_input
from ..families.spec import Site
from ..hf_models.streamed import input_device
from ..parallel import share, world_size
from .blocks import recorded_calls, walk
from .recorded import RecordedCall, RecordedSite, thinned_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PORTION_BYTES = 2**31
"""Bytes of recorded calls held at once where blocks cannot be run one by one."""

Keep = Callable[[str, FittedHeads], None]
Watch = Callable[[Site], AbstractContextManager[Callable[[Sample], object]]]
"""A context in which a site's block runs on all batches, with a function that is called with each batch before the block is."""


@dataclass(frozen=True, slots=True)
class Solver:
    """A function that improves merged heads, the number of tokens it runs through a block for that, and whether it leaves Q and K.

    `most` gives the positions per dim from which it keeps every second call of a site, or every third … (`RecordedSite.thin`), None
    where it keeps all: one process need not record the others.
    """

    solve: Callable[[RecordedSite, Heads], FittedHeads]
    tokens: int
    fixes_attention: bool = False
    most: Callable[[Site], int | None] = lambda site: None


@torch.no_grad()
def fit(
    model: "PreTrainedModel",
    sites: list[Site],
    merged: Callable[[Site], Heads],
    batches: list[Sample],
    solver: Solver,
    *,
    order: Callable[[Site], Sequence[int]] = lambda site: range(site.num_heads),
    skip: Container[str] = (),
    keep: Keep | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
    watch: Watch | None = None,
) -> dict[str, FittedHeads]:
    """Return the fitted heads of every site, or pass them to `keep`.

    `model` is the original under stock transformers; `merged(site)` returns the site's merged heads in standard order,
    `order(site)` that order: new position → query head of the original. The sites in `skip` are left out. `keep` is called with
    each site's fitted heads as soon as they are known; nothing is returned then. `progress` is called with numbers of tokens.
    `watch` needs a model that runs block by block (`runs_by_block`); a site's `merged` is called after its context.

    Decoders of packed text whose class counts K/V heads (their blocks take only hidden states by position) are run block by block,
    so that one block is in memory; other models are run as a whole, for some of the sites at a time. Each rank records and runs
    its share of the batches, and all ranks find the same heads.
    """
    found: dict[str, FittedHeads] = {}
    numbers = share(len(batches))
    own_batches = [batches[number] for number in numbers]
    for site, recorded, step in _recorded(model, sites, own_batches, watch, solver.most):
        left = solver.tokens
        if site.name in skip:
            progress(left)
            continue

        def on_replay(number: int) -> None:
            nonlocal left
            run = min(left, num_tokens(batches[number]) * world_size())
            left -= run
            progress(run)

        device = recorded[0].output.device if recorded else input_device(model)
        heads = merged(site).to(torch.promote_types(model.dtype, torch.float32)).to(device)
        head_dim_multiple = heads.head_dim // site.head_dim
        site_calls = RecordedSite(
            model.get_submodule(site.module),
            site,
            recorded,
            order(site),
            on_replay,
            model,
            head_dim_multiple,
            numbers[::step],
            range(len(batches))[::step],
            fixes_attention=solver.fixes_attention,
        )
        fields = solver.solve(site_calls, heads).to("cpu", torch.float32)
        if keep is None:
            found[site.name] = fields
        else:
            keep(site.name, fields)
        progress(left)  # of what needed fewer steps than it might have
        del site_calls, recorded  # before the next site's calls are recorded
    return found


def runs_by_block(sites: list[Site], sample: Sample) -> bool:
    """Return whether a model with these sites is run on such data block by block: a decoder on packed text."""
    return is_packed_text(sample) and all(site.stock_gqa for site in sites)


def _recorded(
    model: "PreTrainedModel",
    sites: list[Site],
    batches: list[Sample],
    watch: Watch | None,
    most: Callable[[Site], int | None],
) -> Iterator[tuple[Site, list[RecordedCall], int]]:
    """Yield every site with the calls that its attention received of all batches, or of every second, or third …, and that number."""
    if not batches:
        yield from ((site, [], 1) for site in sites)
        return
    if runs_by_block(sites, batches[0]):
        watch = watch or (lambda site: nullcontext(lambda batch: None))
        for block, visit in walk(model, sites, [batch["input_ids"] for batch in batches]):
            calls = []
            with watch(block.site) as tell:
                for number, batch in enumerate(batches):
                    tell(batch)
                    calls.append(RecordedCall(*visit(number), None))
            yield block.site, calls, 1
        return
    assert watch is None, "only a model that runs block by block can be watched"
    first = {site.name: one for site, one in _calls(model, sites, batches[0])}
    steps = {site.name: _step(first[site.name], batches, most(site)) for site in sites}
    portions = list(_portions(sites, {name: one.storages() for name, one in first.items()}, len(batches), steps))
    # The first calls of other portions would take memory until it is their turn.
    first = {site.name: first[site.name] for site in portions[0]}
    for portion in portions:
        recorded = {site.name: [first.pop(site.name)] if first else [] for site in portion}
        step = steps[portion[0].name]
        for batch in batches[::step][1 if portion is portions[0] else 0 :]:
            for site, one in _calls(model, portion, batch):
                recorded[site.name].append(one)
        for site in portion:
            yield site, recorded.pop(site.name), step


def _step(first: RecordedCall, batches: list[Sample], most: int | None) -> int:
    """Return 1 if all batches are to be recorded, 2 if every second one is …, from the call of the first of them."""
    if most is None or first.mask is not None or world_size() > 1:
        return 1
    items = [len(main_input(batch)) for batch in batches]
    *positions, size = first.output.shape
    return thinned_by(math.prod(positions) / items[0] * sum(items), most * size)


def _calls(model: "PreTrainedModel", sites: list[Site], batch: Sample) -> Iterator[tuple[Site, RecordedCall]]:
    for site, call, output in recorded_calls(model, sites, batch):
        uses = len(output) // len(main_input(batch)) if site.repeated else 1
        mask = mask_of(site, batch, output[: len(output) // uses], queries=True)
        yield site, RecordedCall(call, output, None if mask is None else mask.repeat(uses, 1))


def _portions(
    sites: list[Site], storages: Mapping[str, dict[int, int]], num_batches: int, steps: Mapping[str, int]
) -> Iterator[list[Site]]:
    """Yield as many sites of one step at a time, but at least one, as fit into `PORTION_BYTES`, judged by what the calls of the first
    batch hold.
    """
    portion: list[Site] = []
    held: dict[int, int] = {}
    for site in sites:
        both, step = held | storages[site.name], steps[site.name]
        full = sum(both.values()) * math.ceil(num_batches / step) > PORTION_BYTES
        if portion and (full or step != steps[portion[0].name]):
            yield portion
            portion, both = [], storages[site.name]
        portion, held = [*portion, site], both
    yield portion
