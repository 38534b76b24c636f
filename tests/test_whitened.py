"""Steps of a descent are taken in coordinates in which the inputs are white."""

import pytest
import torch
from torch import Tensor

from headfold.refine.whitened import WhitenedAdam, whitening

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


def test_a_badly_conditioned_fit_takes_few_steps() -> None:
    """Linear regression, on which Adam itself, with the best of many rates, is far from the end."""
    x = inputs()
    true = torch.randn(HEADS, DIM, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    second = x.T @ x / len(x)

    def error(weights: Tensor) -> Tensor:
        return (torch.einsum("ts,hds->htd", x, weights - true).square().mean()) / torch.einsum(
            "ts,hds->htd", x, true
        ).square().mean()

    def ending(step: str, rate: float) -> float:
        leaf = torch.zeros_like(true) + 0.01
        leaf.requires_grad_()
        white = WhitenedAdam([({"q": leaf}, {"q": second})])
        plain = torch.optim.Adam([leaf], lr=rate, betas=(0.9, 0.95))
        scale = 100.0  # of weights that begin near zero
        for number in range(60):
            leaf.grad = torch.autograd.grad(error(leaf), leaf)[0]
            for group in plain.param_groups:
                group["lr"] = rate * (1 - number / 60)
            if step == "white":
                white.see([leaf.grad])
                white.step(scale * rate * (1 - number / 60))
            else:
                plain.step()
        return float(error(leaf.detach()))

    rates = [2.0**-power for power in range(1, 9)]
    assert min(ending("white", rate) for rate in rates) < 0.1 * min(ending("plain", rate) for rate in rates)
