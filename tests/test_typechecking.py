"""The check of annotations sees types and shapes, of arguments and of results, in functions, methods and dataclasses."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor
from typechecking import check, jaxtyped

checked = jaxtyped(typechecker=check)


@checked
def product(x: Float[Tensor, "a b"], y: Float[Tensor, "b c"], *rest: int, turned: bool = False) -> Float[Tensor, "a c"]:
    return (x @ y).T if turned else x @ y


@checked
def named(names: "list[Unknown]", count: int) -> str:  # noqa: F821
    return names[count]


@checked
def counted(count: int) -> Iterator[int]:
    yield from range(count)


@checked
@dataclass(frozen=True, slots=True)
class Pair:
    left: Float[Tensor, "n"]
    right: Float[Tensor, "n"]

    @checked
    def longer(self, more: int) -> "Pair":
        return Pair(self.left.repeat(more), self.right.repeat(more))


ONES = torch.ones(2, 3)


def test_what_fits_passes() -> None:
    assert product(ONES, torch.ones(3, 4), 1, 2).shape == (2, 4)
    assert product(x=ONES, y=torch.ones(3, 2), turned=True).shape == (2, 2)
    assert named(["a"], 0) == "a" and list(counted(2)) == [0, 1]
    assert len(Pair(torch.ones(2), torch.ones(2)).longer(3).right) == 6
    assert (
        product(ONES, torch.ones(3, 4)).shape != product(torch.ones(5, 1), torch.ones(1, 1)).shape
    )  # axes anew at every call


@pytest.mark.parametrize(
    "call",
    [
        lambda: product(ONES, torch.ones(4, 4)),
        lambda: product(ONES, torch.ones(3, 4), turned=True),  # the result
        lambda: product(ONES, torch.ones(3, 4).long()),
        lambda: product(ONES, torch.ones(3, 4), "1"),
        lambda: named(["a"], "0"),
        lambda: named([1], 0),  # the result
        lambda: counted("2"),
        lambda: Pair(torch.ones(2), torch.ones(3)),
        lambda: Pair(torch.ones(2), torch.ones(2)).longer("3"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeCheckError):
        call()
