"""A helper that compares must be able to fail."""

import pytest
import torch
from grades import assert_bitwise, assert_differs, assert_tight, assert_tight_through_float32_norms, assert_twice_plain
from torch import Tensor

RANDOM = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("grade", "inside", "outside"),
    [(assert_bitwise, 0.0, 1e-15), (assert_tight, 1e-12, 1e-9), (assert_tight_through_float32_norms, 1e-6, 1e-3)],
)
def test_a_grade_passes_inside_its_bound_and_fails_outside(grade, inside: float, outside: float) -> None:
    grade(RANDOM + inside * NOISE, RANDOM)
    for other in (RANDOM + outside * NOISE, RANDOM.T, RANDOM[:3], RANDOM * torch.nan):
        with pytest.raises(AssertionError):
            grade(other, RANDOM)


def test_bitwise_sees_dtype_and_the_sign_of_zero() -> None:
    for a, b in ((torch.zeros(2), -torch.zeros(2)), (torch.zeros(2), torch.zeros(2, dtype=torch.int32))):
        assert_bitwise(a, a)
        with pytest.raises(AssertionError):
            assert_bitwise(a, b)


def test_twice_plain_compares_errors() -> None:
    def off(size: float) -> Tensor:
        return RANDOM + size * NOISE

    assert_twice_plain(off(1.9e-3), off(1e-3), RANDOM)
    with pytest.raises(AssertionError):
        assert_twice_plain(off(2.1e-3), off(1e-3), RANDOM)


def test_differs_is_not_met_by_what_a_grade_would_accept() -> None:
    assert_differs(RANDOM + 1e-2 * NOISE, RANDOM)
    with pytest.raises(AssertionError):
        assert_differs(RANDOM + 1e-5 * NOISE, RANDOM)
