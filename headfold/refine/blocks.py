"""Runs a stock model block by block: one pass over the data, one block at a time, with the inputs of every attention site recorded.

The hidden states of all calibration windows are kept between blocks; a block is run once per batch of windows. The other arguments of a
block (position embeddings, masks) are the same for every batch of one shape, so they are recorded once.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..calibration import Sample, run
from ..families.spec import Site
from ..hf_models.streamed import input_device, weights_held

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(Exception):
    """Raised so that the rest of the model is not run; carries a call."""

    def __init__(self, call: Call) -> None:
        self.call = call


@dataclass(frozen=True, slots=True)
class Block:
    """One attention site in its transformer block."""

    site: Site
    block: nn.Module
    attention: nn.Module

    def run(self, hidden: Float[Tensor, "batch token model"], keywords: dict[str, Any]) -> tuple[Tensor, Call, Tensor]:
        """Return the block's output, the call that its attention received, and the output of its output projection."""
        with _recorded(self.attention, self.site) as seen:
            output = _first(self.block(hidden, **keywords))
        return output, *seen[0]


@contextmanager
def _recorded(attention: nn.Module, site: Site) -> Iterator[list[tuple[Call, Tensor]]]:
    """Return a context that records every call of the module with a site's projections, with the output of the output projection."""
    outputs: list[Tensor] = []
    seen: list[tuple[Call, Tensor]] = []
    projection = attention.get_submodule(site.paths["o"].removeprefix(f"{site.module}."))
    handles = [
        projection.register_forward_hook(lambda module, inputs, output: outputs.append(output)),
        attention.register_forward_hook(
            lambda module, args, kwargs, _: seen.append(((args, kwargs), outputs.pop())), with_kwargs=True
        ),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def recorded_calls(
    model: "PreTrainedModel", sites: list[Site], batch: Sample
) -> Iterator[tuple[Site, Call, Float[Tensor, "*batch model"]]]:
    """Yield each call of each site's attention and the output of its output projection, from a pass of the model up to the last site.

    Of a module that several layers run, all calls of the pass are one: they are joined along the batch.
    """
    left = {site.name for site in sites}
    repeated = any(site.repeated for site in sites)

    def reached(name: str) -> Callable[..., None]:
        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            left.discard(name)
            if not left and not repeated:
                raise _Reached((args, kwargs))

        return stop

    with ExitStack() as stack:
        recorded = [(site, stack.enter_context(_recorded(model.get_submodule(site.module), site))) for site in sites]
        for site in sites:
            handle = model.get_submodule(site.module).register_forward_hook(reached(site.name), with_kwargs=True)
            stack.callback(handle.remove)
        with suppress(_Reached):
            run(model, batch)
    for site, seen in recorded:
        for call, output in [_joined(seen)] if site.repeated and seen else seen:
            yield site, call, output


def _joined(seen: list[tuple[Call, Tensor]]) -> tuple[Call, Tensor]:
    """Return several calls as one of a larger batch. What is not a tensor of the batch is the same in all of them."""
    size = len(seen[0][1])

    def along_the_batch(each: list[Any]) -> Any:
        one = each[0]
        return torch.cat(each) if isinstance(one, Tensor) and one.ndim and len(one) == size else one

    arguments = zip(*(args for (args, _), _ in seen), strict=True)
    keywords = seen[0][0][1]
    joined = {name: along_the_batch([kwargs[name] for (_, kwargs), _ in seen]) for name in keywords}
    return (tuple(along_the_batch(list(each)) for each in arguments), joined), torch.cat([output for _, output in seen])


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def blocks_of(model: "PreTrainedModel", sites: list[Site]) -> list[Block]:
    """Return the blocks of the sites, in order. A site's block is the module that contains its attention."""
    return [Block(s, model.get_submodule(s.module.rpartition(".")[0]), model.get_submodule(s.module)) for s in sites]


def first_hidden_states(
    model: "PreTrainedModel", first: Block, batch: Int[Tensor, "batch token"]
) -> Float[Tensor, "batch token model"]:
    """Return the hidden states that the first block receives."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached((args, kwargs))

    handle = first.block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.base_model(input_ids=batch.to(input_device(model)), use_cache=False)
    except _Reached as reached:
        args, kwargs = reached.call
        return args[0] if args else kwargs["hidden_states"]
    finally:
        handle.remove()
    raise AssertionError("the first block was never called")


def block_keywords(
    model: "PreTrainedModel", blocks: list[Block], batch: Int[Tensor, "batch token"]
) -> list[dict[str, Any]]:
    """Return the arguments of every block besides the hidden states, for batches of this shape.

    They depend on the shape alone, so blocks of one class need not run, but for the first, which tells the form of their output.
    """
    recorded: dict[int, dict[str, Any]] = {}

    def recorder(index: int) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert len(args) <= 1, "a block takes only its hidden states by position"
            recorded[index] = {key: value for key, value in kwargs.items() if key != "hidden_states"}

        return record

    with ExitStack() as stack:
        for index, each in enumerate(blocks):
            handle = each.block.register_forward_pre_hook(recorder(index), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(_not_run([each.block for each in blocks]))
        model.base_model(input_ids=batch.to(input_device(model)), use_cache=False)
    return [recorded[index] for index in range(len(blocks))]


@contextmanager
def _not_run(blocks: list[nn.Module]) -> Iterator[None]:
    """Return a context in which all blocks but the first pass their hidden states on, if they are of its class."""
    first, *others = blocks
    others = [block for block in others if type(block) is type(first)]
    sizes: list[int] = []
    handle = first.register_forward_hook(
        lambda module, args, output: sizes.append(0 if isinstance(output, Tensor) else len(output))
    )

    def passes_on(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *[None] * (sizes[0] - 1)) if sizes[0] else hidden

    own = [vars(block).get("forward") for block in others]  # accelerate sets one where it streams weights
    for block in others:
        block.forward = passes_on
    try:
        yield
    finally:
        handle.remove()
        for block, forward in zip(others, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def twin(attention: nn.Module, site: Site, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a stock attention module with other weights of the same shapes; `weights` are given by names on disk."""
    # What streams an original's weights from disk is not copied: a twin holds its weights.
    hooks = [part._hf_hook for part in attention.modules() if hasattr(part, "_hf_hook")]
    module = copy.deepcopy(attention, {id(hook): None for hook in hooks})
    for part in module.modules():
        if "_old_forward" in part.__dict__:
            part.forward = part.__dict__.pop("_old_forward")
    values = {name: _value(attention, name) for name, _ in attention.named_parameters()}
    for name, tensor in weights.items():
        key = site.parameters[name].removeprefix(f"{site.module}.")
        values[key] = tensor.to(values[key])
    module.load_state_dict(values, strict=False, assign=True)
    return module


def _value(module: nn.Module, name: str) -> Tensor:
    """Return a parameter's value, read from disk where the module holds only a shape."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    parameter = getattr(owner, leaf)
    if parameter.device.type != "meta":
        return parameter.detach()
    hook: Any = owner._hf_hook
    return hook.weights_map[leaf]


def walk(
    model: "PreTrainedModel", sites: list[Site], batches: list[Int[Tensor, "_batch _token"]]
) -> Iterator[tuple[Block, Callable[[int], tuple[Call, Tensor]]]]:
    """Yield every block with a function from the number of a batch to its attention's call and output in the original model.

    The function must be called once per batch, in any order, before the next block is requested.
    """
    blocks = blocks_of(model, sites)
    with weights_held(model):
        keywords = {len(batch): block_keywords(model, blocks, batch) for batch in {len(b): b for b in batches}.values()}
        hidden = [first_hidden_states(model, blocks[0], batch) for batch in batches]
    for index, block in enumerate(blocks):
        with weights_held(model) as keep_only:
            left = set(range(len(batches)))

            def visit(
                number: int, index: int = index, block: Block = block, left: set[int] = left, keep_only: Any = keep_only
            ) -> tuple[Call, Tensor]:
                hidden[number], call, output = block.run(hidden[number], keywords[len(batches[number])][index])
                left.discard(number)
                if not left:  # what follows needs the attention alone
                    keep_only(block.site.module)
                return call, output

            yield block, visit
