"""Second moments of the K/V input: all that `absorb` and `procrustes` need to know of the data."""

import torch
from jaxtyping import Float
from torch import Tensor


def observe(x: Float[Tensor, "sequence token model"]) -> dict[str, Tensor]:
    """Sums over one batch: `second` = Σ [x, 1][x, 1]ᵀ and `scatter` = Σ (x − x̄)(x − x̄)ᵀ with x̄ the mean of each sequence.

    The product runs in the dtype of x (a matrix product of the model's own kind); only the sums are float64.
    """
    model, num_tokens = x.shape[-1], x.shape[0] * x.shape[1]
    flat = x.reshape(-1, model)
    product = (flat.T @ flat).to(torch.float64)
    sums = x.sum(1).to(torch.float64)
    second = torch.empty(model + 1, model + 1, dtype=torch.float64)
    second[:model, :model] = product
    second[model, :model] = second[:model, model] = sums.sum(0)
    second[model, model] = num_tokens
    return {"second": second, "scatter": product - sums.T @ sums / x.shape[1]}
