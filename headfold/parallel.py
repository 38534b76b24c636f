"""Several processes as one program (SPMD): a launcher (torchrun, accelerate launch) starts them, and all run the same lines.

Rank 0 alone writes and prints; `on_main` hands what it finds to the other ranks. Every rank runs its share of
each pass over data, and sums are reduced over all ranks, so that all hold the same numbers. Without a launcher, every function here
behaves as in a single process.
"""

import atexit
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from .core.errors import AlreadyFinished, UserError

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import Tensor
    from torch.distributed import ProcessGroup, Store

P = ParamSpec("P")
T = TypeVar("T")
Batch = TypeVar("Batch")

PATIENCE = timedelta(days=7)
"""How long a worker waits for rank 0, which plans and samples alone for hours. A process that dies is noticed at once."""
LAST_WORD = 20.0
"""Seconds that a worker waits for rank 0 to print before it exits: launchers end all processes as soon as one has failed."""


class ProcessLost(UserError):
    """Another process has died or cannot be reached any more."""


@dataclass(slots=True)
class _Group:
    state: "PartialState"
    messages: "ProcessGroup"
    """Objects travel over this group, with patience, whatever tensors travel over."""
    store: "Store"
    shares: bool = True
    """False while rank 0 works alone."""


_group: _Group | None = None
_lost = False
"""Whether another process could not be reached."""


def launched() -> bool:
    """Return whether a launcher started this process beside others."""
    return {"RANK", "LOCAL_RANK"} <= os.environ.keys() and int(os.environ.get("WORLD_SIZE", 1)) > 1


def num_processes() -> int:
    """Return the number of processes that the launcher started."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def num_local_processes() -> int:
    """Return the number of processes that share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() else 1


def is_main() -> bool:
    """Return whether this process prints and writes: rank 0, or the only process."""
    return not launched() or os.environ["RANK"] == "0"


def spmd(verb: Callable[P, T]) -> Callable[P, T]:
    """Decorate a verb that all launched processes run together.

    Raises:
        UserError: from the verb; also if the processes cannot reach each other or outnumber the GPUs of their machine.
    """

    @wraps(verb)
    def run(*arguments: P.args, **options: P.kwargs) -> T:
        if not launched() or _group is not None:
            return verb(*arguments, **options)
        with _joined():
            return verb(*arguments, **options)

    return run


def main_only(verb: Callable[P, T]) -> Callable[P, T]:
    """Decorate a verb whose work is not shared: rank 0 runs it, and every rank returns its result."""

    @wraps(verb)
    def run(*arguments: P.args, **options: P.kwargs) -> T:
        return on_main(partial(verb, *arguments, **options))

    return spmd(run)


def world_size() -> int:
    """Return the number of processes that share passes over data at this point."""
    return _group.state.num_processes if _group is not None and _group.shares else 1


def rank() -> int:
    """Return the number of this process among those that share passes over data."""
    return _group.state.process_index if _group is not None and _group.shares else 0


def share(count: int) -> range:
    """Return the numbers, of `count` items, that this rank works on; empty where there are fewer items than ranks."""
    return range(rank(), count, world_size())


def falls_here(number: int) -> bool:
    """Return whether the item of that number belongs to this rank."""
    return number % world_size() == rank()


def all_reduce(tensor: "Tensor") -> "Tensor":
    """Return the sum over all ranks, bitwise the same on each; every rank passes a tensor of one shape and dtype, and gives it up."""
    if world_size() == 1:
        return tensor
    import torch.distributed as dist

    assert _group is not None
    total = tensor.contiguous().to(_group.state.device)
    with _reachable():
        dist.all_reduce(total)
    return total.to(tensor.device)


def all_gather(value: T) -> list[T]:
    """Return the value of every rank, in their order."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    assert _group is not None
    values: list[Any] = [None] * world_size()
    with _reachable():
        dist.all_gather_object(values, value, _group.messages)
    return values


def run_shared(
    batches: Iterable[Batch], run: Callable[[Batch], T], finished: Callable[[Batch], None] = lambda batch: None
) -> list[T]:
    """Return `run` of every batch, in the order of the batches, on every rank.

    Batch number n is run by the rank that it falls to, so all ranks must give the same batches. Ts must be small, and tensors among
    them must lie in CPU memory. With one process this is a loop. `finished` is called with each batch that has been run or left to
    another rank.

    Raises:
        UserError: a batch was refused, on any rank.
    """

    def own() -> list[tuple[int, T]]:
        results = []
        for number, batch in enumerate(batches):
            if falls_here(number):
                results.append((number, run(batch)))
            finished(batch)
        return results

    return gathered_in_order(on_all(own))


def gathered_in_order(own: Sequence[tuple[int, T]]) -> list[T]:
    """Return the results of all ranks, ordered by the numbers that go with them."""
    numbered = [pair for pairs in all_gather(list(own)) for pair in pairs]
    return [result for _, result in sorted(numbered, key=lambda pair: pair[0])]


def on_main(make: Callable[[], T]) -> T:
    """Run `make` on rank 0 alone and return its value on every rank.

    Raises:
        UserError: from `make`, on every rank.
    """
    return make() if world_size() == 1 else _on_main(make, shared=True)


def on_main_only(make: Callable[[], T]) -> T:
    """Run `make` on rank 0 alone and return its value there; other ranks get None, which they must not use.

    Raises:
        UserError: from `make`, on every rank.
    """
    return make() if world_size() == 1 else _on_main(make, shared=False)


def _on_main(make: Callable[[], T], *, shared: bool) -> T:
    value: Any = None
    error: UserError | OSError | None = None
    if rank() == 0:
        try:
            with _alone():
                value = make()
        except (UserError, OSError) as raised:
            error = raised
    finished = isinstance(error, AlreadyFinished)
    said, reason, finished = _broadcast((value if shared and error is None else None, error and str(error), finished))
    if reason is not None:
        raise error or (AlreadyFinished if finished else UserError)(reason)
    return said if rank() else value


def each_from_main(make: Callable[[], Iterator[T]]) -> Iterator[T]:
    """Iterate on rank 0 over what `make` returns, and yield each item on every rank; one item is in memory at a time.

    Raises:
        UserError: from the iterator, on every rank.
    """
    if world_size() == 1:
        yield from make()
        return
    iterator = on_main_only(make)
    while True:
        item = on_main(lambda: next(([value] for value in iterator), []))
        if not item:
            return
        yield item[0]


def on_all(make: Callable[[], T]) -> T:
    """Run `make` on every rank and return its value there. An error on one rank is raised on all of them.

    Raises:
        UserError: from `make`; another rank's names its number.
    """
    if world_size() == 1:
        return make()
    value: Any = None
    error: UserError | OSError | None = None
    try:
        value = make()
    except (UserError, OSError) as raised:
        error = raised
    reasons = {at: text for at, text in enumerate(all_gather(error and str(error))) if text is not None}
    if not reasons:
        return value
    said = "; ".join(f"process {at}: {text}" for at, text in reasons.items())
    raise error if error is not None and rank() == 0 else UserError(said)


@contextmanager
def reachable_peers() -> Iterator[None]:
    """Report a lost process as `ProcessLost` where another library sends between the processes (a Trainer's backward pass)."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not re.search(r"gloo|nccl|connection|peer", str(error), re.IGNORECASE):
            raise
        with _reachable():
            raise


@contextmanager
def _alone() -> Iterator[None]:
    assert _group is not None
    _group.shares = False
    try:
        yield
    finally:
        _group.shares = True


@contextmanager
def _joined() -> Iterator[None]:
    """Make this process one of the launched ones for the duration of a verb; leave word of an error for rank 0."""
    global _group
    _group = _Group(*_connected())
    try:
        yield
    except (UserError, OSError) as error:
        if not is_main() and not isinstance(error, ProcessLost):
            with suppress(RuntimeError):
                _group.store.set(f"error/{os.environ['RANK']}", " ".join(str(error).split()))
        raise
    finally:
        _group = None


@cache
def _connected() -> tuple["PartialState", "ProcessGroup", "Store"]:
    """Connect once per process: tensors go over nccl between GPUs (one per process, by LOCAL_RANK) or over gloo, objects over gloo."""
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus < num_local_processes():
        raise UserError(
            f"launcher: expected at most {gpus} processes, one per GPU, got {num_local_processes()}; start fewer"
        )
    with _reachable():
        state = PartialState(cpu=not gpus, backend="nccl" if gpus else "gloo")
        messages = dist.new_group(backend="gloo", timeout=PATIENCE)
        store = dist.PrefixStore("headfold", dist.distributed_c10d._get_default_store())
    atexit.register(_leave, store)
    return state, messages, store


def _leave(store: "Store") -> None:
    """Let rank 0 print before any process exits, and keep its store alive until the workers have seen that it did."""
    import torch.distributed as dist

    number = int(os.environ["RANK"])
    others = [f"left/{at}" for at in range(1, num_processes())] if number == 0 else ["left/0"]
    until = time.monotonic() + (LAST_WORD if number else LAST_WORD / 4)
    with suppress(RuntimeError):
        store.set(f"left/{number}", "")
        while not _lost and not store.check(others) and time.monotonic() < until:
            time.sleep(0.05)
    with suppress(RuntimeError):
        dist.destroy_process_group()


@contextmanager
def _reachable() -> Iterator[None]:
    """Turn whatever a backend raises into `ProcessLost`: a process has died, or the network between them is broken."""
    try:
        yield
    except RuntimeError as error:
        if errors := _errors_of_workers():
            raise UserError(errors) from error
        said = re.sub(r"^\[.*?\] ", "", (str(error).strip() or type(error).__name__).splitlines()[0])
        reason = said.partition(". ")[0]  # without the place in the backend's sources and its advice
        global _lost
        _lost = True
        raise ProcessLost(
            f"another process of this run cannot be reached ({reason}); run the same command again to resume"
        ) from error


def _errors_of_workers() -> str:
    """Return the errors with which workers ended by themselves, as far as rank 0 can still read them."""
    found = []
    with suppress(RuntimeError):
        for at in range(1, num_processes()):
            if _group is not None and is_main() and _group.store.check([f"error/{at}"]):
                found.append(f"process {at}: {_group.store.get(f'error/{at}').decode()}")
    return "; ".join(found)


def _broadcast(message: Any) -> Any:
    """Return rank 0's message on every rank."""
    import torch.distributed as dist

    assert _group is not None
    box = [message]
    with _reachable():
        dist.broadcast_object_list(box, src=0, group=_group.messages)
    return box[0]
