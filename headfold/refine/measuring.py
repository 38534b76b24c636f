"""Measures what attention sites see, and writes it to a file of statistics site by site.

A decoder on packed text runs block by block: the statistics of one site are in memory, and a model larger than memory is read once. The
sums are bitwise those of a pass of the whole model, since every block sees the same batches in the same order.
"""

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..calibration import Observer, Sample, batches, collect, key_path, num_tokens, total_tokens
from ..core.stats import SiteStats
from ..families.layout import shapes_of_statistics
from ..families.spec import Site
from ..parallel import falls_here, on_main, on_main_only, world_size
from ..stats_file import writing_stats
from .blocks import walk
from .fitting import runs_by_block

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HIDDEN_BYTES = 2**31
"""Bytes of hidden states that one process holds. Of more tokens the blocks run several times, each time on a part of them."""


def write_statistics(
    path: Path,
    model: "PreTrainedModel",
    sites: list[Site],
    sample: Sample,
    metadata: Mapping[str, str],
    shape_of: Callable[[str], tuple[int, ...]],
    statistics: Container[str] | None = None,
    counted: Callable[[int], Callable[[int], None]] = lambda total: lambda tokens: None,
) -> None:
    """Measure the statistics of every site on a sample, which several processes share; rank 0 writes them to the file `path`.

    `shape_of` gives the shape of a tensor by its name on disk, `statistics` is as in `calibration.collect`. `counted` is called with the
    tokens, or items, of the whole work and returns a function that is called with those that are done.

    Raises:
        UserError: activations are not finite, or there is no room for the file or it cannot be written.
    """
    shapes = {site.name: _shapes(site, shape_of) for site in sites}
    by_block = runs_by_block(sites, sample)
    progress = counted(total_tokens(sample) * (len(sites) if by_block else 1))
    with ExitStack() as stack:
        file = on_main_only(lambda: stack.enter_context(writing_stats(path, shapes, metadata, sample)))

        def earlier(name: str) -> SiteStats | None:
            return on_main_only(lambda: file.get(name))

        def keep(name: str, sums: SiteStats) -> None:
            on_main(lambda: file.put(name, sums))

        if by_block:
            _measure_by_block(model, sites, sample, earlier, keep, statistics, progress)
        else:
            for name, sums in collect(model, sites, sample, progress, statistics).items():
                keep(name, sums)
        on_main(stack.close)


def _shapes(site: Site, shape_of: Callable[[str], tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the statistics that can be measured at a site."""
    shapes = shapes_of_statistics(site, shape_of)
    return {name: shape for name, shape in shapes.items() if name != "query_second" or site.reads_encoder}


@torch.no_grad()
def _measure_by_block(
    model: "PreTrainedModel",
    sites: list[Site],
    sample: Sample,
    earlier: Callable[[str], SiteStats | None],
    keep: Callable[[str, SiteStats], None],
    statistics: Container[str] | None,
    progress: Callable[[int], None],
) -> None:
    """Call `keep` with the statistics of one site after another. `earlier` returns those that a site was kept with, on rank 0 alone."""
    observer = Observer(model, statistics)
    for portion in _portions(model, sites[0], list(batches(sample))):
        _measure_portion(model, sites, portion, observer, earlier, keep, progress)


def _measure_portion(
    model: "PreTrainedModel",
    sites: list[Site],
    portion: list[Sample],
    observer: Observer,
    earlier: Callable[[str], SiteStats | None],
    keep: Callable[[str, SiteStats], None],
    progress: Callable[[int], None],
) -> None:
    """Run every block on this rank's share of some batches and add what its site sees to what was kept before."""
    own = [batch["input_ids"] for number, batch in enumerate(portion) if falls_here(number)]
    for block, visit in walk(model, sites, own):
        name = block.site.name
        if (sums := earlier(name)) is not None:
            observer.add(name, sums)
        with observer.watching([block.site]):
            for number, batch in enumerate(portion):
                if falls_here(number):
                    observer.batch = batch
                    visit(number // world_size())
                progress(num_tokens(batch))
        keep(name, observer.take()[name])


def _portions(model: "PreTrainedModel", site: Site, every_batch: list[Sample]) -> Iterator[list[Sample]]:
    """Yield as many batches at a time as have `HIDDEN_BYTES` of hidden states on each process, and at least one for each."""
    keys: Any = model.get_submodule(key_path(site))
    hidden_size = keys.weight.shape[0 if site.transposed else 1]
    of_a_batch = num_tokens(every_batch[0]) * hidden_size * model.dtype.itemsize
    many = world_size() * max(1, HIDDEN_BYTES // of_a_batch)
    for start in range(0, len(every_batch), many):
        yield every_batch[start : start + many]
