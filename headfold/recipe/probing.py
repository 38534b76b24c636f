"""Find out what an unknown architecture is, and write its literal."""

from pathlib import Path

from ..checkpoint.hub import resolve
from ..core.errors import UserError
from ..detect import Detection
from ..detect import detect as experiment
from .source import refuse_existing


def probe(model: str | Path, *, out: str | Path | None = None, force: bool = False) -> Detection:
    """What is seen of a `model_type`, or of a checkpoint by its config; `out` takes the literal.

    Raises:
        UserError: no such model; with `out`, an architecture that is not proven, or a file in the way.
    """
    if out is not None:
        refuse_existing(Path(out), force)
    found = experiment(model if _is_model_type(model) else resolve(str(model)))
    if out is not None:
        if found.family is None:
            raise UserError(f"{model}: no literal to write to {out}: {found.reason}")
        Path(out).write_text(found.source)
    return found


def _is_model_type(model: str | Path) -> bool:
    from transformers import CONFIG_MAPPING

    return str(model) in CONFIG_MAPPING and not Path(model).is_dir()
