"""Which transformations of K, of V and of the order of heads a model cannot see: each one is tried on it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..core.heads import KeyFreedom, QueryOrder
from .candidate import Trial, keys, only_at, ruined, shuffled, values
from .shrink import Config
from .toy import Unproven


@dataclass(frozen=True, slots=True)
class Position:
    """How position enters K: what every layer that has it leaves free, and which layers have none."""

    freedom: KeyFreedom
    without: tuple[int, ...] = ()
    """Sites whose K is free to take any matrix, where others' is not."""


def check_values(trial: Trial, others: Sequence[str] = ()) -> None:
    """V and O are what they seem, and the logits depend on attention.

    Raises:
        Unproven: V is changed between its projection and O's, or attention is not seen at all.
    """
    for index, site in enumerate(trial.sites):
        if trial.hides(only_at(index, ruined)):
            raise Unproven(
                f"{site.name}: the logits do not depend on K as it was found, so nothing can be told about it"
            )
        if not trial.hides(only_at(index, values)):
            beside = f"; beside its projections it has {', '.join(others)}" if others else ""
            raise Unproven(
                f"{site.name}: an invertible matrix on V, undone on O, changes the logits: "
                f"more than a mean over positions lies between the two{beside}"
            )


def query_order(trial: Trial) -> QueryOrder:
    """Free where heads may be shuffled, with their sinks if there are such; else fixed."""
    return "free" if trial.hides(shuffled) else "fixed"


def claims(head_dim: int, *, normed: bool) -> Iterator[KeyFreedom]:
    """Every freedom under a position that a literal can claim.

    At most one in halves holds. Of neighbouring dims those on more dims are part of those on fewer, so they come last.
    """
    dims = range(head_dim - head_dim % 2, 0, -2)
    yield from (KeyFreedom("signs" if normed else "rope-halves", dim) for dim in dims)
    pairs = "signs" if normed else "rope-pairs"
    yield from (KeyFreedom(pairs, dim, True) for dim in reversed(dims) if dim > 2)


def position(trial: Trial, *, normed: bool) -> Position:
    """What is free on K at every site.

    Raises:
        Unproven: nothing that a literal can say.
    """
    every = range(len(trial.sites))
    without = () if normed else tuple(i for i in every if holds(trial, i, KeyFreedom("any")))
    placed = [i for i in every if i not in without]
    if not placed:
        return Position(KeyFreedom("any"))
    somewhere: dict[int, KeyFreedom] = {}
    for claim in claims(trial.sites[0].head_dim, normed=normed):
        held = [i for i in placed if holds(trial, i, claim)]
        if held == placed:
            return Position(claim, without)
        somewhere |= dict.fromkeys(held, claim)
    raise Unproven(_nothing_free(trial, placed, somewhere, normed))


def holds(trial: Trial, index: int, claim: KeyFreedom) -> bool:
    """Whether one site leaves its K as free as claimed."""
    return trial.hides(only_at(index, keys(claim)))


def _nothing_free(trial: Trial, placed: list[int], somewhere: dict[int, KeyFreedom], normed: bool) -> str:
    """Why no claim holds everywhere."""
    if somewhere.keys() == set(placed):
        each = "; ".join(f"{trial.sites[i].name} {c.kind} on {c.rotary_dim} dims" for i, c in sorted(somewhere.items()))
        return f"position differs from layer to layer: {each}"
    first = trial.sites[min(set(placed) - somewhere.keys())].name
    what = "a sign per frequency plane" if normed else "a matrix or a complex number per frequency plane"
    more = "a norm with a mean, a bias or gains per head?" if normed else "a norm without gains, or another position?"
    return f"{first}: {what} on K, undone on Q, changes the logits in every layout tried ({more})"


def layers_field(config: Config, without: tuple[int, ...], num_layers: int) -> str | None:
    """The config field that says which layers have no position: 0 or `full_attention` there and nowhere else."""
    for name, entries in config.items():
        if isinstance(entries, list) and len(entries) == num_layers:
            marked = tuple(
                i for i, entry in enumerate(entries) if entry in (0, "full_attention") and entry is not False
            )
            if marked == without:
                return name
    return None
