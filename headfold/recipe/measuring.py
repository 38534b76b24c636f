"""What needs the original running: its calibration text, statistics and refit."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import calibration as calibrating
from ..checkpoint.reader import check_finite
from ..checkpoint.stats_file import StatsFile, write_stats
from ..core.errors import UserError
from ..core.plan import Plan
from ..core.stats import SiteStats
from ..corpus.windows import draw_windows, fingerprint
from ..refine.refit import refit
from ..stock import compute_dtype, open_model, open_tokenizer, stored_dtype
from ..surgery import site_tensors
from .source import Opened, Progress, open_source, refuse_existing, silent

DEFAULT_CALIBRATION = "self"
DEFAULT_TOKENS = 65_536
MAX_CONTEXT = 1024
"""Longest calibration window; shorter where the model's own context is."""


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """What calibration measured and where it lies."""

    path: Path
    source: str
    fingerprint: str
    tokens: int
    sites: int
    seconds: float
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "tokens_per_second": round(self.tokens / self.seconds, 1)}


def calibrate(
    model: str | Path,
    stats: str | Path,
    *,
    calibration: str = DEFAULT_CALIBRATION,
    tokens: int = DEFAULT_TOKENS,
    context: int | None = None,
    seed: int = 0,
    force: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> CalibrationResult:
    """Run `model` over calibration tokens and write the statistics that plans and merges need to the file `stats`.

    `calibration` is any source of `headfold.corpus`; `context` the length of its windows (default: the model's own, at most
    `MAX_CONTEXT`). Files of several runs add (`headfold.checkpoint.stats_file.add_stats`).

    Raises:
        UserError: a source that cannot be folded or read, or a file in the way without `force`.
    """
    path = Path(stats)
    refuse_existing(path, force)
    source = open_source(model)
    run = OriginalRun(source, calibration, tokens, context, seed, device or default_device(), progress or silent)
    started = time.monotonic()
    metadata = run.write_statistics(path)
    seconds = time.monotonic() - started
    return CalibrationResult(
        path, calibration, metadata["fingerprint"], int(metadata["tokens"]), len(source.sites), seconds, run.notes
    )


def default_device() -> str:
    """The accelerator, where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(slots=True)
class OriginalRun:
    """What needs the running original: its text, statistics and refit, with the model opened at most once."""

    source: Opened
    calibration: str
    tokens: int
    context: int | None
    seed: int
    device: str
    progress: Progress
    notes: list[str] = field(default_factory=list)
    _model: Any = None
    _windows: Tensor | None = None

    @property
    def model(self) -> Any:
        if self._model is None:
            path = self.source.checkpoint.path
            dtype, why = compute_dtype(stored_dtype(path), self.device)
            self.notes.append(why)
            self._model = open_model(path, dtype=dtype, device=self.device)
            for name, parameter in self._model.named_parameters():
                if not parameter.is_meta:
                    check_finite(f"{self.source.name}: {name}", parameter)
        return self._model

    def use_windows(self, stats: StatsFile | None) -> None:
        """Take the calibration tokens from where earlier statistics were written, if they are there."""
        if stats is not None:
            self._windows = stats.windows()

    def close(self) -> None:
        """Let go of the model's memory."""
        self._model = None

    def window_length(self) -> int:
        limit = self.source.checkpoint.config.get("max_position_embeddings") or MAX_CONTEXT
        if self.context is not None and self.context > limit:
            raise UserError(f"--context {self.context}: the model's own context is {limit}; choose at most that")
        return self.context or min(limit, MAX_CONTEXT)

    @property
    def windows(self) -> Tensor:
        """Calibration tokens, drawn once."""
        if self._windows is None:
            needs_model = self.calibration == "self"
            tokenizer = open_tokenizer(self.source.checkpoint.path)
            advance = self._count("sample", self.tokens)
            self._windows = draw_windows(
                self.calibration,
                tokenizer=tokenizer,
                model=self.model if needs_model else None,
                num_tokens=self.tokens,
                context=self.window_length(),
                seed=self.seed,
                progress=advance,
            )
            self.progress("sample", self.tokens, self.tokens)
        return self._windows

    def _count(self, stage: str, total: int) -> Callable[[int], None]:
        done = 0
        self.progress(stage, 0, total)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress(stage, done, total)

        return advance

    def write_statistics(self, path: Path) -> dict[str, str]:
        """Calibrate, write the file, return its metadata."""
        windows = self.windows
        model = self.model
        advance = self._count("calibrate", windows.numel())
        sums = calibrating.collect(model, self.source.sites, windows, advance)
        metadata = {"model": self.source.checkpoint.fingerprint(), **self.text_facts()}
        write_stats(path, sums, metadata, windows)
        return metadata

    def text_facts(self) -> dict[str, str]:
        """What the calibration tokens are, for the record."""
        return {
            "source": self.calibration,
            "tokens": str(self.windows.numel()),
            "context": str(self.windows.shape[1]),
            "seed": str(self.seed),
            "fingerprint": fingerprint(self.windows),
        }

    def refit(self, plan: Plan, stats: Mapping[str, SiteStats] | None) -> dict[str, Tensor]:
        """Output projections refitted to the original's, by names on disk."""
        batches = list(calibrating.batches(self.windows))
        read, model = self.source.checkpoint.read, self.model
        advance = self._count("refit", self.windows.numel() * len(self.source.sites))
        return refit(
            model,
            self.source.sites,
            lambda site: site_tensors(site, plan, read, stats, num_groups=site.num_groups),
            batches,
            progress=advance,
        )
