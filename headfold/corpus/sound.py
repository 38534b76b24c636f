"""Sound for encoders that read its samples: recordings one after another, cut into pieces of one length, which need no padding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import UserError
from .audio import draw_recordings, resampled
from .rows import Table

SECONDS = 8
"""Length of a piece."""


def read_pieces(
    source: str | Table, columns: Sequence[str], num_items: int | None, seed: int | None, rate: int
) -> list[Float[np.ndarray, " sample"]]:
    """Return up to `num_items` pieces of `SECONDS` at `rate` samples per second, from as many recordings at most; one that is shorter where
    there is no more sound.

    Raises:
        UserError: as `audio.read_audio`, or there is less than a second of sound.
    """
    drawn = draw_recordings(source, columns, num_items, seed)
    size, left = SECONDS * rate, np.zeros(0, np.float32)
    pieces: list[Float[np.ndarray, " sample"]] = []
    for number in range(0 if drawn is None else len(drawn.rows)):
        assert drawn is not None
        left = np.concatenate([left, resampled(*drawn.sound(number), rate)])
        whole = len(left) // size
        pieces += np.split(left[: whole * size], whole) if whole else []
        left = left[whole * size :]
        if num_items is not None and len(pieces) >= num_items:
            break
    if not pieces and len(left) < rate:
        raise UserError(f"{source}: expected at least a second of sound, got {len(left)} samples; give another source")
    return pieces[:num_items] or [left]


def encode_pieces(pieces: Sequence[Float[np.ndarray, " sample"]], extractor: Any) -> dict[str, Tensor]:
    """Return `input_values` (item, sample) in float32."""
    values = extractor(list(pieces), sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_values"]
    return {"input_values": torch.as_tensor(values).float()}
