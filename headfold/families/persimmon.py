"""Persimmon: refused, because of the norm of its queries and keys."""

from .spec import Family

FAMILY = Family(
    model_types=("persimmon",),
    refuses={
        "*": "the norm of each K head subtracts the mean of its dims, which no transformation but a scale leaves as it is"
    },
)
