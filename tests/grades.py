"""The named grades of equality: every comparison of tensors in these tests is one of them, every bound has a reason."""

import torch
from torch import Tensor

LONGEST_SUM = 2**10
"""No dot product of the tiny models is longer."""
CONDITION = 2**8
"""How much a tiny model amplifies one rounding: two layers, and changes of heads with condition numbers up to 4."""


def _distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    return (a.double() - b.double()).abs().max().item()


def _scale(b: Tensor) -> float:
    return b.double().abs().max().item()


def assert_bitwise(a: Tensor, b: Tensor) -> None:
    """The same dtype, shape and bits; for copies, permutations and folds that change nothing."""
    assert a.dtype == b.dtype and a.shape == b.shape, (a.dtype, b.dtype, a.shape, b.shape)
    assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), _distance(a, b)


def assert_tight(a: Tensor, b: Tensor) -> None:
    """The same real numbers computed in float64 in another order, relative to the largest: 5.8e-11."""
    bound = torch.finfo(torch.float64).eps * LONGEST_SUM * CONDITION
    assert _distance(a, b) <= bound * _scale(b), (_distance(a, b) / _scale(b), bound)


def assert_tight_through_float32_norms(a: Tensor, b: Tensor) -> None:
    """As tight, but stock modules round elements (not sums) to float32 on the way: norms, Cohere's RoPE. 3.1e-5."""
    bound = torch.finfo(torch.float32).eps * CONDITION
    assert _distance(a, b) <= bound * _scale(b), (_distance(a, b) / _scale(b), bound)


def assert_twice_plain(ours: Tensor, plain: Tensor, reference: Tensor) -> None:
    """In low precision: our error against a float64 reference is at most twice that of plain PyTorch in our dtype."""
    assert ours.dtype == plain.dtype
    assert _distance(ours, reference) <= 2 * _distance(plain, reference), (
        _distance(ours, reference),
        _distance(plain, reference),
    )


def assert_differs(a: Tensor, b: Tensor) -> None:
    """Not equal by any grade: the guard that a law could have failed. Ten times the loosest bound."""
    bound = 10 * torch.finfo(torch.float32).eps * CONDITION
    assert _distance(a, b) > bound * _scale(b), (_distance(a, b) / _scale(b), bound)
