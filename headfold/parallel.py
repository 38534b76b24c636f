"""Processes that a launcher (torchrun, accelerate launch) started for one job: the first leads it, the others follow.

The leader runs the whole job and decides everything. The followers wait for its orders: passes over data that all make `together`, each
over its share, with sums over all. Outside of these every process is alone, so code that is never led runs as without a launcher. What
the leader refuses, and what it ends with, the followers hear as their next message, whatever they wait for.
"""

import atexit
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from .core.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import Tensor
    from torch.distributed import ProcessGroup

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""That followers wait for a message: planning and sampling, which the leader does alone, take hours. Deaths are noticed at once."""


class Told(UserError):
    """A refusal that the leader has said, or that the launcher will: nothing is left to print."""


class Gone(UserError):
    """Another process has died, or cannot be reached any more."""


@dataclass(slots=True)
class _Team:
    state: "PartialState"
    messages: "ProcessGroup"
    """Objects travel here, whatever tensors travel by; with patience."""
    together: bool = False
    led: bool = True
    """Whether followers wait for the leader's orders, or all do the same by themselves."""


@dataclass(frozen=True, slots=True)
class _Order:
    name: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Answer:
    value: Any


@dataclass(frozen=True, slots=True)
class _End:
    value: Any


@dataclass(frozen=True, slots=True)
class _Refusal:
    reason: str


_team: _Team | None = None


def launched() -> bool:
    """Whether a launcher started this process beside others."""
    return {"RANK", "LOCAL_RANK"} <= os.environ.keys() and int(os.environ.get("WORLD_SIZE", 1)) > 1


def processes() -> int:
    """Those launched."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def leads() -> bool:
    """Whether this process speaks and writes: the first of those launched, or the only one."""
    return not launched() or os.environ["RANK"] == "0"


def processes_here() -> int:
    """Those that share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() else 1


@contextmanager
def joined() -> Iterator[None]:
    """Within, this process is one of those launched, and leads or follows.

    Raises:
        UserError: they cannot reach each other, or are more than the GPUs of their machine.
    """
    global _team
    _team = _Team(*_connected())
    try:
        yield
    finally:
        _team = None


@cache
def _connected() -> tuple["PartialState", "ProcessGroup"]:
    """Once in a process, for good: tensors go over nccl between GPUs (one per process, by LOCAL_RANK) or over gloo, messages over gloo."""
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus < processes_here():
        raise UserError(
            f"launcher: expected at most {gpus} processes, one per GPU, got {processes_here()}; start fewer"
        )
    with _reaching():
        state = PartialState(cpu=not gpus, backend="nccl" if gpus else "gloo")
        return state, dist.new_group(backend="gloo", timeout=PATIENCE)


@contextmanager
def _reaching() -> Iterator[None]:
    """Whatever a backend raises means that others cannot be reached: died, or on the other side of a broken network."""
    try:
        yield
    except RuntimeError as error:
        said = re.sub(r"^\[.*?\] ", "", (str(error).strip() or type(error).__name__).splitlines()[0])
        reason = said.partition(". ")[0]  # without where in the backend's sources, and its advice
        raise Gone(
            f"another process of this run cannot be reached ({reason}); run the same command again, it goes on from what is done"
        ) from error


def world_size() -> int:
    """Processes that share the pass over data which is made now."""
    return _team.state.num_processes if _team is not None and _team.together else 1


def rank() -> int:
    """Which of them this is."""
    return _team.state.process_index if _team is not None and _team.together else 0


def share(count: int) -> range:
    """Of so many things, numbered, those that fall to this process; none where there are fewer things than processes."""
    return range(rank(), count, world_size())


def falls_here(number: int) -> bool:
    """Whether a thing of that number is in the share of this process."""
    return number % world_size() == rank()


def summed(tensor: "Tensor") -> "Tensor":
    """The sum over processes, bitwise the same in all of them; every one gives a tensor of the same shape and dtype, and gives it away."""
    if world_size() == 1:
        return tensor
    import torch.distributed as dist

    assert _team is not None
    total = tensor.contiguous().to(_team.state.device)
    with _reaching():
        dist.all_reduce(total)
    return total.to(tensor.device)


def gathered(value: T) -> list[T]:
    """What every process has, by rank."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    assert _team is not None
    values: list[Any] = [None] * world_size()
    with _reaching():
        dist.all_gather_object(values, value, _team.messages)
    return values


def agreed(make: Callable[[], T] | None = None) -> T:
    """What `make` gives in the leader, in all; a follower need not know how to make it."""
    if rank():
        return _heard(_Answer).value
    assert make is not None
    value = make()
    if world_size() == 1:
        return value
    _say(_Answer(value))
    return value


def everyone(make: Callable[[], T]) -> T:
    """What `make` gives here; what one process refuses, all refuse, and the first says it."""
    if world_size() == 1:
        return make()
    assert _team is not None
    value, refusal = None, None
    try:
        value = make()
    except (UserError, OSError) as error:
        refusal = error
    refusals = {at: text for at, text in enumerate(gathered(refusal and str(refusal))) if text is not None}
    if not refusals:
        return value  # type: ignore[return-value]
    said = "; ".join(f"process {at}: {text}" for at, text in refusals.items())
    if rank() and _team.led:
        _heard(_Answer)  # the leader's refusal
    if not _team.led:
        _parts()
    if rank():
        raise Told(said)
    raise refusal or UserError(said)


@contextmanager
def alike() -> Iterator[None]:
    """Within, all processes that were launched do the same by themselves, each its share, and none leads; without a launcher nothing is
    there. What may be refused belongs into `everyone`: a process that fails elsewhere ends alone, and its launcher ends the others."""
    if not launched():
        yield
        return
    with joined():
        assert _team is not None
        _team.led = False
        with _sharing():
            yield
        _parts()


@contextmanager
def reaching_others() -> Iterator[None]:
    """For passes that something else divides among the processes: its errors of sending are those of `summed`."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not re.search(r"gloo|nccl|connection|peer", str(error), re.IGNORECASE):
            raise
        with _reaching():
            raise


@contextmanager
def together(order: str, *arguments: Any) -> Iterator[None]:
    """What the leader does within, its followers do as well: they get the order, and `follow` carries it out."""
    if _team is None:
        yield
        return
    _say(_Order(order, arguments))
    with _sharing():
        yield


@contextmanager
def _sharing() -> Iterator[None]:
    assert _team is not None and not _team.together
    _team.together = True
    try:
        yield
    finally:
        if _team is not None:
            _team.together = False


def lead(job: Callable[[], T]) -> T:
    """The leader's part: the job, and word to all of how it ended."""
    try:
        value = job()
    except Gone:
        raise
    except (UserError, OSError) as error:
        with suppress(Gone):  # the error itself says more
            _say(_Refusal(str(error)))
            _parts()
        raise
    _say(_End(value))
    _parts()
    return value


def follow(obey: Callable[..., None]) -> Any:
    """A follower's part: `obey(order, *arguments)` for every order; gives what the leader's job gave.

    Raises:
        Told: the job was refused.
    """
    while not isinstance(message := _heard(_Order, _End), _End):
        with _sharing():
            obey(message.name, *message.arguments)
    _parts()
    return message.value


def _say(message: Any) -> None:
    import torch.distributed as dist

    assert _team is not None
    with _reaching():
        dist.broadcast_object_list([message], src=0, group=_team.messages)


def _heard(*kinds: type) -> Any:
    """The leader's next message; of one of these kinds, unless it refuses."""
    import torch.distributed as dist

    assert _team is not None
    heard: list[Any] = [None]
    try:
        with _reaching():
            dist.broadcast_object_list(heard, src=0, group=_team.messages)
    except Gone as error:
        raise Told(str(error)) from error
    if isinstance(heard[0], _Refusal):
        _parts()
        raise Told(heard[0].reason)
    assert isinstance(heard[0], kinds), heard[0]
    return heard[0]


@cache
def _parts() -> None:
    """Once, when all have heard how a job ended: none exits before all do. Launchers end the rest as soon as one has failed, and the leader
    has yet to speak."""
    import torch.distributed as dist

    def part(messages: "ProcessGroup") -> None:
        with suppress(Gone), _reaching():
            dist.barrier(messages)
        dist.destroy_process_group()

    assert _team is not None
    atexit.register(part, _team.messages)


# The names of torch.distributed for the same functions.
all_reduce = summed
all_gather = gathered
on_main = agreed
on_all = everyone
