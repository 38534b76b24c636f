"""Measure the statistics of attention inputs once, for any number of plans and folds."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adequacy.reach import reach_of_text
from ..conversion.calibration_config import CalibrationConfig
from ..conversion.source import open_source, with_seen_tower
from ..conversion.teacher import Teacher
from ..core.progress import Progress, no_progress, silent
from ..families.context import context_length
from ..hf_models import check_device, dtype_named
from ..in_memory.data import calibration_data
from ..in_memory.models import takes_models
from ..outputs import owned_file, refuse_existing_early
from ..parallel import on_all, on_main
from ..trusted_code import trusts_code

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """The result of a calibration: its data, and the file of statistics."""

    path: Path
    source: str
    fingerprint: str
    """Fingerprint of the calibration data."""
    tokens: int
    sites: int
    seconds: float
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the machine-readable form, as --json prints it."""
        return {**asdict(self), "path": str(self.path), "tokens_per_second": round(self.tokens / self.seconds, 1)}


@takes_models("model")
@trusts_code("model")
def calibrate(
    model: "str | Path | PreTrainedModel",
    stats: str | Path,
    *,
    calibration: str | Iterable[Any] | None = None,
    tokens: int | None = None,
    items: int | None = None,
    columns: Sequence[str] = (),
    context: int | None = None,
    seed: int = 0,
    force: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = silent,
) -> CalibrationResult:
    """Run `model` over calibration data and write the statistics that plans and merges need to the file `stats`.

    Every site that runs on the data is measured, an encoder and a wrapper's tower too, whether they are folded later or not.

    Files of several runs add up (`headfold.stats_file.add_stats`).

    Args:
        model: A checkpoint directory, a GGUF file, a hub id, or a model of transformers in memory.
        stats: The file to write.
        calibration: A source of `headfold.corpus` that suits the model: text for a language model, pairs for an encoder-decoder,
            sentences, images or sound; or the data themselves: texts, rows, a `datasets.Dataset`, or batches as a DataLoader gives them
            (`headfold.in_memory.given`). By default a language model writes its own text.
        tokens: Calibration tokens of a language model; by default `DEFAULT_TOKENS` of `conversion.calibration_config`.
        items: Calibration items of other models; by default `DEFAULT_ITEMS` there.
        columns: Columns of a table.
        context: Length of windows, or where texts are cut; by default the model's own context, at most 1024 tokens.
        seed: Seed of the drawing of data.
        force: Replace the file.
        device: "cpu" or "cuda".
        dtype: What the model computes in, such as "float32"; by default the fastest dtype that holds its weights.
        adapter: A LoRA adapter of peft that is merged into the model first.
        trust_remote_code: Run the code that the model brings for its class.
        tokenizer: That of a model in memory, or its processor; by default what lies beside the files that it was opened from.
        progress, say: Called with (stage, done, total), and with lines to print.

    Raises:
        UserError: a source that cannot be folded or read, a file in the way without `force`, or another run that writes it.
    """
    path, compute_dtype = Path(stats), dtype_named(dtype)
    on_main(lambda: refuse_existing_early(path, force))
    source = on_all(lambda: open_source(model, adapter=adapter, progress=progress, say=say))
    data, given, notes = on_main(lambda: calibration_data(source, calibration, tokens, items, columns, context, seed))
    config = CalibrationConfig.resolve(source, data)
    source = on_all(lambda: with_seen_tower(source, config.kind))
    teacher = Teacher(source, config, check_device(device), compute_dtype, progress or no_progress, given, notes)
    started = time.monotonic()
    with owned_file(path, force):
        metadata = teacher.write_statistics(path)
    seconds = time.monotonic() - started
    notes = teacher.notes + reach_of_text(metadata, context_length(source.config)).notes()
    found = (metadata["fingerprint"], int(metadata["tokens"]), len(source.every_site), seconds, notes)
    return CalibrationResult(path, config.source, *found)
