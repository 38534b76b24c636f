"""Find out which transformations of K, of V and of the order of heads leave the logits of a model unchanged, by trying each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..core.heads import FreedomKind, KeyFreedom, QueryOrder
from .candidate import Candidate, keys, only_at, reversed_keys, shuffled, values
from .shrink import Config
from .toy import Unproven


@dataclass(frozen=True, slots=True)
class KeyPosition:
    """How position enters K: what is free in every layer that has position, and which layers have none."""

    freedom: KeyFreedom
    without: tuple[int, ...] = ()
    """Sites without position, where any matrix on K is free, if others have position."""


def check_values(candidate: Candidate, others: Sequence[str] = ()) -> None:
    """Check that V and O are what they were found to be, and that the logits depend on attention.

    Raises:
        Unproven: V is changed between its projection and O's, or the logits do not depend on attention.
    """
    for index, site in enumerate(candidate.sites):
        if candidate.is_invariant(only_at(index, reversed_keys)):
            raise Unproven(
                f"{site.name}: the logits do not depend on the K that was found, so that its freedom cannot be tested"
            )
        if not candidate.is_invariant(only_at(index, values)):
            beside = f"; beside its projections it has {', '.join(others)}" if others else ""
            raise Unproven(
                f"{site.name}: an invertible matrix on V, undone on O, changes the logits: "
                f"between the two is more than a mean over positions{beside}"
            )


def query_order(candidate: Candidate) -> QueryOrder:
    """Return "free" if heads (with their sinks, if any) may be shuffled, else "fixed"."""
    return "free" if candidate.is_invariant(shuffled) else "fixed"


def claims(head_dim: int, *, normed: bool) -> Iterator[KeyFreedom]:
    """Yield every freedom with position that a literal can claim.

    At most one with planes in halves holds. With planes of neighbouring dims, the freedom for more dims is part of that for
    fewer, so those for fewer come first.
    """
    dims = range(head_dim - head_dim % 2, 0, -2)
    yield from (KeyFreedom("signs" if normed else "rope-halves", dim) for dim in dims)
    pairs: FreedomKind = "signs" if normed else "rope-pairs"
    yield from (KeyFreedom(pairs, dim, True) for dim in reversed(dims) if dim > 2)


def position(candidate: Candidate, *, normed: bool) -> KeyPosition:
    """Return what is free on K at every site.

    Raises:
        Unproven: nothing that a literal can express.
    """
    every = range(len(candidate.sites))
    without = () if normed else tuple(i for i in every if holds(candidate, i, KeyFreedom("any")))
    placed = [i for i in every if i not in without]
    if not placed:
        return KeyPosition(KeyFreedom("any"))
    somewhere: dict[int, KeyFreedom] = {}
    for claim in claims(candidate.sites[0].head_dim, normed=normed):
        held = [i for i in placed if holds(candidate, i, claim)]
        if held == placed:
            return KeyPosition(claim, without)
        somewhere |= dict.fromkeys(held, claim)
    raise Unproven(_nothing_free(candidate, placed, somewhere, normed))


def holds(candidate: Candidate, index: int, claim: KeyFreedom) -> bool:
    """Return whether one site leaves K as free as claimed."""
    return candidate.is_invariant(only_at(index, keys(claim)))


def _nothing_free(candidate: Candidate, placed: list[int], somewhere: dict[int, KeyFreedom], normed: bool) -> str:
    """Return why no claim holds everywhere."""
    if somewhere.keys() == set(placed):
        each = "; ".join(
            f"{candidate.sites[i].name} {c.kind} on {c.rotary_dim} dims" for i, c in sorted(somewhere.items())
        )
        return f"position differs from layer to layer: {each}"
    first = candidate.sites[min(set(placed) - somewhere.keys())].name
    what = "a sign per frequency plane" if normed else "a matrix or a complex number per frequency plane"
    more = "a norm with a mean, a bias or gains per head?" if normed else "a norm without gains, or another position?"
    return f"{first}: {what} on K, undone on Q, changes the logits in every layout tried ({more})"


def layers_field(config: Config, without: tuple[int, ...], num_layers: int) -> str | None:
    """Return the config field that says which layers have no position: its entries are 0 or `full_attention` there and nowhere
    else."""
    for name, entries in config.items():
        if isinstance(entries, list) and len(entries) == num_layers:
            marked = tuple(
                i for i, entry in enumerate(entries) if entry in (0, "full_attention") and entry is not False
            )
            if marked == without:
                return name
    return None
