"""What a check of serving engines returns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engine import Engine
from .likeness import Likeness


@dataclass(frozen=True, slots=True)
class CheckRow:
    """One engine. Without a run, all that is measured is None."""

    engine: Engine
    serve: str
    """The command that serves the fold there."""
    version: str | None = None
    found: Likeness | None = None
    refused: str | None = None
    """The engine's own words, or headfold's where the fold cannot be written for it."""
    tokens_per_second: float | None = None
    """New tokens, one sample."""
    kv_bytes_per_token: float | None = None
    """In float32, which drivers compute in."""

    def to_json(self) -> dict[str, Any]:
        """Return the machine-readable form, as --json prints it."""
        about = {"engine": self.engine.name, "install": self.engine.install, "serve": self.serve}
        names = ("version", "refused", "tokens_per_second", "kv_bytes_per_token")
        measured = {name: getattr(self, name) for name in names}
        if self.found is None:
            return about | measured
        compared = {name: getattr(self.found, name) for name in Likeness.__slots__}
        return about | measured | compared | {"same": self.found.is_same}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What engines made of a model."""

    model: Path
    rows: tuple[CheckRow, ...]
    kv_bytes_per_token: int
    """What its counts of heads come to, in float32."""
    num_tokens: int | None
    num_new_tokens: int | None
    """None where nothing was run."""

    @property
    def is_right(self) -> bool | None:
        """Whether every engine that was run computes the same model; None where none was."""
        run = [row.found is not None and row.found.is_same for row in self.rows if row.version is not None]
        return all(run) if run else None

    def to_json(self) -> dict[str, Any]:
        """Return the machine-readable form, as --json prints it."""
        names = ("kv_bytes_per_token", "num_tokens", "num_new_tokens")
        about = {"model": str(self.model), **{name: getattr(self, name) for name in names}}
        return about | {"right": self.is_right, "rows": [row.to_json() for row in self.rows]}
