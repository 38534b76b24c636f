"""Run the command line on several ranks as torchrun does: each is told its number, and once one has failed, the others are ended.

The ranks are forked, as every command of a campaign is, because a start by torchrun itself takes longer than the command.
"""

import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from .running import LIMIT_SECONDS, Outcome, start

_NOTICED = 0.1
"""Seconds after which torchrun sees that a process has ended."""


def run_on(
    count: int,
    words: Sequence[object],
    folder: Path,
    *,
    victim: int = 0,
    before: Callable[[], None] | None = None,
    limit: float = LIMIT_SECONDS,
    kill_after: float | None = None,
) -> Outcome:
    """Run `headfold WORDS` on `count` ranks; return what rank 0 printed, the errors of all, and the exit code of the first that failed.

    `before` sets traps in the `victim` alone, and SIGKILL, after `kill_after` seconds, arrives there.
    """
    port = _free_port()
    running = [
        start(
            words, folder, before=_as_rank(rank, count, port, before if rank == victim else None), name=f"rank-{rank}"
        )
        for rank in range(count)
    ]
    left = {os.pidfd_open(one.pid): rank for rank, one in enumerate(running)}
    ended: dict[int, Outcome] = {}
    started, codes = time.monotonic(), []
    while left:
        killing = kill_after is not None and victim in left.values()
        patience = started + (min(limit, kill_after or limit) if killing else limit) - time.monotonic()
        ready, _, _ = select.select(list(left), [], [], max(0.0, patience))
        if not ready and killing:
            os.kill(running[victim].pid, signal.SIGKILL)
            kill_after = None
            continue
        for descriptor in ready or list(left):  # none is ready where they hang: `wait` says so
            rank = left.pop(descriptor)
            os.close(descriptor)
            ended[rank] = running[rank].wait(limit)
            codes += [ended[rank].code] if ended[rank].code else []
        if codes and left:
            time.sleep(_NOTICED)
            for rank in left.values():
                with suppress(ProcessLookupError):
                    os.kill(running[rank].pid, signal.SIGTERM)
    err = "".join(ended[rank].err for rank in range(count))
    code = min(codes, key=lambda code: code != -signal.SIGKILL) if codes else 0
    hung = any(one.hung for one in ended.values())
    return Outcome(code, ended[0].out, err, time.monotonic() - started, hung)


def _as_rank(rank: int, count: int, port: int, then: Callable[[], None] | None) -> Callable[[], None]:
    """Return what tells a process its number, as torchrun does by its environment, and sets a trap."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}

    def set_rank() -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}
        if then is not None:
            then()

    return set_rank


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
