"""Find out what an unknown architecture is, and write its family literal."""

from pathlib import Path

from ..checkpoint.disk import replacing
from ..checkpoint.hub import resolve
from ..core.errors import UserError
from ..core.progress import Progress, no_progress
from ..detection import Detection
from ..detection import detect as experiment
from ..hf_models.building import is_model_type
from ..outputs import refuse_existing
from ..parallel import main_only
from ..trusted_code import trusts_code


@main_only
@trusts_code("model")
def detect(
    model: str | Path,
    *,
    out: str | Path | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Detection:
    """Detect the attention of an architecture by experiments on a toy model, and prove that it can be folded.

    Args:
        model: A checkpoint directory, a hub id, or a `model_type` of transformers.
        out: A file for the family literal, as Python source.
        trust_remote_code: Run the code that the checkpoint brings for its class.
        force: Replace that file.
        progress: Called with (stage, done, total).

    Raises:
        UserError: no such model; with `out`, an architecture that is not proven, or a file in the way.
    """
    if out is not None:
        refuse_existing(Path(out), force)
    found = experiment(model if is_model_type(model) else resolve(str(model)), progress or no_progress)
    if out is not None:
        if found.family is None:
            raise UserError(f"{model}: no literal to write to {out}: {found.reason}")
        with replacing(Path(out)) as temporary:
            temporary.write_text(found.source)
    return found
