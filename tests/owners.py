"""An output place that another run owns, and the refusal that this must cause."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from headfold.checkpoint.ownership import claim
from headfold.core.errors import UserError


def refused_while_owned(attempt: Callable[[], object], out: Path, lock: Path) -> None:
    """The attempt is refused in one line that says who owns `out`, since when and what to do; nothing is written or left there."""
    owner = claim(out, lock)
    before = {path: path.is_file() and path.read_bytes() for path in out.parent.rglob("*")}
    try:
        with pytest.raises(UserError) as refusal:
            attempt()
        after = {path: path.is_file() and path.read_bytes() for path in out.parent.rglob("*")}
        assert after == before
    finally:
        owner.release()
    words = (str(out), f"process {os.getpid()} on {socket.gethostname()}", "since 2", "wait until it ends")
    assert all(word in str(refusal.value) for word in words) and "\n" not in str(refusal.value), str(refusal.value)
    assert not lock.exists()
