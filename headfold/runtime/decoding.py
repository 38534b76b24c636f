"""Attention of few queries over long keys: several implementations, of which the fastest on this machine is chosen.

Processors differ: with bf16 matrix units two batched products are fastest, without them they are many times slower than the fused
kernel. So all are timed once per device, dtype and class of shapes, and the fastest is used from then on. The text below this
docstring is copied into checkpoints (`remote.py`), so it changes only on purpose.
"""

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FEW = 16
"""Largest number of query tokens that counts as decoding: for more, a fused kernel that skips what is masked is faster."""
MEASURED = 2**24
"""Largest number of elements in the keys of a timing."""
ROUNDS = 5
HOPELESS = 4
"""A candidate that first takes so many times the best time is not run again."""

WRONG = 0.05
"""Share of the largest output by which a candidate may differ from the fused kernel; bfloat16 rounds to 0.004."""

Inner = Callable[..., tuple[Tensor, None]]


class Unsuited(Exception):
    """Raised by a candidate that cannot run here, or not on such tensors; the message says why."""


_log = logging.getLogger("headfold")


def sdpa(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return torch's fused attention on packed rows: (batch, group, row, dim) over (batch, group, key, dim) as (batch, row, group,
    dim).
    """
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scaling
    )
    return output.transpose(1, 2), None


def plain_attention(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return attention computed step by step, and its weights, with one K/V head per query head.

    K and V may be (batch, group, slot, key, dim), heads in several slots, whose products are summed and whose outputs are joined.
    Logits are `softcap`ped, biased and masked; `sinks` (1, head, 1 or token, 1) take part in the softmax, which is in float32 or
    better.
    """
    wide = key.dim() == 5
    rows = query.unflatten(-1, (key.shape[2], -1)).transpose(2, 3) if wide else query
    products = rows @ key.transpose(-1, -2)
    scores = (products.sum(2) if wide else products) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores if position_bias is None else scores + position_bias
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1).to(value.dtype)
    weights = weights if sinks is None else weights[..., :-1]
    kept = nn.functional.dropout(weights, dropout)
    output = (kept.unsqueeze(2) @ value).transpose(2, 3).flatten(3) if wide else kept @ value
    return output.transpose(1, 2), weights


def matmuls(*arguments: Any, **keywords: Any) -> tuple[Tensor, None]:
    """Return two batched products with a softmax between them: the plain attention on packed rows."""
    return plain_attention(*arguments, **keywords)[0], None


CANDIDATES: dict[str, Inner] = {"sdpa": sdpa, "matmuls": matmuls}


@dataclass(frozen=True, slots=True)
class KernelTiming:
    """The timing of one class of shapes: seconds by candidate, and why other candidates did not run."""

    device: str
    dtype: torch.dtype
    groups: int
    rows: int
    keys: int
    masked: bool
    seconds: dict[str, float]
    unsuited: dict[str, str]

    @property
    def best(self) -> str:
        """The name of the fastest candidate."""
        return min(self.seconds, key=self.seconds.__getitem__)

    def __str__(self) -> str:
        ranked = sorted(self.seconds.items(), key=lambda item: item[1])
        times = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in ranked)
        without = "".join(f"; no {name}: {reason}" for name, reason in self.unsuited.items())
        mask = ", masked" if self.masked else ""
        shape = f"{self.groups} groups × {self.rows} rows × {self.keys} keys{mask}"
        return f"decode attention, {self.device} {str(self.dtype).removeprefix('torch.')}, {shape}: {times}{without}"


TIMINGS: list[KernelTiming] = []
"""All timings of this process."""


def choose(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Inner:
    """Return the fastest candidate for packed rows of these shapes; the fused kernel where timing is impossible (tracing, gradients,
    float64).
    """
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    states = (query, key, value, mask)
    learning = torch.is_grad_enabled() and any(state is not None and state.requires_grad for state in states)
    if tracing or learning or query.dtype == torch.float64:
        return sdpa
    dim = query.shape[-1]
    groups, rows, keys = map(_class, (len(query) * query.shape[1], query.shape[2], key.shape[2]))
    keys = max(1, min(keys, MEASURED // (groups * dim)))
    return CANDIDATES[fastest(query.device.type, query.dtype, groups, rows, keys, dim, mask is not None)]


def _class(size: int) -> int:
    """Return the least power of two that is not below `size`; sizes of one class share a timing."""
    return 1 << max(0, size - 1).bit_length()


@functools.cache
def fastest(device: str, dtype: torch.dtype, groups: int, rows: int, keys: int, dim: int, masked: bool) -> str:
    """Return the name of the candidate that is fastest on random numbers: (groups, rows, dim) over (groups, keys, dim)."""
    with torch.no_grad():
        draw = torch.Generator(device).manual_seed(0)  # of its own: what a user samples stays what it was

        def drawn(length: int) -> Tensor:
            return torch.randn(1, groups, length, dim, device=device, generator=draw).to(dtype)

        query, key, value = drawn(rows), drawn(keys), drawn(keys)
        mask = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=device) if masked else None

        def run(candidate: Inner) -> tuple[float, Tensor]:
            started = time.perf_counter()
            output, _ = candidate(None, query, key, value, mask)
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started, output

        seconds, unsuited = _measured(run)
    TIMINGS.append(KernelTiming(device, dtype, groups, rows, keys, masked, seconds, unsuited))
    _log.debug("%s", TIMINGS[-1])
    return TIMINGS[-1].best


def _measured(run: Callable[[Inner], tuple[float, Tensor]]) -> tuple[dict[str, float], dict[str, str]]:
    """Least seconds of each candidate, taken in turns: what disturbs the machine for a while disturbs them all."""
    seconds: dict[str, float] = {}
    unsuited: dict[str, str] = {}
    _, expected = run(sdpa)
    for name, candidate in CANDIDATES.items():
        try:
            seconds[name], found = run(candidate)
        except Unsuited as reason:
            unsuited[name] = str(reason)
            continue
        if not (found - expected).abs().max() <= WRONG * expected.abs().max():
            unsuited[name] = "its output is wrong here"
            del seconds[name]
    for number in range(ROUNDS):
        limit = HOPELESS * min(seconds.values()) if number else float("inf")
        for name in [name for name in seconds if seconds[name] <= limit]:
            seconds[name] = min(seconds[name], run(CANDIDATES[name])[0])
    return seconds, unsuited
