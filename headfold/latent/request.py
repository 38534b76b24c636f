"""What a fold to MLA is asked for, and which models and options it refuses."""

import re
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import torch

from ..conversion.source import Source
from ..core.errors import UserError
from ..families.context import context_length, sliding_window
from ..families.wrapped import is_wrapper
from ..parallel import num_processes
from ..refine.scope import Fits

MODEL_TYPES = ("llama", "mistral")
"""Types whose blocks are those of the target class but for their attention."""
ROPE_TYPES = ("default", "llama3")
"""Rotary tables whose fastest planes have the frequencies of a base."""
MOST = 2**14
"""Dims of a latent, and of a rotary key."""
_SIZE = re.compile(r"\d{1,6}(?:\.\d{1,6})?%?|\d{1,6}/\d{1,6}")
"""A count, a share in decimals or percent, or a fraction."""
_DEFAULTS = {"group": "swap", "merge": "absorb", "head_dim_multiple": 1}
KERNEL_ROTARY_DIM = 64
"""Dims of the rotary key that the MLA kernels of engines take."""


@dataclass(frozen=True, slots=True)
class LatentRequest:
    """The size of the latent: `rank` dims beside a rotary key of `rotary_dim`, or both together as a share of the original's cache."""

    rank: int | None
    share: Fraction | None
    rotary_dim: int | None

    @classmethod
    def of(
        cls,
        to: str | None,
        kv_rank: str | int | None,
        rope_dim: int | None,
        *,
        fits: Fits | None = None,
        **others: Any,
    ) -> "LatentRequest | None":
        """Return the request for these options, None where there are none; `fits` and `others` are those of a fold to fewer K/V heads,
        which must have their defaults beside them, but for `refit`.

        Raises:
            UserError: another target, an option that does not go with it, or a size that is none.
        """
        if to is None and kv_rank is None and rope_dim is None:
            return None
        if to is None:
            raise UserError("fold: --kv-rank and --rope-dim go with --to mla; add it, or leave them out")
        if to != "mla":
            raise UserError(f"fold: --to: expected mla, got {to}; leave it out for fewer K/V heads")
        others |= asdict(replace(fits or Fits(), refit=False))
        unset = {name for name, value in others.items() if value is None or value is False}
        unset |= {name for name, default in _DEFAULTS.items() if str(others.get(name)) == str(default)}
        if given := [name for name in others if name not in unset]:
            raise UserError(
                f"fold --to mla: --{given[0].replace('_', '-')} is for folds to fewer K/V heads; leave it out"
            )
        if kv_rank is None:
            raise UserError(
                "fold --to mla: expected --kv-rank, dims of the latent (512) or a share of the cache (1/4), got none"
            )
        if rope_dim is not None and (rope_dim < 2 or rope_dim % 2 or rope_dim > MOST):
            raise UserError(
                f"fold --to mla: --rope-dim: expected an even number from 2 to {MOST}, got {rope_dim}; choose another"
            )
        text = str(kv_rank).strip()
        try:
            read = Fraction(text.removesuffix("%")) if _SIZE.fullmatch(text) else Fraction(0)
        except ZeroDivisionError:
            read = Fraction(0)
        number = read / 100 if text.endswith("%") else read
        if number.denominator == 1 and 1 < number <= MOST and not text.endswith("%"):
            return cls(int(number), None, rope_dim)
        if not 0 < number < 1:
            raise UserError(
                f"fold --to mla: --kv-rank: expected dims from 2 to {MOST}, or a share of the cache such as 1/4 or 25%, got {text}"
            )
        return cls(None, number, rope_dim)

    def cached(self, source: Source) -> int | None:
        """Return the numbers that a token leaves in the cache of one site, where the request is a share of what the original caches.

        Raises:
            UserError: that is too few.
        """
        if self.share is None:
            return None
        site = source.sites[0]
        cached = int(self.share * 2 * site.num_kv_heads * site.head_dim)
        least = 2 + (self.rotary_dim or 2)
        if cached < least:
            raise UserError(
                f"fold --to mla: --kv-rank: expected a share of at least {least} of {2 * site.num_kv_heads * site.head_dim} cached "
                f"numbers, got {cached}; choose a larger one"
            )
        return cached


def check_source(source: Source) -> None:
    """Check that the target class computes what the model computes outside of its attention, exactly.

    Raises:
        UserError: it does not, in one line.
    """
    if why := _why_not(source):
        raise UserError(
            f"{source.name}: cannot be folded to MLA: {why}; fold it to fewer K/V heads instead (--kv-heads)"
        )
    if num_processes() > 1:
        raise UserError("fold --to mla: expected one process, got several; run it without a launcher")


def _why_not(source: Source) -> str:
    """Return what of a model the target class has no place for; an empty text where there is nothing."""
    config, sites = source.config, source.sites
    model_type = config["model_type"]
    if is_wrapper(config) or model_type not in MODEL_TYPES or len(config.get("architectures") or []) != 1:
        return f"expected a language model of type {' or '.join(MODEL_TYPES)}, got {model_type}"
    if not config["architectures"][0].endswith("ForCausalLM") or "headfold" in config or "auto_map" in config:
        return f"expected a class of transformers for text, got {config['architectures'][0]}"
    biased = next((name for name in source.checkpoint.tensors if name.endswith("_proj.bias")), None)
    if biased:
        return f"{biased}: DeepseekV3 has no such bias"
    freedom = sites[0].key_freedom
    if freedom.kind != "rope-halves" or freedom.rotary_dim != sites[0].head_dim or not freedom.frequencies:
        return "expected keys that rotate in all dims, by one table"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        return f"expected rotary frequencies of type {' or '.join(ROPE_TYPES)}, got {kind}"
    context = context_length(config)
    windows = [sliding_window(config, layer) for layer in range(len(sites))]
    if any(window and (context is None or window < context) for window in windows):
        return "DeepseekV3 has no sliding window"
    if len({(site.num_heads, site.num_kv_heads, site.head_dim) for site in sites}) > 1:
        return "expected as many heads in every layer"
    if source.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        # The latent is written small enough for the epsilon of its norm, where float16 has no precision left.
        return f"expected weights in bfloat16 or float32, got {str(source.dtype).removeprefix('torch.')}"
    return ""
