"""A job that several processes do together: one leads it through its recipe, the others run their shares of the passes over data."""

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .. import calibration, parallel
from ..checkpoint.hub import resolve
from ..checkpoint.reader import Checkpoint
from ..core.errors import UserError
from ..core.plan import Plan
from ..families.spec import Site
from ..surgery import query_order
from .measuring import running

P, T = ParamSpec("P"), TypeVar("T")


def led(job: Callable[P, T]) -> Callable[P, T]:
    """`job` for all the processes that a launcher started: each calls it, the first alone runs it, each is given what it gave.

    Without a launcher it is the job itself. Only the first reads and writes what the job names, except for the model.

    Raises:
        UserError: of the job, in all; `parallel.Told` where the first says it.
    """

    @wraps(job)
    def run(*arguments: P.args, **options: P.kwargs) -> T:
        if not parallel.launched():
            return job(*arguments, **options)
        with parallel.joined():
            if parallel.leads():
                return parallel.lead(partial(job, *arguments, **options))
            return parallel.follow(Follower().obey)

    return run


class Follower:
    """What a process does that does not lead: an original of its own, and its share of every pass over data."""

    def __init__(self) -> None:
        self._sites: dict[str, Site] = {}
        self._model: Any = None

    def obey(self, order: str, *arguments: Any) -> None:
        """Carry out what the leader does within `parallel.together(order, *arguments)`."""
        orders = {"open": self._open, "collect": self._collect, "fit": self._fit, "close": self._close}
        orders[order](*arguments)

    def _open(self, name: str, sites: list[Site], fingerprint: str, dtype: torch.dtype, device: str) -> None:
        def opened() -> Any:
            checkpoint = Checkpoint.open(resolve(name))
            if checkpoint.fingerprint() != fingerprint:
                raise UserError(
                    f"{name}: expected the checkpoint of the first process, got another; copy that one here"
                )
            return running(name, checkpoint, dtype, device)

        self._model, self._sites = parallel.everyone(opened), {site.name: site for site in sites}

    def _collect(self, sample: Mapping[str, Tensor]) -> None:
        calibration.collect(self._model, [*self._sites.values()], sample)

    def _fit(
        self,
        fit: Callable[..., Any],
        sites: list[str],
        sample: Mapping[str, Tensor],
        plan: Plan,
        done: frozenset[str],
    ) -> None:
        """Merged heads come from the leader, and what is fitted is kept there."""
        given = {"order": partial(query_order, plan=plan), "skip": done, "keep": lambda site, fields: None}
        fit(self._model, [self._sites[name] for name in sites], lambda site: parallel.agreed(), sample, **given)

    def _close(self) -> None:
        self._model = None
