"""Text sampled from the model itself: calibration without any data."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..core.errors import UserError


@torch.no_grad()
def sample_windows(
    model: Any,
    num_windows: int,
    context: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    temperature: float = 1.0,
    bos: int | None = None,
    eos: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Int[Tensor, "window context"]:
    """Return windows sampled from a causal language model, which is on the device and in the dtype it is to run in.

    Each window starts with `bos` or, without one, with a token drawn uniformly. Sampling is pure: no top-k or top-p, whatever the
    checkpoint's generation config says. An end of text does not end a window: `eos` is followed by `bos` and the next text. The
    same seed, batch size and device give the same windows; the global random state is not changed. `progress` is called with the
    number of tokens of each step.

    Raises:
        UserError: logits are not finite.
    """
    device = next(iter(model.parameters())).device
    # A streamed model's weights are "meta" between its passes and its inputs are moved for it, so the CPU draws.
    generator = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)
    sizes = [min(batch_size, num_windows - start) for start in range(0, num_windows, batch_size)]
    sampled = [_sample(model, size, context, generator, temperature, bos, eos, progress) for size in sizes]
    return torch.cat(sampled) if sampled else torch.empty(0, context, dtype=torch.long)


def _sample(
    model: Any,
    num_windows: int,
    context: int,
    generator: torch.Generator,
    temperature: float,
    bos: int | None,
    eos: int | None,
    progress: Callable[[int], None],
) -> Int[Tensor, "window context"]:
    """Sample one batch token by token, with the model's own K/V cache."""
    device, vocabulary = generator.device, model.config.get_text_config().vocab_size
    token = torch.randint(vocabulary, (num_windows, 1), generator=generator, device=device)
    if bos is not None:
        token = torch.full_like(token, bos)
    tokens, cache = [token], None
    while len(tokens) < context:
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chances = (output.logits[:, -1].to(device).float() / temperature).softmax(-1)
        if not chances.isfinite().all():
            raise UserError(
                "calibration self: expected finite logits of the next token, got others, so the model cannot write text; "
                "are its weights good?"
            )
        drawn = torch.multinomial(chances, 1, generator=generator)
        if bos is not None and eos is not None and bos != eos:
            drawn = torch.where(token == eos, bos, drawn)
        token = drawn
        tokens.append(token)
        progress(num_windows)
    return torch.cat(tokens, 1).cpu()
