"""Attention for fits that leave Q and K alone: its weights are computed once per recorded call, and only V has a gradient.

A fit of W_v runs every call forward and backward several times, and the weights P = softmax(Q Kᵀ) are the same each time. With P kept,
the output P V and the gradient Pᵀ G are one matrix product each. Where P does not fit into `KEPT_BYTES` it is computed again, which
still spares the gradients of Q and K.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..runtime import modeling_headfold

NAME = "headfold-fixed"
"""The name under which transformers finds this attention."""
KEPT_BYTES = 2**30
"""Bytes of attention weights of one site that each process keeps."""
_ROWS = 64
"""Queries at a time. Of causal weights only the keys up to the last of them are computed and kept, so fewer rows waste less."""

Part = tuple[slice, Float[Tensor, "batch_times_group head_times_row key"]]
"""Rows of the queries, and their weights on the first keys."""


class Caught(NamedTuple):
    """What an attention function is called with."""

    query: Float[Tensor, "batch head token dim"]
    key: Float[Tensor, "batch group key dim"]
    mask: Tensor | None
    scaling: float
    causal: bool


class _Reached(Exception):
    """Raised in place of the attention; carries its arguments."""

    def __init__(self, caught: Caught) -> None:
        self.caught = caught


class FixedAttention:
    """The attention of one site; `number` is that of the recorded call that runs next."""

    def __init__(self, kept_bytes: int) -> None:
        self.number = 0
        self._kept: dict[int, list[Part]] = {}
        self._left = kept_bytes
        self.is_catching = False

    def keeps(self, number: int) -> bool:
        """Return whether the weights of that call are kept: they are then what they were, whatever Q and K are."""
        return number in self._kept

    def catch(self, run: Callable[[], object]) -> Caught:
        """Return what the module passes to its attention in `run`, which goes no further."""
        self.is_catching = True
        try:
            run()
        except _Reached as reached:
            return reached.caught
        finally:
            self.is_catching = False
        raise AssertionError("the attention was never called")

    def __call__(
        self,
        query: Float[Tensor, "batch head token dim"],
        key: Float[Tensor, "batch group key dim"],
        value: Float[Tensor, "batch group key value_dim"],
        mask: Tensor | None,
        *,
        scaling: float,
        causal: bool,
    ) -> Float[Tensor, "batch token head value_dim"]:
        """Return the attention's output. `mask` is boolean (true: attend) or additive, and broadcasts to (batch, head, token, key)."""
        compute = partial(_parts, query.detach(), key.detach(), mask, scaling, causal)
        parts = self._kept.get(self.number)
        if parts is None and self._left > 0:
            parts = list(compute())
            size = sum(weights.nbytes for _, weights in parts)
            if size <= self._left:
                self._kept[self.number] = parts
            self._left -= size  # so that no call after the first that does not fit is tried
        output: Tensor = _Weighted.apply(value, (lambda: parts) if parts else compute, query.shape[1:3])
        return output


class _Weighted(torch.autograd.Function):
    """P V by parts, for fixed P."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, parts: Callable[[], Iterable[Part]], shape: tuple[int, int]) -> Tensor:
        (batch, groups, _, dim), (heads, tokens) = value.shape, shape
        ctx.parts, ctx.shape = parts, value.shape
        rows = value.flatten(0, 1)
        output = value.new_empty(batch, tokens, groups, heads // groups, dim)
        for where, weights in parts():
            part = weights @ rows[:, : weights.shape[2]]
            output[:, where] = part.view(batch, groups, heads // groups, -1, dim).permute(0, 3, 1, 2, 4)
        return output.flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        batch, groups, keys, dim = ctx.shape
        gradient = gradients[0].unflatten(2, (groups, -1))
        total = gradient.new_zeros(batch * groups, keys, dim)
        for where, weights in ctx.parts():
            part = gradient[:, where].permute(0, 2, 3, 1, 4).reshape(batch * groups, -1, dim)
            total[:, : weights.shape[2]].baddbmm_(weights.mT, part)
        return total.view(ctx.shape), None, None


def _parts(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, causal: bool) -> Iterator[Part]:
    """Yield P by parts, computed in float32 or better and rounded to the dtype of the queries, as fused kernels round it."""
    precise = torch.promote_types(query.dtype, torch.float32)
    (batch, heads, tokens, _), (groups, keys) = query.shape, key.shape[1:3]
    grouped = (
        (scaling * query.to(precise)).unflatten(1, (groups, -1)).flatten(0, 1)
    )  # (batch · group, head, token, dim)
    columns = key.to(precise).flatten(0, 1).mT
    for start in range(0, tokens, _ROWS):
        where = slice(start, min(start + _ROWS, tokens))
        last = min(where.stop, keys) if causal else keys
        logits = grouped[:, :, where].flatten(1, 2) @ columns[..., :last]
        by_head = logits.view(batch, heads, -1, last)
        if causal:  # only keys behind a query are hidden; adding takes less time than filling in
            behind = (where.stop - start, max(0, last - start))
            by_head[..., start:] += torch.full(behind, float("-inf"), dtype=precise, device=query.device).triu_(1)
        elif mask is not None:
            shown = mask[:, :, where, :last] if mask.shape[2] > 1 else mask[..., :last]
            by_head.masked_fill_(~shown, float("-inf")) if shown.dtype == torch.bool else by_head.add_(shown)
        weights = logits.softmax(-1)
        if mask is not None:
            weights.nan_to_num_(0)  # of a query that attends to nothing
        yield where, weights.to(query.dtype)


def install(attention: nn.Module) -> FixedAttention | None:
    """Give the module, a copy of a stock one that has its own config, this attention; None where it does not use transformers' `sdpa`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = getattr(attention, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or not _asks_transformers(type(attention)):
        return None
    ALL_ATTENTION_FUNCTIONS.register(NAME, _forward)
    config._attn_implementation = NAME
    fixed = FixedAttention(KEPT_BYTES)
    vars(attention)["headfold_fixed"] = fixed
    return fixed


def remove(attention: nn.Module) -> None:
    """Give the module the attention back that it had before."""
    config: Any = attention.config
    config._attn_implementation = "sdpa"
    del vars(attention)["headfold_fixed"]


def _asks_transformers(attention: type[nn.Module]) -> bool:
    """Return whether a class, or headfold's own forward for it, looks its attention function up and calls it once: a few (Falcon) call
    PyTorch's, and those that take the patches of all images as one row call it for each image.
    """
    module = sys.modules[attention.__module__]
    several = "cu_seqlens" in inspect.signature(attention.forward).parameters
    return not several and ("ALL_ATTENTION_FUNCTIONS" in vars(module) or module is modeling_headfold)


_HEEDED = ("cache", "softcap")
"""Keywords of `sdpa` for which the stock function is called, to compute with them or to refuse them. It heeds no others but
`position_bias`.
"""


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import create_position_bias_mask, sdpa_attention_forward

    if dropout or any(keywords.get(word) is not None for word in _HEEDED):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, **keywords
        )
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = attention_mask is None and query.shape[2] > 1 and is_causal
    if position_bias is not None:
        attention_mask = create_position_bias_mask(position_bias, attention_mask, causal, query, key)
        causal = False
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if module.headfold_fixed.is_catching:
        raise _Reached(Caught(query, key, attention_mask, scaling, causal))
    return module.headfold_fixed(query, key, value, attention_mask, scaling=scaling, causal=causal), None
