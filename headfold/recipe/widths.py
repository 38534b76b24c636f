"""How wide K/V heads may become: what `--head-dim-multiple` asks for, and what the model and the engines take."""

from collections.abc import Sequence

from .. import planning
from ..core.errors import UserError
from .source import Source

LARGEST = 256
"""Dims of a head that attention kernels take, and `auto` therefore goes to (flash attention, TRT-LLM, FlashInfer)."""


def possible(source: Source, asked: str | int, group: str, merge: str) -> list[int]:
    """The widths that are asked for, in heads of the source, ascending: one, or for `auto` all that can be had.

    Raises:
        UserError: not a width, or one that a site or a method cannot have.
    """
    grouping = planning.parse_group(group)
    if str(asked) != "auto":
        if not str(asked).isdecimal() or int(asked) < 1:
            raise UserError(f"--head-dim-multiple {asked}: expected a number such as 2, or auto")
        if int(asked) > 1:
            planning.check_head_dim_multiple(int(asked), source.sites, merge, grouping)
        return [int(asked)]
    found = [1]
    for width in range(2, LARGEST // max(site.head_dim for site in source.sites) + 1):
        try:
            planning.check_head_dim_multiple(width, source.sites, merge, grouping)
        except UserError as error:
            if width == 2:  # whatever refuses the narrowest refuses all
                raise UserError(str(error).replace("--head-dim-multiple 2", "--head-dim-multiple auto")) from error
            continue
        found.append(width)
    return found


def widest(source: Source, widths: Sequence[int], kv_heads: str | int, group: str) -> int:
    """The widest of `widths` for a cache of `kv_heads`: never worse than any narrower (Eckart and Young).

    Raises:
        UserError: none divides the count.
    """
    counts = set(planning.counts_of(source.sites, kv_heads, planning.parse_group(group)))
    found = [width for width in widths if all(count % width == 0 for count in counts)]
    if not found:
        said = ", ".join(map(str, sorted(counts)))
        raise UserError(
            f"--head-dim-multiple {widths[0]}: does not divide the {said} K/V heads that are asked for; choose another"
        )
    return found[-1]
