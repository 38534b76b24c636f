"""Steps of a descent are taken in coordinates in which the inputs are white."""

import pytest
import torch
from torch import Tensor

from headfold.descent.whitened import WhitenedAdam, whitening

SIZE, HEADS, DIM, MODEL = 12, 3, 4, 12


def inputs(seed: int = 0, rows: int = 400, size: int = SIZE) -> Tensor:
    """Correlated inputs, of which some directions have a ten-thousandth of the energy of others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return torch.randn(rows, size, dtype=torch.float64, generator=generator) * torch.logspace(0, -2, size) @ mixed


def test_whitened_inputs_have_second_moments_of_one() -> None:
    x = inputs()
    second = x.T @ x / len(x)
    into, root = whitening(second)
    torch.testing.assert_close(into.T @ root, torch.eye(SIZE, dtype=torch.float64))
    white = x @ into
    moments = white.T @ white / len(x)
    assert moments.diagonal().max() < 1.001 and moments.diagonal()[SIZE // 2 :].min() > 0.9  # the rest is damped
    torch.testing.assert_close(moments, torch.diag(moments.diagonal()), atol=1e-9, rtol=0)


@pytest.mark.parametrize("field", ["q", "k", "v", "o"])
def test_a_first_step_moves_every_white_coordinate_alike(field: str) -> None:
    """By the root mean square of the white weights, whatever the gradient."""
    x = inputs()
    second = x.T @ x / len(x)
    shape = (HEADS, DIM, MODEL) if field == "o" else (HEADS, DIM, SIZE)
    generator = torch.Generator().manual_seed(1)
    leaves = {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name in {field, "o"}}
    adam = WhitenedAdam([(leaves, {name: second for name in ("q", "v", "o")})])
    adam.see([torch.randn(shape, dtype=torch.float64, generator=generator) for _ in leaves])
    step = adam.directions()[[*leaves].index(field)]
    _, root = whitening(second)

    def white(weights: Tensor) -> Tensor:
        return root.mT @ weights.flatten(0, 1) if field == "o" else weights @ root

    expected = white(leaves[field]).square().mean().sqrt()
    assert float(white(step).square().mean().sqrt()) == pytest.approx(float(expected), rel=1e-6)


def test_steps_do_not_depend_on_the_basis_of_the_inputs() -> None:
    """A fit in rotated and scaled inputs, with weights to match, gives the same outputs; Adam alone does not."""
    x, generator = inputs(), torch.Generator().manual_seed(2)
    true, start = (torch.randn(HEADS, DIM, SIZE, dtype=torch.float64, generator=generator) for _ in range(2))
    turn = 3 * torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator))[0]

    def ending(x: Tensor, start: Tensor, *, is_white: bool) -> Tensor:
        leaf, second, target = start.clone().requires_grad_(), x.T @ x, torch.einsum("ts,hds->htd", inputs(), true)
        white = WhitenedAdam([({"q": leaf}, {"q": second})])
        plain = torch.optim.Adam([leaf], lr=0.1)
        for _ in range(6):
            error = (torch.einsum("ts,hds->htd", x, leaf) - target).square().mean()
            leaf.grad = torch.autograd.grad(error, leaf)[0]
            if is_white:
                white.see([leaf.grad])
                white.step(0.1)
            else:
                plain.step()
        return torch.einsum("ts,hds->htd", x, leaf.detach())

    for is_white in (True, False):
        one, other = ending(x, start, is_white=is_white), ending(x @ turn, start @ turn / 9, is_white=is_white)
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-6) == is_white


def test_an_eigenbasis_is_taken_anew_and_moments_go_along() -> None:
    """The mean of equal gradients stays their mean across a change of basis."""
    generator = torch.Generator().manual_seed(3)
    leaf, gradient = (torch.randn(HEADS, DIM, SIZE, dtype=torch.float64, generator=generator) for _ in range(2))
    adam = WhitenedAdam([({"v": leaf}, {"v": torch.eye(SIZE, dtype=torch.float64)})])
    steps = []
    for _ in range(9):
        adam.see([gradient])
        steps.append(adam.directions()[0])
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0])
