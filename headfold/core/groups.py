"""Which heads share one K/V head: a partition with canonical labels."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import UserError


@dataclass(frozen=True, slots=True)
class Groups:
    """A map from heads to groups. Labels are dense (every group has a head) and kept as given; `of` makes them canonical."""

    group_of_head: tuple[int, ...]

    def __post_init__(self) -> None:
        # Of as many labels as there are: the range up to a corrupt one could take all memory.
        labels = set(self.group_of_head)
        assert labels and labels == set(range(len(labels))), self.group_of_head

    @classmethod
    def of(cls, labels: Sequence[int]) -> "Groups":
        """Return the groups with canonical labels: numbered in order of their first head. Any hashable labels are accepted."""
        numbers: dict[int, int] = {}
        return cls(tuple(numbers.setdefault(label, len(numbers)) for label in labels))

    @classmethod
    def from_members(cls, members: Iterable[Sequence[int]]) -> "Groups":
        """Return the canonical groups with these members."""
        label_of = {head: label for label, heads in enumerate(members) for head in heads}
        return cls.of([label_of[head] for head in range(len(label_of))])

    @classmethod
    def contiguous(cls, num_heads: int, num_kv_heads: int) -> "Groups":
        """Return equal runs of neighbouring heads, the map that every GQA runtime assumes."""
        size = num_heads // num_kv_heads
        assert size * num_kv_heads == num_heads, (num_heads, num_kv_heads)
        return cls(tuple(head // size for head in range(num_heads)))

    @property
    def num_heads(self) -> int:
        return len(self.group_of_head)

    @property
    def num_kv_heads(self) -> int:
        return max(self.group_of_head) + 1

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """The heads of each group, ascending."""
        return tuple(
            tuple(head for head, label in enumerate(self.group_of_head) if label == group)
            for group in range(self.num_kv_heads)
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(heads) for heads in self.members)

    @property
    def is_even(self) -> bool:
        return len(set(self.sizes)) == 1

    @property
    def is_contiguous(self) -> bool:
        """Whether head h reads group h // (heads / groups), as in a stock GQA checkpoint."""
        return self.is_even and self.is_ordered

    @property
    def is_ordered(self) -> bool:
        """Whether each group's heads are neighbours and the groups in order, equal or not."""
        return list(self.group_of_head) == sorted(self.group_of_head)

    def standard_order(self) -> tuple[int, ...]:
        """Return the permutation of heads (new position → old head) that makes the groups contiguous, stable inside a group."""
        return tuple(sorted(range(self.num_heads), key=lambda head: self.group_of_head[head]))

    def compose(self, outer: "Groups") -> "Groups":
        """Return the map head → group of groups, for sources that are grouped already."""
        return Groups(tuple(outer.group_of_head[group] for group in self.group_of_head))


MOST_HEADS = 2**16
"""More than any model has: a larger number is an error, and would take the time and the memory of as many."""


def check_group_count(where: str, num_heads: int, num_kv_heads: int, hint: str = "") -> None:
    """Refuse a count of K/V heads that does not split `num_heads` equally, naming those that do; `hint` says how else it could be had.

    Raises:
        UserError: one line: where, expected, got, what to do.
    """
    if num_heads > MOST_HEADS:
        raise UserError(f"{where}: expected at most {MOST_HEADS} heads, got {num_heads}; correct the config")
    choices = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    if num_kv_heads in choices:
        return
    if num_kv_heads > num_heads:
        hint = ""
        what = f"the source has {num_heads} K/V heads and folding cannot grow them to {num_kv_heads}"
    else:
        what = f"cannot split {num_heads} K/V heads into {num_kv_heads} equal groups"
    listed = ", ".join(map(str, choices[:-1])) + f" or {choices[-1]}" if len(choices) > 1 else str(choices[0])
    raise UserError(f"{where}: {what}; choose {listed}{hint}")
