"""The request of a budget: a limit on bytes or loss, and the counts of K/V heads that may be used."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .. import planning
from ..conversion.source import Source
from ..core.errors import UserError
from ..core.heads import kv_bytes
from ..core.sizes import parse_size
from ..families.spec import Site
from .allocation import check_bytes, require_qcqa

ALLOCATIONS = ("exact", "qcqa")


@dataclass(frozen=True, slots=True)
class BudgetRequest:
    """At most one limit, and the counts of K/V heads that may be used."""

    kv_budget: str | None = None
    """Share of the source's K/V bytes, such as `25%` or `1/4`."""
    kv_bytes: str | None = None
    """Bytes of K and V per token, such as `40KiB`."""
    max_loss_increase: float | None = None
    """Predicted loss increase, in nats per token."""
    allowed: Sequence[int] = ()
    """Counts of K/V heads; empty for all that split the heads equally."""
    tp: int = 1
    """Devices of tensor parallelism: counts must be multiples of it."""
    allocation: str = "exact"
    head_dim_multiple: int = 1
    """head_dim of the new K/V heads over the source's; counts are of the source's heads, so they must be multiples of it."""
    unequal: bool = False
    """Whether groups may differ in size (`planning.Grouping`): then every count may be used, not divisors alone."""

    @property
    def has_limit(self) -> bool:
        return (self.kv_budget, self.kv_bytes, self.max_loss_increase) != (None, None, None)

    def check(self) -> None:
        """Refuse contradictions before anything is opened.

        Raises:
            UserError: several limits, an unknown allocation, or one that needs a budget in bytes.
        """
        given = {
            "--kv-budget": self.kv_budget,
            "--kv-bytes": self.kv_bytes,
            "--max-loss-increase": self.max_loss_increase,
        }
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise UserError(f"plan: {' and '.join(named)} exclude each other; give one")
        if self.allocation not in ALLOCATIONS:
            raise UserError(f"--allocation {self.allocation}: expected one of {', '.join(ALLOCATIONS)}")
        if self.allocation == "qcqa":
            if self.max_loss_increase is not None:
                raise UserError("--allocation qcqa needs a budget in bytes; give --kv-budget or --kv-bytes")
            require_qcqa()
        if self.max_loss_increase is not None and not 0 < self.max_loss_increase < math.inf:
            raise UserError(
                f"--max-loss-increase {self.max_loss_increase:g}: expected a number above 0, in nats per token"
            )

    def counts(self, site: Site) -> list[int]:
        """Return the counts below a site's own that may be used, ascending. Groups are equal where the order of heads is fixed (ALiBi).

        Raises:
            UserError: none is left.
        """
        num_kv_heads = site.num_kv_heads
        if num_kv_heads % self.tp:
            raise UserError(f"--tp {self.tp}: expected a divisor of the {num_kv_heads} K/V heads that a layer may keep")
        free = planning.may_differ(site, unequal=self.unequal)
        possible = list(range(1, num_kv_heads)) if free else planning.divisors(num_kv_heads)[:-1]
        found = [
            n
            for n in possible
            if (not self.allowed or n in self.allowed) and n % (self.tp * self.head_dim_multiple) == 0
        ]
        if not found:
            limits = [f"--allowed {','.join(map(str, self.allowed))}"] if self.allowed else []
            limits += [f"--tp {self.tp}"] if self.tp > 1 else []
            limits += [f"--head-dim-multiple {self.head_dim_multiple}"] if self.head_dim_multiple > 1 else []
            raise UserError(
                f"{' and '.join(limits) or 'plan'}: expected a count less than the {num_kv_heads} K/V heads"
                f"{'' if free else ' that splits them equally'}, of {', '.join(map(str, possible)) or 'none'}, "
                "and fits all of these; none does, allow more"
            )
        return found

    def limit(self, source: Source) -> float | None:
        """Return the bytes per token that may be used; None where the loss is limited instead.

        Raises:
            UserError: not a share of 0 to 100 %, or not a size.
        """
        if self.kv_budget is not None:
            return _share(self.kv_budget) * source.kv_bytes_per_token()
        if self.kv_bytes is None:
            return None
        return parse_size("--kv-bytes", self.kv_bytes, "bytes per token such as 40KiB or 65536")

    def check_reachable(self, source: Source) -> None:
        """Refuse, before anything is measured, what the fewest K/V heads at every site cannot reach.

        Raises:
            UserError: no count is left, the fewest heads take more bytes than the limit, or the encoder of an encoder-decoder is to be
                folded, which caches nothing.
        """
        cached = source.cached_sites
        if any(site not in cached for site in source.sites):
            raise UserError(
                f"{source.name}: expected layers that cache K and V, got an encoder, whose cache no budget makes smaller; use --kv-heads, "
                "or leave --encoder out"
            )
        itemsize = source.dtype.itemsize
        least = sum(kv_bytes(min(self.counts(site)), site.head_dim, itemsize) for site in source.sites)
        check_bytes(least, self.limit(source))

    def is_reachable(self, source: Source) -> bool:
        """Return whether `check_reachable` refuses nothing."""
        try:
            self.check_reachable(source)
        except UserError:
            return False
        return True


def _share(text: str) -> float:
    value = float(planning.number_or_share("--kv-budget", text, "a share such as 25% or 1/4"))
    if not 0 < value <= 1:
        raise UserError(f"--kv-budget {text}: expected more than 0 and at most 100 %")
    return value
