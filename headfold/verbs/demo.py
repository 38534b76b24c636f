"""Fold the bundled model once and measure it before and after; nothing but the package is needed."""

import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.progress import Progress, no_progress
from ..evaluate.perplexity import Evaluation
from ..parallel import main_only
from .evaluate import evaluate
from .fold import fold

BUNDLED = Path(__file__).parents[1] / "bundled"
KV_HEADS = "1/2"
CALIBRATION, TOKENS = "stdlib", 8_192
"""Calibration data: this machine's Python sources, without the held-out ones."""
HELD_OUT_TOKENS = 32_768


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The bundled model before and after a fold to half of its K/V heads."""

    out: Path | None
    num_kv_heads_before: int
    num_kv_heads_after: int
    kv_bytes_before: int
    kv_bytes_after: int
    evaluation: Evaluation
    """Evaluation of the fold, with the original as its reference."""
    seconds: float
    """Seconds that the fold took: calibration, plan, refit, writing and verification."""

    def to_json(self) -> dict[str, Any]:
        """Return the machine-readable form, as --json prints it."""
        return {**asdict(self), "out": self.out and str(self.out)}


@main_only
def demo(
    out: str | Path | None = None,
    *,
    force: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Fold the bundled language model to half of its K/V heads, and measure it beside the original on held-out text.

    Args:
        out: Where to leave the fold; by default it is removed after it was measured.
        force: Replace what is at `out`.
        device: "cpu" or "cuda".
        dtype: What the models compute in, such as "float32".
        progress: Called with (stage, done, total).

    Raises:
        UserError: `out` has contents, and `force` is not given.
    """
    with ExitStack() as stack:
        target = stack.enter_context(tempfile.TemporaryDirectory()) if out is None else out
        place = Path(target) / "bundled-gqa" if out is None else Path(target)
        folded = fold(
            BUNDLED, place, kv_heads=KV_HEADS, calibration=CALIBRATION, tokens=TOKENS, force=force, device=device, dtype=dtype,
            progress=progress,
        )  # fmt: skip
        found = evaluate(
            place,
            reference=BUNDLED,
            limit=HELD_OUT_TOKENS,
            device=device,
            dtype=dtype,
            progress=progress or no_progress,
        )
    assert isinstance(found, Evaluation)
    counts = (folded.num_kv_heads_before, folded.num_kv_heads_after)
    sizes = (folded.kv_bytes_before, folded.kv_bytes_after)
    return DemoResult(
        None if out is None else Path(out), *counts, *sizes, found, round(sum(folded.seconds.values()), 2)
    )
