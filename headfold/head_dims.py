"""Choose head_dim multiples: those that the model, the method and attention kernels take."""

from collections.abc import Sequence

from . import planning
from .core.errors import UserError
from .families.spec import Site

LARGEST_HEAD_DIM = 256
"""Largest head_dim of common attention kernels (flash attention, TRT-LLM, FlashInfer), up to which `auto` goes."""


def possible_multiples(sites: Sequence[Site], requested: str | int, group: str, merge: str) -> list[int]:
    """Return the requested head_dim multiples, ascending: a single one, or for `auto` all that are possible.

    Raises:
        UserError: not a number, or a multiple that a site or a method does not support.
    """
    grouping = planning.parse_group(group)
    if str(requested) != "auto":
        if not str(requested).isdecimal() or int(requested) < 1:
            raise UserError(f"--head-dim-multiple {requested}: expected a number such as 2, or auto")
        if int(requested) > 1:
            planning.check_head_dim_multiple(int(requested), sites, merge, grouping)
        return [int(requested)]
    found = [1]
    for multiple in range(2, LARGEST_HEAD_DIM // max(site.head_dim for site in sites) + 1):
        try:
            planning.check_head_dim_multiple(multiple, sites, merge, grouping)
        except UserError as error:
            if multiple == 2:  # whatever refuses the smallest multiple refuses all
                message = str(error).replace("--head-dim-multiple 2", "--head-dim-multiple auto")
                raise UserError(message) from error
            continue
        found.append(multiple)
    return found


def largest_multiple(sites: Sequence[Site], multiples: Sequence[int], kv_heads: str | int, group: str) -> int:
    """Return the largest of `multiples` that divides the counts `kv_heads`: it is never worse than a smaller one (Eckart and Young).

    Raises:
        UserError: none divides the counts.
    """
    counts = set(planning.counts_of(sites, kv_heads, planning.parse_group(group)))
    found = [multiple for multiple in multiples if all(count % multiple == 0 for count in counts)]
    if not found:
        listed = ", ".join(map(str, sorted(counts)))
        raise UserError(
            f"--head-dim-multiple {multiples[0]}: expected a divisor of the requested {listed} K/V heads; choose another"
        )
    return found[-1]
