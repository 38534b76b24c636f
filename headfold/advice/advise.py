"""Advice before a fold: what fits, what a decoding step gains, whether that pays, and the command for it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..conversion.source import Source
from ..core.errors import UserError
from ..core.sizes import parse_size
from ..families.context import context_length
from .commands import next_fold
from .demand import Demand, demands
from .devices import Device, gpu_named, this_machine

CONTEXT = 32_768
"""Tokens that advice is for by default, where the model takes as many."""
USABLE = 0.9
"""Share of a memory that weights and cache may take; the rest is for activations and the engine, as vLLM has it by default."""
PAYS = 0.1
"""Share of a decoding step from which a saving is called one: less is lost in the differences between engines."""
MOST, MOST_SEQUENCES = 2**31, 2**16
"""Tokens, and sequences, that are searched for at most."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What a model is to be served for: tokens of context and sequences at once, on a device."""

    context: int
    batch: int
    device: Device

    @property
    def usable(self) -> float:
        """The bytes that weights and cache may take."""
        return USABLE * self.device.memory

    def seconds(self, demand: Demand) -> tuple[float, float]:
        """Return the least seconds of a decoding step by the roofline: those of the weights, and those of the cache."""
        read = demand.read_bytes(self.batch) / self.device.bandwidth
        computed = self.batch * demand.operations_per_token / self.device.rate
        return max(read, computed), self.batch * demand.cache_bytes(self.context) / self.device.bandwidth


@dataclass(frozen=True, slots=True)
class FoldOption:
    """The model, or a fold of it, in one workload. What is about a cache is 0 or None in models that cache nothing."""

    num_kv_heads: int
    weight_bytes: int
    operations_per_token: float
    """Floating-point operations of the linear layers for one token."""
    fits: bool
    """Whether weights and cache fit into the usable memory."""
    cache_bytes: int
    """Of the whole batch at this context."""
    longest_context: int | None
    """Tokens that fit at this batch, at most the model's own; 0 where not even one does, None without any limit."""
    largest_batch: int | None
    """Sequences that fit at this context."""
    step_seconds: float | None
    """The least time of a new token for the whole batch."""
    cache_share: float | None
    """The part of that time that reading the cache takes."""


@dataclass(frozen=True, slots=True)
class Advice:
    """Advice on folding one model for one workload. `options` begin with the model as it is. Sizes are in bytes."""

    context: int
    batch: int
    device: str
    memory: float
    usable_memory: float
    bandwidth: float
    """Bytes per second."""
    rate: float
    """Floating-point operations per second."""
    source: str
    """The document that memory, bandwidth and rate are from, or how they were measured."""
    caches: bool
    own_context: int | None
    """Tokens that the model takes at once; None where its config names no limit."""
    encoder_tokens: int | None
    """Entries of the cache of cross-attention; None where there is none."""
    options: list[FoldOption]
    pays: bool
    reason: str
    """One line on why folding pays or does not."""
    command: str | None
    """The fold to begin with; None where none pays."""


def workload(source: Source, context: int | None, batch: int | None, memory: str | None, gpu: str | None) -> Workload:
    """Return the workload that these options mean; None stands for a default.

    Raises:
        UserError: not a size, an unknown GPU, no positive numbers, or more tokens than the model takes.
    """
    limit = context_length(source.config)
    for name, number in (("--context", context), ("--batch", batch)):
        if number is not None and not 1 <= number < MOST:
            raise UserError(f"{name} {number}: expected a number from 1 on and below 2^31; choose another")
    if context is not None and limit is not None and context > limit:
        raise UserError(f"--context {context}: the model's own context is {limit}; choose at most that")
    stated = (
        None
        if memory is None
        else parse_size("--memory", memory, "a size with its unit, such as 24GiB", with_unit=True)
    )
    device = this_machine(source.dtype) if gpu is None else gpu_named(gpu)
    if stated is not None:
        device = Device(device.name, stated, device.bandwidth, device.rate, device.source)
    return Workload(context or min(limit or CONTEXT, CONTEXT), batch or 1, device)


def advise(source: Source, work: Workload) -> Advice:
    """Return advice on a workload, from the headers of the checkpoint alone."""
    limit, generates = context_length(source.config), source.caches
    found = list(demands(source))
    options = [_option(demand, work, limit, generates) for demand in found]
    decide = _decide if generates else _decide_without_cache
    chosen, reason = decide(found, options, work, limit)
    device = work.device
    crosses = any(block.reads_encoder for block in found[0].blocks)
    return Advice(
        context=work.context,
        batch=work.batch,
        device=device.name,
        memory=device.memory,
        usable_memory=work.usable,
        bandwidth=device.bandwidth,
        rate=device.rate,
        source=device.source,
        caches=generates,
        own_context=limit,
        encoder_tokens=(found[0].encoder_tokens or work.context) if crosses else None,
        options=options,
        pays=chosen is not None,
        reason=reason,
        command=None
        if chosen is None
        else next_fold(source, chosen.num_kv_heads, "--kv-heads", str(chosen.num_kv_heads)),
    )


def _option(demand: Demand, work: Workload, limit: int | None, generates: bool) -> FoldOption:
    free = work.usable - demand.weight_bytes
    if not generates:
        nothing = (free >= 0, 0, None, None, None, None)
        return FoldOption(demand.num_kv_heads, demand.weight_bytes, demand.operations_per_token, *nothing)
    weights, cache = work.seconds(demand)
    one, top = demand.cache_bytes(work.context), limit or MOST
    longest = _most(lambda tokens: work.batch * demand.cache_bytes(tokens) <= free, top)
    return FoldOption(
        num_kv_heads=demand.num_kv_heads,
        weight_bytes=demand.weight_bytes,
        operations_per_token=demand.operations_per_token,
        fits=work.batch * one <= free,
        cache_bytes=work.batch * one,
        longest_context=None if longest == MOST else longest,
        largest_batch=max(0, math.floor(free / one)),
        step_seconds=weights + cache,
        cache_share=cache / (weights + cache),
    )


def _most(holds: Callable[[int], bool], top: int) -> int:
    """Return the largest number up to `top` for which a condition holds that holds for all smaller ones; 0 if for none from 1 on."""
    if holds(top):
        return top
    low, high = 0, top
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _decide(
    found: list[Demand], options: list[FoldOption], work: Workload, limit: int | None
) -> tuple[FoldOption | None, str]:
    """Return the fold to begin with, the one with most K/V heads that serves, or None, and why."""
    now, folds = options[0], options[1:]
    wanted = f"{work.context:,} tokens x {work.batch:,}"
    if not folds:
        return None, f"there is nothing to fold: equal groups allow no fewer than {_counted(now)}"
    if options[-1].weight_bytes > work.usable:
        return (
            None,
            "folding does not help: the weights alone are larger than the usable memory; quantise them, or use more memory",
        )
    if not now.fits:
        if fitting := [option for option in folds if option.fits]:
            return fitting[0], f"folding pays: {wanted} does not fit now, and fits with {_counted(fitting[0])}"
        least = options[-1]
        return None, (
            f"folding is not enough: {wanted} does not fit with {_counted(least)} either; there at most "
            f"{least.longest_context or 0:,} tokens x {work.batch:,}, or {work.context:,} tokens x {least.largest_batch or 0:,}, do"
        )
    share = f"reading the cache is {now.cache_share or 0:.0%} of a decoding step"
    worth = [option for option in folds if _saves(now.cache_share, option.cache_bytes / now.cache_bytes)]
    if not worth:
        return None, f"folding does not pay here: {share}{_from_where(found, work, limit)}"
    first, last = (1 - (option.step_seconds or 0) / (now.step_seconds or 1) for option in (worth[0], folds[-1]))
    fewer = "" if worth[0] is folds[-1] else f", with {folds[-1].num_kv_heads} {last:.0%}"
    return worth[0], f"folding pays: {share}; with {_counted(worth[0])} it is {first:.0%} shorter{fewer}"


def _saves(cache_share: float | None, kept: float) -> bool:
    """Return whether keeping a part of the cache shortens a step enough. What smaller weights save, other means save without a loss."""
    return (cache_share or 0) * (1 - kept) >= PAYS


def _from_where(found: list[Demand], work: Workload, limit: int | None) -> str:
    """Return from which context on, or else from which batch on, the deepest fold pays; an empty string if from none that fits."""
    now, least = found[0], found[-1]

    def pays(context: int, batch: int) -> bool:
        weights, cache = Workload(context, batch, work.device).seconds(now)
        return _saves(cache / (weights + cache), least.cache_bytes(context) / now.cache_bytes(context))

    def fits(context: int, batch: int) -> bool:
        return now.weight_bytes + batch * now.cache_bytes(context) <= work.usable

    context = 1 + _most(lambda tokens: not pays(tokens, work.batch), limit or MOST)
    if context <= (limit or MOST) and fits(context, work.batch):
        return f"; it pays from about {_rounded(context):,} tokens on at this batch"
    batch = 1 + _most(lambda sequences: not pays(work.context, sequences), MOST_SEQUENCES)
    if batch <= MOST_SEQUENCES and fits(work.context, batch):
        return f"; it pays from about {_rounded(batch):,} sequences on at this context"
    return ""


def _rounded(number: int) -> int:
    """Return a number with two digits that count."""
    return round(number, 2 - len(str(number)))


def _decide_without_cache(
    found: list[Demand], options: list[FoldOption], work: Workload, limit: int | None
) -> tuple[FoldOption | None, str]:
    """Do the same for a model that generates nothing: only weights and arithmetic shrink."""
    now, folds = options[0], options[1:]
    if not folds:
        return None, f"there is nothing to fold: equal groups allow no fewer than {_counted(now)}"
    gains = [1 - option.operations_per_token / now.operations_per_token for option in folds]
    least = folds[-1]
    facts = (
        f"the model caches nothing; {_counted(least)} saves {1 - least.weight_bytes / now.weight_bytes:.0%} of the weights "
        f"and {gains[-1]:.0%} of the operations of linear layers at most"
    )
    worth = [option for option, gain in zip(folds, gains, strict=True) if gain >= PAYS]
    return (worth[0], f"folding pays: {facts}") if worth else (None, f"folding does not pay: {facts}")


def _counted(option: FoldOption) -> str:
    return f"{option.num_kv_heads} K/V head{'s' if option.num_kv_heads > 1 else ''}"
