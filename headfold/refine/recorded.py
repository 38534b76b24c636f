"""Runs other heads in an attention block: the stock module, replayed on the calls that the original received."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..core.heads import Heads
from ..families.layout import write_heads
from ..families.spec import Site
from ..parallel import all_reduce, world_size
from ..runtime.regrouping import ask_transformers, input_modules, local_names, regrouped
from . import fixed_attention
from .blocks import Call, twin

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_SAME = 1e-3
"""Largest relative difference of a call to its parts."""


class RecordedCall(NamedTuple):
    """One call of the original's attention, the output of its output projection, and which positions are not padding."""

    call: Call
    output: Float[Tensor, "batch token model"]
    mask: Bool[Tensor, "batch token"] | None

    def part(self, index: int, parts: int) -> "RecordedCall":
        """Return one of so many parts of the call, each with its items of the batch; it may have none."""
        size = len(self.output)
        items = slice(size * index // parts, size * (index + 1) // parts)

        def cut(value: Any) -> Any:
            if type(value) is tuple:
                return tuple(map(cut, value))
            if not isinstance(value, Tensor) or value.ndim < 3 or len(value) % size:
                return value if not isinstance(value, Tensor) or value.ndim != 2 or len(value) != size else value[items]
            times = len(value) // size  # several rows of an item: a bias of each head (BLOOM)
            return value[items.start * times : items.stop * times]

        args, kwargs = self.call
        call = (tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()})
        return RecordedCall(call, self.output[items], None if self.mask is None else self.mask[items])

    def storages(self) -> dict[int, int]:
        """Return address → bytes of every tensor that it holds; tensors that sites share (masks, an encoder's output) have one
        address.
        """
        (args, kwargs), output = self.call, self.output
        return {t.data_ptr(): t.nbytes for t in (*args, *kwargs.values(), output) if isinstance(t, Tensor)}


@dataclass(frozen=True, slots=True)
class Replay:
    """One call replayed with other heads, without padding: input and output of the output projection, the original's output (the
    target), and the inputs of the query and value projections; of queries none where the weights of attention are kept.
    """

    inputs: Float[Tensor, "position head_times_dim"]
    output: Float[Tensor, "position model"]
    target: Float[Tensor, "position model"]
    query_inputs: Float[Tensor, "position_of_queries model"]
    value_inputs: Float[Tensor, "position_of_values value_model"]


class AttentionInputs(NamedTuple):
    """What one call passes to its attention, and the inputs of its query projection."""

    query: Float[Tensor, "batch head token dim"]
    key: Float[Tensor, "batch group key dim"]
    mask: Tensor | None
    scaling: float
    causal: bool
    inputs: Float[Tensor, "batch token model"]
    counted: Bool[Tensor, "batch token"] | None
    """Which queries are not padding."""


class _Reached(Exception):
    """Raised where a replay has computed what it was for."""


class _Unread(nn.Module):
    """Stands for a projection to `size` dims whose output nobody reads."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.new_zeros(*inputs.shape[:-1], self._size)


def thinned_by(queries: float, positions: float) -> int:
    """Return how many times more queries there are than `positions`: one in so many calls is enough."""
    return max(1, int(queries / positions))


class RecordedSite:
    """One site of the original with its recorded calls, which can be replayed with other heads.

    The heads to replay are grouped and in standard order; the stock module runs their head-repeated twin, so gradients of shared
    heads are summed over the queries that read them; heads with a larger head_dim run slot by slot. `order` is the standard order:
    new position → query head of the original; a position bias among the arguments of a call (T5's, made in the first layer of a
    stack) is reordered by it. `numbers` are those of the calls recorded here, `all_numbers` those of
    all ranks. `on_replay` is called with the number of each replayed call. A solver that leaves Q and K
    as they are says so by `fixes_attention`: the attention weights of a call are then computed once (`fixed_attention.py`) where the
    class allows it, and gradients reach V alone, until `free_attention`.
    """

    def __init__(
        self,
        attention: nn.Module,
        site: Site,
        recorded: Sequence[RecordedCall],
        order: Sequence[int],
        on_replay: Callable[[int], None] = lambda number: None,
        model: "PreTrainedModel | None" = None,
        head_dim_multiple: int = 1,
        numbers: range | None = None,
        all_numbers: range | None = None,
        *,
        fixes_attention: bool = False,
    ) -> None:
        self.site, self._on_replay = site, on_replay
        self.numbers: Sequence[int] = range(len(recorded)) if numbers is None else numbers
        self.all_numbers: Sequence[int] = range(len(recorded)) if all_numbers is None else all_numbers
        self._parts = 1
        self._recorded = dict(zip(self.numbers, recorded, strict=True))
        self.order, self._head_dim_multiple = torch.tensor(order), head_dim_multiple
        self._module = twin(attention, site, {})
        if head_dim_multiple > 1:  # which the stock module has no room for
            assert model is not None
            regrouped(self._module, site, site.num_kv_heads, head_dim_multiple, model)
        elif fixes_attention:
            ask_transformers(self._module, site)
        self._core = self._module.get_submodule(site.core.removeprefix(site.module).removeprefix("."))
        self._fixed = fixed_attention.install(self._core) if fixes_attention and head_dim_multiple == 1 else None
        self._parameters = dict(self._module.named_parameters())
        self._written: tuple[Heads, dict[str, Tensor]] | None = None
        self._unread = self._query_and_key_projections() if self._fixed is not None else {}
        self._inputs = {
            role: self._module.get_submodule(path.removeprefix(f"{site.module}."))
            for role, path in input_modules(site, in_slots=head_dim_multiple > 1).items()
        }

    def _submodule(self, role: str) -> nn.Module:
        return self._module.get_submodule(self.site.paths[role].removeprefix(f"{self.site.module}."))

    def _query_and_key_projections(self) -> dict[str, nn.Linear]:
        """Return by path in the module the projections that give queries or keys and nothing else, such as a gate or the values."""
        paths, site = self.site.paths, self.site
        sizes = {"q": site.num_heads * site.head_dim, "k": site.num_kv_heads * site.head_dim}
        found: dict[str, nn.Linear] = {}
        for role, size in sizes.items():
            module = self._submodule(role) if role in paths and "v" in paths else None
            if isinstance(module, nn.Linear) and module.out_features == size:
                found[paths[role].removeprefix(f"{site.module}.")] = module
        return found

    @contextmanager
    def _skipped(self, number: int) -> Iterator[tuple[str, ...]]:
        """Return a context in which queries and keys are zero if the attention weights of that call are kept; it gives the prefixes of
        the parameters that the module lacks there.
        """
        unread = self._unread if self._fixed is not None and self._fixed.keeps(number) else {}
        for path, module in unread.items():
            self._module.set_submodule(path, _Unread(module.out_features))
        try:
            yield tuple(f"{path}." for path in unread)
        finally:
            for path, module in unread.items():
                self._module.set_submodule(path, module)

    def target(self, number: int) -> Float[Tensor, "position model"]:
        """Return the original's output for the call of that number, in float32 or better, without padding."""
        _, target, mask = self._recorded[number]
        return _rows(target, None if mask is None else mask.flatten())

    def run(self, heads: Heads, number: int) -> Replay:
        """Replay the call of that number with other heads, in float32 or better, as sums in half precision would hide a ridge."""
        _, target, mask = self._recorded[number]
        found: dict[str, Tensor] = {}
        hooks = [
            self._inputs["q"].register_forward_pre_hook(lambda module, inputs: found.update(q=inputs[0])),
            self._inputs["v"].register_forward_pre_hook(lambda module, inputs: found.update(v=inputs[0])),
            self._inputs["o"].register_forward_hook(
                lambda module, inputs, output: found.update(o=inputs[0], output=output)
            ),
        ]
        try:
            self._call(heads, number)
        finally:
            for hook in hooks:
                hook.remove()
        kept = None if mask is None else mask.flatten()
        inputs, output, target = (_rows(t, kept) for t in (found["o"], found["output"], target))
        # Keys' padding is left out where they are the queries' own; elsewhere it weighs little in a preconditioner.
        same = found["v"].shape[:-1].numel() == (len(inputs) if kept is None else len(kept))
        query_inputs = _rows(found["q"], kept) if "q" in found else inputs.new_zeros(0, found["v"].shape[-1])
        return Replay(inputs, output, target, query_inputs, _rows(found["v"], kept if same else None))

    def output_inputs(self, heads: Heads, number: int) -> Float[Tensor, "position head_times_dim"]:
        """Return the inputs of the output projection, as `run` does; nothing after them is computed."""
        found: list[Tensor] = []

        def stop(module: nn.Module, inputs: tuple[Tensor]) -> None:
            found.append(inputs[0])
            raise _Reached

        hook = self._inputs["o"].register_forward_pre_hook(stop)
        try:
            with suppress(_Reached):
                self._call(heads, number)
        finally:
            hook.remove()
        mask = self._recorded[number].mask
        return _rows(found[0], None if mask is None else mask.flatten())

    def _call(self, heads: Heads, number: int) -> None:
        """Run the module on the call of that number with other heads."""
        args, kwargs = self._reordered_call(number)
        if self._fixed is not None:
            self._fixed.number = number
        if number % self._parts == self._parts - 1:  # the last part of a call is never empty
            self._on_replay(number // self._parts)
        with self._skipped(number) as skipped:
            tensors = {name: t for name, t in self._tensors(heads).items() if not name.startswith(skipped)}
            torch.func.functional_call(self._module, tensors, args, kwargs)

    def _reordered_call(self, number: int) -> Call:
        """Return the call of that number for heads in standard order."""
        args, kwargs = self._recorded[number].call
        bias = kwargs.get("position_bias")
        if isinstance(bias, Tensor) and bias.shape[1] == len(self.order):
            kwargs = {**kwargs, "position_bias": bias.index_select(1, self.order.to(bias.device))}
        return args, kwargs

    def thin(self, positions: int, device: torch.device) -> None:
        """Keep every second call, or every third … where the calls of all ranks have so many times more queries than `positions`.

        The number has no factor in common with that of the ranks, so that these, which take calls in turns, keep as many each.
        """
        times = thinned_by(self.total_queries(device), positions)
        while gcd(times, world_size()) > 1:
            times -= 1
        self.all_numbers = self.all_numbers[::times]
        self.numbers = [number for number in self.numbers if number in self.all_numbers]
        self._recorded = {number: self._recorded[number] for number in self.numbers}

    def free_attention(self) -> None:
        """Compute the attention weights of every call anew from now on, so that gradients reach Q and K."""
        if self._fixed is not None:
            fixed_attention.remove(self._core)
            self._fixed, self._unread = None, {}

    def split(self, parts: int, heads: Heads) -> None:
        """Make `parts` calls of each, or fewer where it has fewer items, if these do together what it does: else leave them as they are."""
        before, first = (self._recorded, self.numbers, self.all_numbers), next(iter(self.numbers), None)
        whole = None if first is None else self.run(heads, first).output
        every = [number * parts + index for number in self.all_numbers for index in range(parts)]
        cut = {
            number * parts + index: call.part(index, parts)
            for number, call in self._recorded.items()
            for index in range(parts)
        }
        items = torch.tensor(
            [float(len(cut[number].output)) if number in cut else 0.0 for number in every], dtype=torch.float64
        )
        self.all_numbers = [number for number, count in zip(every, all_reduce(items).tolist(), strict=True) if count]
        self._recorded = {number: call for number, call in cut.items() if len(call.output)}
        self.numbers, self._parts = [*self._recorded], parts
        differs = 0.0
        if whole is not None:
            try:
                own = [self.run(heads, number).output for number in self.numbers if number // parts == first]
                differs = float((torch.cat(own) - whole).square().sum() > _SAME**2 * whole.square().sum())
            except RuntimeError:  # of shapes, where rows are no items
                differs = 1.0
        if all_reduce(torch.tensor(differs, dtype=torch.float64)).item():
            (self._recorded, self.numbers, self.all_numbers), self._parts = before, 1

    @property
    def dtype(self) -> torch.dtype:
        """What the module computes in."""
        return next(iter(self._parameters.values())).dtype

    @property
    def catches_attention(self) -> bool:
        """Whether `attention_inputs` can be asked for."""
        return self._fixed is not None

    def num_queries(self, number: int) -> int:
        """Return the number of positions of the call of that number that are not padding."""
        _, output, mask = self._recorded[number]
        return output.shape[:-1].numel() if mask is None else int(mask.sum())

    def total_queries(self, device: torch.device) -> float:
        """Return the number of positions of the calls of all ranks that are not padding."""
        own = float(sum(map(self.num_queries, self.numbers)))
        return all_reduce(torch.tensor(own, dtype=torch.float64, device=device)).item()

    def attention_inputs(self, heads: Heads | None, number: int) -> AttentionInputs:
        """Return what the call of that number passes to its attention with other heads, or with the original's in its own order."""
        assert self._fixed is not None
        (args, kwargs), _, mask = self._recorded[number]
        if heads is not None:
            args, kwargs = self._reordered_call(number)
        inputs: list[Tensor] = []
        hook = self._inputs["q"].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        tensors = {} if heads is None else self._tensors(heads)
        try:
            caught = self._fixed.catch(lambda: torch.func.functional_call(self._module, tensors, args, kwargs))
        finally:
            hook.remove()
        return AttentionInputs(*caught, inputs[0], mask)

    def _tensors(self, heads: Heads) -> dict[str, Tensor]:
        """Return the module's parameters that depend on the heads, by name in the module; made once for calls with the same heads."""
        if self._written is not None and self._written[0] is heads:
            return self._written[1]
        tensors = write_heads(self.site, heads.expand(self.site.num_kv_heads), in_slots=self._head_dim_multiple > 1)
        names = local_names(self.site)
        local = {names[name]: t for name, t in tensors.items() if name in names}
        found = {name: t.to(self._parameters[name]) for name, t in local.items() if name in self._parameters}
        self._written = None if any(t.requires_grad for t in found.values()) else (heads, found)
        return found


def _rows(tensor: Tensor, kept: Tensor | None) -> Tensor:
    rows = tensor.reshape(-1, tensor.shape[-1])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows if kept is None else rows[kept]
