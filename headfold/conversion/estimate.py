"""How long what is left of a fold will take, before it begins."""

from collections.abc import Collection, Mapping
from contextlib import suppress

from ..corpus.samples import kind_of, window_length
from ..families.context import context_length
from ..hf_models import compute_dtype
from ..timing.arithmetic import Arithmetic, arithmetic
from ..timing.stages import CalibrationPass, Operations, fitting_operations, planning_operations, seconds_of
from .fold_request import FoldRequest
from .source import Source
from .teacher import Teacher
from .verification import ITEMS, WINDOW_TOKENS

TEXT_TOKENS, SPEECH_TOKENS = 32, 64
"""Assumed length of a text, such as a caption, and of the transcript of a window of speech, which is known only when it is drawn."""


def estimated_seconds(
    teacher: Teacher,
    request: FoldRequest,
    *,
    measured: bool,
    fitted: Mapping[str, Collection[str]],
    verifies: bool,
    single_pass: bool = False,
    drawn: bool = False,
) -> dict[str, float]:
    """Return seconds by stage, in the order of a fold. What cannot be counted is left out.

    `measured` says whether there are statistics, `fitted` which sites an earlier run refitted and healed, `single_pass` whether calibration
    and refit share one pass over the data, `drawn` whether the data are there already.
    """
    source, calibrates, operations = teacher.source, bool(request.statistics) and not measured, dict[str, Operations]()
    sizes = [max(source.checkpoint.tensors[site.tensor("o")].shape) for site in source.sites]
    with suppress(Exception):
        operations |= (
            _fitting(teacher, request, max(sizes), calibrates, fitted, single_pass, drawn)
            if request.calibration
            else {}
        )
    with suppress(Exception):
        operations |= {"verify": _verifying(source)} if verifies else {}
    operations |= {"plan": planning_operations(sizes)} if request.plan is None and request.statistics else {}
    return seconds_of(
        operations, max(sizes), source.checkpoint.num_bytes, teacher.device,
        dtype=lambda: teacher.dtype or compute_dtype(source.dtype, teacher.device)[0],
    )  # fmt: skip


def _fitting(
    teacher: Teacher,
    request: FoldRequest,
    hidden_size: int,
    calibrates: bool,
    fitted: Mapping[str, Collection[str]],
    single_pass: bool,
    drawn: bool,
) -> dict[str, Operations]:
    """Return the operations of the stages that run the original on calibration data."""
    source, data = teacher.source, request.calibration
    assert data is not None
    sites = {site.name for site in source.sites}
    length = window_length(source.config, data.context)
    assumed = {"text": length, "audio": SPEECH_TOKENS}.get(data.kind, TEXT_TOKENS)
    length = round(teacher.text_length or min(length, assumed))
    items = max(1, data.tokens // length) if data.kind == "text" else data.items
    width = sum(2 * site.num_kv_heads * site.head_dim for site in source.every_site)
    cached = width * length**2 / 2 if data.source == "self" else None
    changed = sites if request.shrinks(source) else set()
    return fitting_operations(
        CalibrationPass(item_operations(source, length), items, hidden_size, cached, drawn),
        calibrates=calibrates,
        refits=changed - {*fitted["refit"]} if request.settings["refit"] else (),
        heals=changed - {*fitted["heal"]} if request.healing else (),
        records=not single_pass,
        healed=request.healing.tokens / (1 if data.kind in ("images", "audio", "sound") else length),
        refit_by=request.refit_by,
        heals_together=request.healing.by == "model",
        shares_encoder=all(site.stack == "decoder" for site in source.sites),
    )


def _verifying(source: Source) -> Operations:
    """Return the operations of running the fold and its twin."""
    config = source.config
    limit, is_text = context_length(config) or WINDOW_TOKENS, kind_of(config) == "text"
    once = item_operations(source, min(limit, WINDOW_TOKENS if is_text else TEXT_TOKENS))
    return Operations(on_cpu=2 * (2 if is_text else ITEMS) * (once.blocks + once.head))


def item_operations(source: Source, length: int) -> Arithmetic:
    """Return the operations on one item of the data that the source takes, with texts of `length` tokens."""
    config = source.config
    return arithmetic(source.every_site, source.checkpoint.tensors, config, kind_of(config), length)
