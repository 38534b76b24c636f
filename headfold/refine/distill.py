"""Trains the projections of all sites together, by distillation: so that the whole model's output is the original's again.

Minimises `divergence.output_error`, the KL divergence from the original's distribution, on W_q, W_k, W_v and W_o of every site
(`descent`); all other weights stay. Refit and healing by block minimise the error of one attention's output, which does not tell how
much the model's output depends on it. The price is memory, for the whole model and its activations on a batch. The two models share all
weights outside the sites, and the output of an encoder that is not folded; of batches that are seen again the original's output is kept.
Windows of text are given positions with gaps, and some of them copies of what they began with (`spread`), so that they train attention
over longer distances than they have.
"""

import copy
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..answers import Answers, Given
from ..calibration import Sample, batches_in_order, decoder_inputs, num_tokens, without_cache
from ..core.errors import UserError
from ..core.fitted import FittedHeads
from ..core.heads import Heads
from ..descent import descend as descents
from ..descent.descend import TrainedWeights, descend, num_with_held, schedule
from ..descent.moments import Moments, add_moments, empty_moments, num_wanted
from ..divergence import label_mask, output_error
from ..families.layout import write_heads
from ..families.spec import Site
from ..hf_models.streamed import input_device, is_streamed
from ..parallel import all_reduce, falls_here, world_size
from ..runtime.regrouping import input_modules, install_heads, model_names
from .heal import SCALE
from .spread import num_positions, spread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 2**17
"""Tokens that the model is trained with, repeated where the sample has fewer."""
ITEMS = {"images": 2**13, "audio": 2**11, "sound": 2**11}
"""Items that the model is trained with where data has no tokens."""
BATCH_TOKENS = 2048
NUM_CHECKS = 2
ONCE_TOKENS = 1024
"""Tokens of a step of a training that sees its data once, at least a whole text: many steps that see little go farther than few."""
LONGER = 0.5
"""Length of its steps in lengths of the first, along which all sites move together: later gradients find that too far. This
holds for many steps; a training of 15 goes farthest with the whole length.
"""


@torch.no_grad()
def distill(
    model: "PreTrainedModel",
    sites: list[Site],
    merged: Callable[[Site], Heads],
    sample: Sample,
    *,
    tokens: int | None = TOKENS,
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, FittedHeads]:
    """Return the trained heads of every site: `q`, `k`, `v`, `o`, and `o_bias` where there is one; float32.

    `model` is the original under stock transformers, in memory; `merged(site)` returns the site's heads to begin with, in standard
    order. The model is trained with `tokens` tokens of `sample` (items where it has none), over all ranks together, or with None on all
    of it once. Where hardly any is seen again, steps are short ones in white coordinates (`descent`). `progress` is called with numbers of
    tokens.

    Raises:
        UserError: a model that is read from disk as it runs.
    """
    if is_streamed(model):
        raise UserError(
            "fold: expected a model that fits into memory, got one that is read from disk as it runs; give --refit-by block, or "
            "--heal-by block, which train one block at a time"
        )
    student = _Student(model, sites, merged)
    batches, once = _batches(sample, tokens)
    all_batches = list(spread(batches, num_positions(model, sites, sample), seed))
    counts, positions = [*map(num_tokens, all_batches)], [*map(_num_positions, all_batches)]
    plan = schedule(
        counts, tokens or sum(counts), num_checks=_num_checks(tokens), seed=seed, longer=LONGER if once else 1.0
    )
    again = plan.held if once else range(len(all_batches))
    left = total_tokens(sample, tokens)
    scale = SCALE if model.dtype == torch.float16 else 1.0

    def ran(numbers: range) -> None:
        nonlocal left
        count = min(left, sum(counts[number] for number in numbers))
        left -= count
        progress(count)

    def loss(number: int) -> Tensor:
        return student.error(all_batches[number], number if number in again else None)

    def error(numbers: range) -> float:
        found = sum(positions[number] * float(loss(number)) for number in filter(falls_here, numbers))
        ran(numbers)
        return all_reduce(torch.tensor(found, dtype=torch.float64)).item() / sum(positions[each] for each in numbers)

    def gradients(numbers: range) -> Sequence[Tensor]:
        ran(numbers)
        for number in filter(falls_here, numbers):
            share = positions[number] / sum(positions[each] for each in numbers)
            with torch.enable_grad():
                # Zero where no output depends on a site, as on layers of a tower behind the one that a wrapper reads.
                found = torch.autograd.grad(scale * share * loss(number), student.leaves, materialize_grads=True)
            return [each / scale for each in found]
        return [torch.zeros_like(leaf) for leaf in student.leaves]

    def moments() -> list[Moments]:
        own = filter(falls_here, chain(*plan.rounds))
        return student.input_moments(all_batches[number] for number in own)

    with _frozen(model):
        found = descend(student.weights, moments if once else None, error, gradients, plan)
    progress(left)  # of batches that are shorter than others, and of steps that a perfect fold does not need
    return {site.name: fitted.to("cpu", torch.float32) for site, fitted in zip(sites, found, strict=True)}


def _batches(sample: Sample, tokens: int | None) -> tuple[list[Sample], bool]:
    """Return the batches of a training on so many tokens, and whether it is nearer to one pass over them than to two. It is rarely exactly
    one: windows are whole, and how much padding counts as tokens depends on the batches. Of more data than it sees, the first are taken.
    """
    found = list(batches_in_order(sample, ONCE_TOKENS))
    counts = [*map(num_tokens, found)]
    if tokens is None or tokens < 1.5 * sum(counts):
        seen = [*accumulate(counts, initial=0)]
        return found[: max(2, bisect_left(seen, num_with_held(tokens or seen[-1])))], True
    return list(batches_in_order(sample, BATCH_TOKENS)), False


def _num_checks(tokens: int | None) -> int:
    return 1 if tokens is None else NUM_CHECKS


def total_tokens(sample: Sample, tokens: int | None) -> int:
    """Return the number of tokens that the model is run on, in training and in checks; `tokens` as for `distill`."""
    counts = [*map(num_tokens, _batches(sample, tokens)[0])]
    return descents.total_tokens(counts, tokens or sum(counts), _num_checks(tokens), searched=True)


def _num_positions(batch: Sample) -> int:
    """Return the weight of a batch among others: its labels where there is one for each position, else its tokens, or items."""
    labelled = label_mask(batch.get("labels"))
    counted = batch.get("attention_mask") if labelled is None else labelled
    return num_tokens(batch) if counted is None else int(counted.sum())


class _Student:
    """The folded model: the original's modules over again, with heads that are trained at some sites. All other tensors are shared.

    Its attention is the original's stock class with shared heads repeated, so gradients are summed over the queries that read them.
    """

    def __init__(self, model: "PreTrainedModel", sites: list[Site], merged: Callable[[Site], Heads]) -> None:
        self._teacher, self._sites = model, sites
        shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
        self._model: Any = copy.deepcopy(model, shared)
        dtype = torch.promote_types(model.dtype, torch.float32)
        self.weights = []
        for site in sites:
            heads = merged(site).to(dtype).to(next(model.get_submodule(site.module).parameters()).device)
            self.weights.append(TrainedWeights.of(heads, site))
            if heads.head_dim > site.head_dim:
                install_heads(
                    self._model, site, self._on_disk(site, heads), site.num_kv_heads, heads.head_dim // site.head_dim
                )
        self.leaves = [leaf for each in self.weights for leaf in each.tensors.values()]
        self._parameters = dict(self._model.named_parameters(remove_duplicate=False))
        decodes = getattr(model.config, "is_encoder_decoder", False)
        shares_encoder = decodes and all(site.stack == "decoder" for site in sites)
        self._options = without_cache(model, model.forward)
        self._answers = Answers(model, self._options, shares_encoder=shares_encoder)

    def error(self, batch: Sample, number: int | None = None) -> Tensor:
        """Return the divergence of the student's output from the original's on one batch, whose number is given if it is seen again."""
        given, labels = self._given(batch)
        # The mask of a window with a gap is all ones: it says nothing here, and would cost a copy of the logits.
        mask = given.get("attention_mask") if "attention_mask" in batch else None
        answer, given = self._answers.of(given, number)
        return output_error(self._run(given), answer, labels, mask)

    def _given(self, batch: Sample) -> tuple[Given, Tensor | None]:
        """Return what both models are called with, and the labels."""
        device = input_device(self._teacher)
        given: dict[str, Any] = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = given.pop("labels", None)
        if "position_ids" in given:  # without a mask, stock models take a gap for the beginning of another text
            given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
        if getattr(self._teacher.config, "is_encoder_decoder", False) and "decoder_input_ids" not in given:
            assert labels is not None
            given["decoder_input_ids"] = decoder_inputs(self._teacher, labels)
        return given, labels

    def _run(self, given: Given) -> Any:
        return torch.func.functional_call(self._model, self._tensors(), kwargs={**given, **self._options})

    @torch.no_grad()
    def input_moments(self, batches: Iterable[Sample]) -> list[Moments]:
        """Return the second moments of the inputs of every site's projections, from as many of the batches as that takes.

        Padding is among them: it weighs little, and no step depends on their exact value.
        """
        sums = [empty_moments(each.heads) for each in self.weights]
        wanted = max(map(num_wanted, sums)) / world_size()
        seen = [Counter[str]() for _ in sums]
        with ExitStack() as stack:
            for site, own, count, trained in zip(self._sites, sums, seen, self.weights, strict=True):
                for field, path in input_modules(site, in_slots=trained.heads.head_dim > site.head_dim).items():
                    module = self._model.get_submodule(path)
                    stack.callback(module.register_forward_pre_hook(partial(_add, own, count, field)).remove)
            for batch in batches:
                self._run(self._given(batch)[0])
                # Positions, of which a recording has many and a pair few; none in layers that do not run.
                if min(chain(*(count.values() for count in seen)), default=wanted) >= wanted:
                    break
        return [{field: all_reduce(total) for field, total in own.items()} for own in sums]

    def _tensors(self) -> dict[str, Tensor]:
        """Return the student's parameters that depend on the trained weights, by name."""
        found = {}
        for site, weights in zip(self._sites, self.weights, strict=True):
            names = model_names(site)
            for name, tensor in self._on_disk(site, weights.to_heads()).items():
                found[names[name]] = tensor.to(self._parameters[names[name]])
        return found

    @staticmethod
    def _on_disk(site: Site, heads: Heads) -> Mapping[str, Tensor]:
        return write_heads(site, heads.expand(site.num_kv_heads), in_slots=heads.head_dim > site.head_dim)


def _add(
    moments: dict[str, Tensor], seen: Counter[str], field: str, module: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    """Add the inputs of a module to the second moments of that field, before it runs, and their number to what was seen."""
    rows = inputs[0].flatten(0, -2)
    seen[field] += len(rows)
    add_moments(moments, field, rows)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Return a context in which no parameter of the model itself has a gradient, whoever opened it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
