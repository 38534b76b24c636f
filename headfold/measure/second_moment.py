"""Second moments of the K/V input: the statistics that most methods need."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.products import self_product


def observe(
    x: Float[Tensor, "sequence token model"], mask: Bool[Tensor, "sequence token"] | None = None
) -> dict[str, Tensor]:
    """Return `second` = Σ [x, 1][x, 1]ᵀ and `scatter` = Σ (x − x̄)(x − x̄)ᵀ of one batch, with x̄ the mean of each sequence.

    `mask` is false at padding, which is left out. The product is computed in float32 at least (half precision would round every
    sum, and fp16 overflow), and the sums are float64.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    model = x.shape[-1]
    lengths = torch.full((len(x),), x.shape[1], device=x.device) if mask is None else mask.sum(1)
    x = x if mask is None else x * mask[..., None].to(x.dtype)
    flat = x.reshape(-1, model)
    product = self_product(flat).to(torch.float64)
    sums = x.sum(1).to(torch.float64)
    second = torch.empty(model + 1, model + 1, dtype=torch.float64)
    second[:model, :model] = product
    second[model, :model] = second[:model, model] = sums.sum(0)
    second[model, model] = lengths.sum()
    means = sums / lengths.clamp_min(1)[:, None]
    return {"second": second, "scatter": product - sums.T @ means}
